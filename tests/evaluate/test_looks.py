"""Picture statistics by hand, and what they must not depend on."""

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffalign.evaluate.looks import HIGH, LOOKS, edge_density, grid, high_frequency, looks, spread
from diffalign.rewards.rules import Brightness, Colourfulness


def flat(colour, size=(32, 32)):
    return Image.new("RGB", size, colour)


def noise(seed=0, shape=(64, 64), low=0, high=256):
    return np.random.default_rng(seed).integers(low, high, (*shape, 3), dtype=np.uint8)


def halves(left, right, side=64):
    picture = np.zeros((side, side, 3), np.uint8)
    picture[:, : side // 2], picture[:, side // 2:] = left, right
    return picture


@pytest.mark.parametrize("name, picture, expected", [
    ("brightness", flat((255, 255, 255)), 1.0),
    ("brightness", flat((255, 0, 0)), 0.299),
    ("brightness", halves(0, 255), 0.5),
    ("contrast", flat((9, 80, 200)), 0.0),
    ("contrast", halves(0, 255), 0.5),                                   # half at 0, half at 1
    ("saturation", flat((200, 50, 100)), 0.75),                          # (200 - 50) / 200
    ("saturation", flat((0, 0, 0)), 0.0),
    ("saturation", halves((255, 0, 0), (128, 128, 128)), 0.5),
    ("colourfulness", flat((255, 0, 0)), 0.3 * math.hypot(255, 127.5)),  # no variance; means of rg and yb
    ("colour entropy", flat((7, 7, 7)), 0.0),
    ("colour entropy", halves(0, 255), 1.0),                             # two colours, half each: 1 bit
    ("edge density", flat((7, 7, 7)), 0.0),
    ("edge density", halves(0, 255), 2 / 64),                            # the columns on both sides of the step
    ("grid energy", flat((7, 7, 7)), 0.0),
])
def test_by_hand(name, picture, expected):
    assert LOOKS[name](picture) == pytest.approx(expected, abs=1e-6)


def test_entropy_of_all_512_colours_is_9_bits():
    level = np.arange(512)
    picture = np.stack([level // 64, level // 8 % 8, level % 8], 1).astype(np.uint8).reshape(16, 32, 3) * 32
    assert LOOKS["colour entropy"](picture) == pytest.approx(9.0)


def test_white_noise_has_its_share_of_high_frequencies():
    """A flat spectrum: the share of the area beyond HIGH, 1 - pi HIGH^2 of the unit square = 80.4 %, -0.95 dB. Rounding is
    such noise too, so an even picture has the same value."""
    expected = 10 * math.log10(1 - math.pi * HIGH**2)
    assert high_frequency(noise(shape=(128, 128))) == pytest.approx(expected, abs=0.2)
    assert high_frequency(np.full((64, 64, 3), 90, np.uint8)) == pytest.approx(expected, abs=0.2)


def test_smoothing_lowers_and_grain_raises_the_high_frequencies():
    ramp = np.repeat(np.arange(64, dtype=np.uint8)[None, :, None] * 4, 64, 0).repeat(3, 2)
    grainy = (ramp.astype(int) + np.random.default_rng(0).integers(-20, 21, ramp.shape)).clip(0, 255).astype(np.uint8)
    assert high_frequency(ramp) < high_frequency(grainy) - 10


@pytest.mark.parametrize("period", [8, 16])
@pytest.mark.parametrize("offset", [0, 3])
def test_a_grid_is_found_wherever_it_begins(period, offset):
    picture = noise(1, (128, 128), 100, 130)
    with_lines = picture.copy()
    with_lines[offset::period], with_lines[:, offset::period] = 160, 160
    assert grid(picture) < 6 and grid(with_lines) > 20


def test_no_grid_where_there_are_no_four_periods():
    assert grid(noise(0, (16, 16))) == 0.0


def test_blocks_of_jpeg_are_a_grid():
    smooth = Image.fromarray(noise(3, (16, 16))).resize((128, 128), Image.Resampling.BICUBIC)
    target = io.BytesIO()
    smooth.save(target, "JPEG", quality=3)
    assert grid(np.asarray(Image.open(target))) > grid(np.asarray(smooth)) + 5


def test_edges_are_as_many_at_twice_the_size():
    scene = np.asarray(Image.fromarray(noise(2, (8, 8))).resize((256, 256), Image.Resampling.NEAREST))
    large = np.asarray(Image.fromarray(scene).resize((1024, 1024), Image.Resampling.NEAREST))
    assert edge_density(scene) > 0.03 and edge_density(large) == edge_density(scene)


def test_jpeg_size_is_little_for_an_even_picture():
    assert LOOKS["JPEG size"](flat((7, 7, 7), (256, 256))) < 0.3 < 5 < LOOKS["JPEG size"](noise(0, (256, 256)))


def test_they_agree_with_the_rewards_of_the_same_name():
    picture = noise(4)
    assert LOOKS["brightness"](picture) == pytest.approx(Brightness()([picture], [""]).item(), abs=1e-6)
    assert LOOKS["colourfulness"](picture) == pytest.approx(Colourfulness()([picture], [""]).item(), rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(height=st.integers(1, 70), width=st.integers(1, 70), seed=st.integers(0, 99))
def test_any_size_gives_finite_numbers(height, width, seed):
    table = looks([noise(seed, (height, width))])
    assert table.shape == (len(LOOKS), 1) and np.isfinite(table).all()


def test_what_they_must_not_depend_on():
    picture = noise(5, (48, 64))
    tensor = torch.from_numpy(picture.transpose(2, 0, 1).copy())
    kinds = [picture, Image.fromarray(picture), tensor, tensor.float() / 255]
    table = looks(kinds)
    assert (table == table[:, :1]).all(), "the kind of picture"
    assert (looks(kinds[::-1]) == table).all(), "their order"
    named = dict(zip(LOOKS, table[:, 0], strict=True))
    turned = dict(zip(LOOKS, looks([picture[::-1, ::-1]])[:, 0], strict=True))
    for name in set(LOOKS) - {"JPEG size", "grid energy"}:
        assert turned[name] == pytest.approx(named[name], abs=1e-9), f"{name} of the picture upside down"


def test_a_broken_file_is_nan(tmp_path):
    file = tmp_path / "cut.png"
    Image.fromarray(noise()).save(file)
    file.write_bytes(file.read_bytes()[:200])
    table = looks([noise(), Image.open(file)])
    assert np.isfinite(table[:, 0]).all() and np.isnan(table[:, 1]).all()


def test_spread_by_hand():
    """Black, white, grey 51: distances 255, 51, 204, mean 170."""
    assert spread([flat((v,) * 3) for v in (0, 255, 51)], 3) == pytest.approx([170])
    assert spread([flat((9, 9, 9))] * 4, 2) == pytest.approx([0, 0])


def test_spread_takes_features_and_any_size():
    features = lambda images: torch.tensor([[0.0, 0.0], [3.0, 3.0]])  # noqa: E731  root of (9 + 9) / 2
    assert spread([flat((0, 0, 0)), flat((0, 0, 0))], 2, features) == pytest.approx([3.0])
    assert spread([flat((0, 0, 0), (300, 200)), flat((10, 10, 10), (64, 64))], 2) == pytest.approx([10])


def test_spread_of_one_picture_is_not_measured():
    assert np.isnan(spread([flat((0, 0, 0))] * 3, 1)).all()
    with pytest.raises(ValueError, match="3 pictures are not 2 a prompt"):
        spread([flat((0, 0, 0))] * 3, 2)
