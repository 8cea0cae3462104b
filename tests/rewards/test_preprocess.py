"""What CLIP-like models are shown: the reference's pixels on the PIL path, the same with gradients on the tensor path."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.rewards.preprocess import DEVIATION, MEAN, Preprocess, score_batches

from .tiny_clip import broken, picture, the_open_clip

SIZES = [(40, 33), (28, 28), (300, 201), (20, 25), (64, 64), (28, 41)]


def as_float(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def unnormalised(x: torch.Tensor) -> torch.Tensor:
    return x * torch.tensor(DEVIATION)[:, None, None] + torch.tensor(MEAN)[:, None, None]


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_pil_path_is_that_of_open_clip(width, height):
    reference = the_open_clip().image_transform(28, is_train=False, mean=MEAN, std=DEVIATION)
    image = picture(0, width, height)
    torch.testing.assert_close(Preprocess(size=28)(image), reference(image), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_pil_path_is_that_of_transformers_with_floor(width, height):
    try:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as Processor
    except ImportError:   # transformers 4
        from transformers import CLIPImageProcessor as Processor

    processor = Processor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    image = picture(1, width, height)
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(Preprocess(size=28, middle="floor")(image), expected, atol=1e-5, rtol=0)


def test_an_odd_rest_is_where_the_two_middles_part():
    image = Image.fromarray(np.arange(31, dtype=np.uint8).repeat(3).reshape(1, 31, 3).repeat(28, 0))   # rest 3
    columns = {how: unnormalised(Preprocess(size=28, middle=how)(image))[0, 0] * 255 for how in ("floor", "round")}
    assert [round(columns[how][0].item()) for how in ("floor", "round")] == [1, 2]


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("size", [28, 224])
def test_tensor_path_equals_pil_path_within_one_and_a_quarter_steps_of_255(width, height, size):
    image = picture(2, width, height)
    seen = unnormalised(Preprocess(size=size)(image)), unnormalised(Preprocess(size=size)(as_float(image)))
    gap = (seen[0] - seen[1]).abs()
    assert gap.max() * 255 < 1.25         # measured: at most 1.12, from PIL's two roundings by half a step each
    assert gap.mean() * 255 < 0.35        # measured: at most 0.30; one rounding alone is 0.25 on average


def test_equal_without_a_resize():
    image = picture(3, 28, 28)
    torch.testing.assert_close(Preprocess(size=28)(image), Preprocess(size=28)(as_float(image)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("antialias", [True, False])
def test_letterbox_is_that_of_hpsv2(antialias):
    the_open_clip()   # which brings torchvision
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as tv

    image = picture(4, 60, 31)
    resized = tv.resize(tv.to_tensor(image), [round(31 * 28 / 60), 28], InterpolationMode.BICUBIC, antialias=antialias)
    assert resized.shape[1] == 14
    expected = tv.normalize(tv.pad(resized, [0, 7, 0, 7], fill=0), MEAN, DEVIATION)
    found = Preprocess(size=28, fit="letterbox", antialias=antialias)(image)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert torch.equal(found[:, 0, 0], -torch.tensor(MEAN) / torch.tensor(DEVIATION))   # black before, not zero after


def test_letterbox_pads_where_the_longest_side_fits_already_and_keeps_a_line():
    prepare = Preprocess(size=28, fit="letterbox")
    assert prepare(picture(5, 28, 12)).shape == (3, 28, 28)
    assert prepare(picture(5, 2000, 1)).shape == (3, 28, 28)


@pytest.mark.parametrize("fit", ["crop", "letterbox"])
def test_letterbox_and_crop_read_bytes_and_floats_alike(fit):
    image, prepare = picture(6, 28, 28), Preprocess(size=28, fit=fit)
    for same in (np.array(image), torch.from_numpy(np.array(image)), as_float(image).double()):
        torch.testing.assert_close(prepare(same).float(), prepare(image), atol=1e-6, rtol=0)


@pytest.mark.parametrize("fit", ["crop", "letterbox"])
def test_gradients_reach_the_pixels(fit):
    g = torch.Generator().manual_seed(0)
    # clear of 0 and 1, where a cut-off overshoot has no gradient
    image = (0.3 + 0.4 * torch.rand(3, 9, 7, generator=g, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(Preprocess(size=6, fit=fit), image)


@pytest.mark.parametrize("shape", [(1, 8, 8), (8, 8), (3, 0, 8)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(TypeError, match=r"\[3, H, W\]"):
        Preprocess()(torch.zeros(shape))


def test_batches_keep_order_and_blank_only_what_cannot_be_read():
    sizes = []

    def score(pictures, prompts):
        sizes.append(len(prompts))
        return pictures.mean((1, 2, 3)) + torch.tensor([float(p) for p in prompts])

    images = [picture(i, 28, 28) for i in range(5)]
    images[3] = broken()
    prepare = Preprocess(size=28)
    scores = score_batches(score, prepare, images, ["10", "20", "30", "40", "50"], batch_size=2)
    expected = [float("nan") if i == 3 else prepare(images[i]).mean().item() + 10 * (i + 1) for i in range(5)]
    np.testing.assert_allclose(scores, expected, rtol=1e-6)
    assert sizes == [2, 1, 1]
    assert score_batches(score, prepare, [], [], 2).shape == (0,)
    assert score_batches(score, prepare, [broken()], ["1"], 2).isnan().all()
    with pytest.raises(ValueError, match="1 pictures for 2 prompts"):
        score_batches(score, prepare, images[:1], ["1", "2"], 2)
