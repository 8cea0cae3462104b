from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from diffalign.data import buckets
from diffalign.errors import DataError


def test_sdxl_buckets_are_multiples_of_64_of_nearly_equal_area():
    """1024 pixels: the square first; 4:5 is sqrt(1024^2/0.8) = 1144.9 -> 1152 high, 1024^2/1144.9 = 915.9 -> 896 wide."""
    options = buckets.buckets(1024, 8, True)
    assert options[0] == (1024, 1024) and options[1] == (1152, 896)
    assert all(h % 64 == 0 and w % 64 == 0 and 0.85 < h * w / 1024**2 < 1.15 for h, w in options)
    assert buckets.divisor(64, 4) == 8 and buckets.divisor(512, 8) == 64 and buckets.divisor(256, 8) == 32


def test_the_ladder_is_the_one_diffusers_uses():
    from diffalign import _compat  # noqa: F401
    training_utils = pytest.importorskip("diffusers.training_utils")
    if not hasattr(training_utils, "generate_aspect_ratio_buckets"):
        pytest.skip("this diffusers has no buckets")
    assert buckets.buckets(1024, 8, True) == training_utils.generate_aspect_ratio_buckets(1024, 64)


def test_resolution_must_suit_the_vae():
    with pytest.raises(DataError, match="data.resolution: 1020 is no multiple of the VAE's factor 8; take 1024"):
        buckets.buckets(1020, 8, False)


def test_a_group_goes_to_the_bucket_of_its_mean_aspect():
    """512x768 (aspect 2/3) and 640x640 (1): geometric mean sqrt(2/3) = 0.816, nearest to 4:5, in either order."""
    options = buckets.buckets(1024, 8, True)
    for sizes in ([(768, 512), (640, 640)], [(640, 640), (768, 512)]):
        assert options[buckets.nearest(sizes, options)] == (1152, 896)


def test_crop_covers_and_flip_mirrors_it():
    """h, w = 600, 1000 to 512x512: scale 512/600, resized 512 x 853, 341 columns spare, left = round(170.5) = 170 (to even),
    mirrored left = 853 - 170 - 512 = 171."""
    crop = buckets.plan((600, 1000), (512, 512), "row")
    assert (crop.resized, crop.top, crop.left, crop.left_flipped) == ((512, 853), 0, 170, 171)
    for place in ((0.0, 0.0), (0.999, 0.999)):
        crop = buckets.plan((600, 1000), (512, 512), "row", place)
        assert crop.left in (0, 341) and crop.top == 0


def test_pictures_are_cut_never_stretched():
    """A disc of 40 pixels in a 200 x 100 picture stays round: after scaling by 64/100 it is 25.6 high and 25.6 wide."""
    y, x = np.mgrid[:100, :200]
    disc = (((x - 100) ** 2 + (y - 50) ** 2 < 400) * 255).astype(np.uint8)
    image = buckets.apply(Image.fromarray(disc).convert("RGB"), buckets.plan((100, 200), (64, 64), "row"))
    inside = np.asarray(image)[..., 0] > 127
    assert image.size == (64, 64)
    assert abs(inside.any(0).sum() - inside.any(1).sum()) <= 1 and abs(inside.any(0).sum() - 25.6) <= 1


def test_the_mirrored_cut_is_the_same_cut():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (64, 90, 3), dtype=np.uint8))
    crop = buckets.plan((64, 90), (64, 64), "row", (0.0, 0.3))
    flipped = np.asarray(buckets.apply(image, crop, flipped=True))
    whole = np.asarray(image)[:, ::-1]
    np.testing.assert_array_equal(flipped, whole[:, crop.left_flipped:crop.left_flipped + 64])


def test_a_crop_that_keeps_little_is_refused():
    """1000 x 10 to a square keeps 10/1000 of it. Resizing a strip of 10^6 x 1 to cover 1024 x 1024 would need 3 TB."""
    with pytest.raises(DataError, match="line 3: a picture of 1000 x 10 pixels would lose 99%"):
        buckets.plan((10, 1000), (64, 64), "line 3")
    with pytest.raises(DataError):
        buckets.plan((1, 10**6), (1024, 1024), "row")
    assert math.isclose(buckets.LEAST_KEPT, 0.125)
