"""The scene grammar, its renderer and its checker, and the assets made with them."""

import math
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.rewards.scenes import (
    KINDS,
    Object,
    Scene,
    SceneChecker,
    alter,
    caption,
    every_scene,
    is_held_out,
    is_perfect,
    parse,
    random_scene,
    render,
    see,
)

ASSETS = Path(__file__).parent.parent / "assets"
CHECK = SceneChecker()
RED_RING = Scene(objects=(Object("red", "ring"),), background="blue")


def drawn(n: int, seed: int = 0) -> tuple[list[Scene], list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    scenes = [random_scene(rng, KINDS[i % len(KINDS)]) for i in range(n)]
    return scenes, [render(scene, rng) for scene in scenes]


@pytest.mark.parametrize("kind", KINDS)
def test_every_caption_is_read_back(kind):
    assert all(parse(caption(scene)) == scene and scene.kind == kind for scene in every_scene(kind))


def test_captions_read_as_english():
    pair = Scene(objects=(Object("red", "ring"), Object("green", "square")), background="white", relation="left of")
    count = Scene(objects=(Object("blue", "circle"),) * 3, background="yellow")
    assert caption(RED_RING) == "a red ring on a blue background"
    assert caption(replace(RED_RING, region="top left")) == "a red ring in the top left on a blue background"
    assert caption(pair) == "a red ring left of a green square on a white background"
    assert caption(count) == "three blue circles on a yellow background"


@pytest.mark.parametrize(
    "text", ["", "a photo of a cat", "a red ring", "a red ring on a red background", "four red rings on a blue background"]
)
def test_other_text_is_not_a_scene(text):
    assert parse(text) is None
    assert math.isnan(CHECK([render(RED_RING, np.random.default_rng(0))], [text])[0])


def test_parse_forgives_case_spaces_and_a_full_stop():
    assert parse("  A Red ring on a  blue background. ") == RED_RING


def test_real_scenes_meet_their_captions():
    scenes, images = drawn(200)
    scores = CHECK(images, [caption(scene) for scene in scenes])
    assert scores.dtype == torch.float32
    assert scores.mean() >= 0.99
    assert is_perfect(scores).float().mean() >= 0.95


def test_one_wrong_attribute_costs_a_requirement():
    scenes, images = drawn(200)
    rng = np.random.default_rng(1)
    scores = CHECK(images, [caption(alter(scene, rng)) for scene in scenes])
    assert scores.max() <= 0.91
    assert scores.mean() <= 0.82


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ("a green ring on a blue background", 3 / 4),  # colour
        ("a red square on a blue background", 3 / 4),  # shape
        ("a red ring on a white background", 3 / 4),  # background
        ("two red rings on a blue background", 1 / 4 * (1 + 0 + 1 / 2 + 1 / 2)),  # number, and half the objects
        ("a red ring left of a red square on a blue background", 1 / 5 * (1 + 0 + 1 / 2 + 1 / 2 + 0)),
    ],
)
def test_score_is_the_share_of_requirements_met(wrong, expected):
    image = render(RED_RING, np.random.default_rng(0))
    assert CHECK([image], [wrong])[0] == pytest.approx(expected)


def test_position_gives_half_for_each_axis():
    image = render(replace(RED_RING, region="top left"), np.random.default_rng(0))
    texts = [caption(replace(RED_RING, region=region)) for region in ("top left", "top right", "bottom right")]
    assert CHECK([image] * 3, texts).tolist() == pytest.approx([1.0, 0.9, 0.8])


def test_relation_names_the_right_order():
    scene = next(scene for scene in every_scene("pair") if scene.relation == "above")
    image = render(scene, np.random.default_rng(0))
    swapped = replace(scene, objects=scene.objects[::-1])
    assert CHECK([image, image], [caption(scene), caption(swapped)]).tolist() == pytest.approx([1.0, 0.8])


def test_blank_and_noisy_images_score_low():
    blank = np.full((64, 64, 3), 245, np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert CHECK([blank, noise], [caption(RED_RING)] * 2).max() <= 0.25


def test_checker_survives_jpeg():
    scenes, images = drawn(60)
    files = [BytesIO() for _ in images]
    for file, image in zip(files, images, strict=True):
        Image.fromarray(image).save(file, format="JPEG", quality=95, subsampling=0)
    assert CHECK([Image.open(file) for file in files], [caption(s) for s in scenes]).mean() >= 0.99


def test_batch_equals_singles_and_every_image_form_reads_the_same():
    scenes, images = drawn(12)
    texts = [caption(scene) for scene in scenes]
    together = CHECK(images, texts)
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    singles = [CHECK([image], [text])[0] for image, text in zip(images, texts, strict=True)]
    for other in (torch.stack(singles), CHECK(stacked, texts), CHECK(stacked.numpy(), texts), CHECK(stacked / 255, texts)):
        assert torch.equal(together, other)
    assert torch.equal(together, CHECK([Image.fromarray(image) for image in images], texts))


def test_checker_refuses_what_it_cannot_read():
    with pytest.raises(TypeError, match="uint8"):
        CHECK(np.zeros((1, 3, 64, 64)), [caption(RED_RING)])
    with pytest.raises(ValueError, match="one prompt per picture"):
        CHECK(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), [caption(RED_RING)])


def test_see_lists_what_is_there():
    ground, blobs = see(render(replace(RED_RING, region="bottom right"), np.random.default_rng(3)))
    assert ground == "blue"
    assert [(blob.colour, blob.shape, blob.x > 32, blob.y > 32) for blob in blobs] == [("red", "ring", True, True)]


@pytest.mark.skipif(not (ASSETS / "tiny-sdxl").exists(), reason="the model is not in this checkout")
def test_committed_model_loads_and_samples_with_stock_diffusers():
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(ASSETS / "tiny-sdxl", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    parts = (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.float32}
    for tokenizer in (pipe.tokenizer, pipe.tokenizer_2):
        ids = tokenizer("three purple triangles on a yellow background").input_ids
        assert len(ids) == 7 + 2 and tokenizer.eos_token_id == max(tokenizer.get_vocab().values())
    texts = [caption(RED_RING)] * 2
    images = pipe(texts, num_inference_steps=8, guidance_scale=2.5, generator=torch.Generator().manual_seed(0)).images
    assert images[0].size == (64, 64)
    assert CHECK(images, texts).mean() > 0.5


@pytest.mark.skipif(not (ASSETS / "preferences").exists(), reason="the pairs are not in this checkout")
@pytest.mark.parametrize(("name", "held_out"), [("train", False), ("validation", True)])
def test_committed_pairs_are_scored_by_the_checker_and_keep_the_split(name, held_out):
    rows = pytest.importorskip("pyarrow.parquet").read_table(ASSETS / "preferences" / f"{name}.parquet").to_pylist()
    for side in "01":
        images = [Image.open(BytesIO(row[f"jpg_{side}"])) for row in rows]
        scores = CHECK(images, [row["caption"] for row in rows])
        assert scores.tolist() == pytest.approx([row[f"score_{side}"] for row in rows])
    for row in rows:
        assert is_held_out(parse(row["caption"])) == held_out
        assert row["label_0"] == 0.5 * (1 + np.sign(row["score_0"] - row["score_1"]))


@pytest.mark.skipif(not (ASSETS / "preferences").exists(), reason="the prompts are not in this checkout")
def test_committed_prompts_are_held_out_and_balanced():
    prompts = (ASSETS / "preferences" / "heldout_prompts.txt").read_text().splitlines()
    scenes = [parse(prompt) for prompt in prompts]
    assert len(set(prompts)) == len(prompts) >= 192
    assert all(is_held_out(scene) for scene in scenes)
    assert {kind: sum(scene.kind == kind for scene in scenes) for kind in KINDS} == dict.fromkeys(KINDS, len(prompts) // 4)
