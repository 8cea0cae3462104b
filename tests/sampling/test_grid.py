"""Grids: layout, enlargement, marks, determinism."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageColor

from diffalign.sampling.grid import BETTER, WEBP_LIMIT, grid, save_grid, score_text, show_size

RED, BLUE = Image.new("RGB", (64, 64), "#ff0000"), Image.new("RGB", (64, 64), "#0000ff")
GREEN = ImageColor.getrgb(BETTER)


def count(image: Image.Image, colour) -> int:
    return int(
        (np.asarray(image) == np.asarray(ImageColor.getrgb(colour) if isinstance(colour, str) else colour)).all(-1).sum()
    )


def png(image: Image.Image) -> bytes:
    target = io.BytesIO()
    save_grid(image, target, {"prompts": ["é", "<script>"]})
    return target.getvalue()


def test_small_pictures_are_enlarged_by_a_whole_factor():
    """64 -> ceil(208/64) = 4 times = 256; 1024 -> 512; 256 stays; 100 x 50 -> 3 times."""
    assert [show_size(s) for s in [(64, 64), (1024, 768), (256, 256), (100, 50)]] == [
        (256, 256),
        (512, 384),
        (256, 256),
        (300, 150),
    ]
    image = grid({"base": [RED], "aligned": [BLUE]}, ["a prompt"])
    assert count(image, "#ff0000") == 256 * 256 and count(image, "#0000ff") == 256 * 256
    stripes = Image.fromarray(np.tile(np.asarray([[[255, 0, 0], [0, 0, 255]]], np.uint8), (64, 32, 1)))
    hard = grid({"base": [stripes]}, ["a prompt"])
    assert count(hard, "#ff0000") == count(hard, "#0000ff") == 256 * 128  # enlarged pixels keep their colours


def test_better_side_is_marked_and_a_tie_is_not():
    def marks(base, aligned):
        image = grid({"base": [RED], "aligned": [BLUE]}, ["p"], scores={"base": [base], "aligned": [aligned]})
        columns = np.nonzero((np.asarray(image) == GREEN).all(-1).sum(0) >= 4)[0]
        return (columns.min() // 100, columns.max() // 100) if len(columns) else None

    wide = grid({"base": [RED], "aligned": [BLUE]}, ["p"]).width
    left, right = marks(1.0, 0.5), marks(0.5, 1.0)
    assert left is not None and right is not None and left[1] * 100 < wide / 2 + 100 < right[1] * 100
    assert marks(2e6, 2e6 + 1) is None and marks(2e6, 2e6 + 5) is not None, "as far as the statistics tell them apart"
    assert marks(0.5, 0.5) is None and marks(float("nan"), 0.5) is None and marks(None, 0.5) is None


def test_same_input_same_bytes_and_facts_inside():
    make = lambda: png(grid({"a": [RED, BLUE], "b": [BLUE, RED]}, ["one", "two"], title="title", note="note"))  # noqa: E731
    assert make() == make()
    assert json.loads(Image.open(io.BytesIO(make())).text["diffalign"]) == {"prompts": ["é", "<script>"]}


@pytest.mark.parametrize("prompt", ["word " * 400, "x" * 2000, "", "tab\tand\nnewline \x00 \u202e", "\u732b \U0001f600"])
def test_any_prompt_keeps_the_row_within_its_height(prompt):
    image = grid({"a": [RED]}, [prompt])
    assert image.height < 60 + 256 + 60 and image.width < 800


def test_mixed_sizes_share_one_tile():
    image = grid({"a": [Image.new("RGB", (64, 32), "#ff0000"), Image.new("RGB", (32, 64), "#0000ff")]}, ["wide", "tall"])
    assert count(image, "#ff0000") == 256 * 128 and count(image, "#0000ff") == 128 * 256
    assert image.height > 2 * 256


def test_wrong_counts_are_refused_by_name():
    with pytest.raises(ValueError, match='column "aligned" has 2 pictures for 1 prompts'):
        grid({"base": [RED], "aligned": [RED, BLUE]}, ["p"])
    with pytest.raises(ValueError, match="at least one column and one prompt"):
        grid({"base": []}, [])


def test_scores_read_well():
    assert [score_text(x) for x in (0, 1, 0.8333, 21.947, 1234.5, -2.65, 1e-7)] == [
        "0.000",
        "1.000",
        "0.833",
        "21.95",
        "1,234",
        "-2.650",
        "1.00e-07",
    ]


def test_webp_is_lossless_and_carries_the_facts():
    image, facts = grid({"a": [RED, BLUE], "b": [BLUE, RED]}, ["one", "two"], title="title"), {"prompts": ["é", "<script>"]}
    files = []
    for _ in range(2):
        target = io.BytesIO()
        save_grid(image, target, facts, "webp")
        files.append(target.getvalue())
    assert files[0] == files[1]
    again = Image.open(io.BytesIO(files[0]))
    assert again.format == "WEBP" and again.convert("RGB").tobytes() == image.tobytes()
    assert json.loads(again.getexif()[ExifTags.Base.ImageDescription]) == facts
    with pytest.raises(ValueError):
        save_grid(Image.new("RGB", (8, WEBP_LIMIT + 1)), io.BytesIO(), facts, "webp")


def test_heads_and_details_are_drawn_and_long_ones_cut():
    plain = grid({"a": [RED]}, ["p"])
    head = grid({"a": [RED]}, ["p"], heads={"a": "mean 0.5"})
    detail = grid({"a": [RED]}, ["p"], details=["seed 7"])
    assert head.height > plain.height and detail.size == plain.size and detail.tobytes() != plain.tobytes()
    assert grid({"a": [RED]}, ["p"], heads={"a": "x" * 900}, details=["y" * 900], note="z " * 900).width == plain.width
    assert count(head, "#ff0000") == count(detail, "#ff0000") == 256 * 256
