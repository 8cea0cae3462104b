"""Rewards by name, and the exact rules with their arithmetic."""

from __future__ import annotations

import dataclasses
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign import config
from diffalign.config import as_tree, load_reward, rewards_from
from diffalign.errors import ConfigError, DataError, ResourceError, RewardError
from diffalign.rewards import REWARDS, Reward, check, identity, judged
from diffalign.rewards.base import as_pil, pixels
from diffalign.rewards.rules import Compressibility
from diffalign.rewards.scenes import SceneChecker


def flat(*colour: int, size: int = 8) -> Image.Image:
    return Image.new("RGB", (size, size), colour)


def test_brightness_by_hand():
    """BT.601: red 0.299, green 0.587, blue 0.114; (51, 102, 204)/255 = 0.2, 0.4, 0.8: 0.0598 + 0.2348 + 0.0912 = 0.3858."""
    images = [flat(0, 0, 0), flat(255, 255, 255), flat(255, 0, 0), flat(51, 102, 204)]
    assert load_reward("brightness")(images, [""] * 4).tolist() == pytest.approx([0, 1, 0.299, 0.3858], abs=1e-6)


def test_colourfulness_by_hand():
    """Pure red: rg = 255, yb = 127.5, no spread: 0.3 * sqrt(255^2 + 127.5^2) = 85.5297.
    Half red, half green: rg = +-255 (mean 0, deviation 255), yb = 127.5: 255 + 0.3 * 127.5 = 293.25. Grey: 0.
    """
    half = Image.fromarray(
        np.stack([np.full((4, 4, 3), (255, 0, 0)), np.full((4, 4, 3), (0, 255, 0))]).reshape(8, 4, 3).astype("uint8")
    )
    scores = load_reward("colourfulness")([flat(255, 0, 0), half, flat(90, 90, 90)], [""] * 3)
    assert scores.tolist() == pytest.approx([0.3 * math.hypot(255, 127.5), 293.25, 0], abs=1e-3)


def test_compressibility_is_minus_kilobytes():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype="uint8"))
    target = io.BytesIO()
    noise.save(target, "JPEG", quality=95)
    plain, noisy = load_reward("compressibility")([flat(9, 9, 9, size=64), noise], ["", ""]).tolist()
    assert noisy == pytest.approx(-len(target.getvalue()) / 1000) and plain > noisy


@pytest.mark.parametrize("name", ["brightness", "colourfulness", "compressibility"])
def test_batch_equals_singles_and_all_forms_agree(name):
    reward, random = load_reward(name), np.random.default_rng(1)
    images = [Image.fromarray(random.integers(0, 256, (16, 24, 3), dtype="uint8")) for _ in range(13)]
    batch = reward(images, [""] * 13)
    assert batch.dtype == torch.float32 and torch.equal(batch, torch.cat([reward([image], [""]) for image in images]))
    stacked = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
    assert torch.allclose(reward(stacked, [""] * 13), batch, atol=1e-5)
    assert torch.allclose(reward(stacked.float() / 255, [""] * 13), batch, rtol=1e-5)


@pytest.mark.parametrize("name", ["brightness", "colourfulness", "compressibility"])
def test_gradients_exist_exactly_where_promised(name):
    reward = load_reward(name)
    images = torch.rand(2, 3, 8, 8, requires_grad=True)
    score = reward(images, ["", ""]).sum()
    assert score.requires_grad == reward.differentiable
    if reward.differentiable:
        score.backward()
        assert images.grad.isfinite().all() and images.grad.abs().sum() > 0


def test_grey_picture_has_a_finite_gradient():
    images = torch.full((1, 3, 4, 4), 0.5, requires_grad=True)
    load_reward("colourfulness")(images, [""]).sum().backward()
    assert images.grad.isfinite().all()


def test_broken_file_is_nan_not_zero(tmp_path):
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype="uint8")).save(whole, "PNG")
    (tmp_path / "cut.png").write_bytes(whole.getvalue()[:3000])
    scores = load_reward("brightness")([Image.open(tmp_path / "cut.png"), flat(255, 255, 255)], ["", ""])
    assert scores[0].isnan() and scores[1] == 1


def test_counts_and_kinds_are_checked():
    with pytest.raises(ValueError, match="2 pictures for 1 prompts"):
        load_reward("brightness")([flat(0, 0, 0)] * 2, [""])
    with pytest.raises(TypeError, match="a picture is PIL"):
        pixels(np.zeros((4, 4)))


def test_conversion_rounds_half_up():
    assert as_pil(torch.full((3, 1, 1), 0.5)).getpixel((0, 0)) == (128,) * 3
    assert as_pil(Image.new("RGBA", (1, 1), (1, 2, 3, 4))).mode == "RGB"


def test_every_name_loads_and_calls_itself_so():
    assert all(load_reward(name).name == name for name in REWARDS if not dataclasses.fields(REWARDS[name]))


@pytest.mark.parametrize(
    ("typo", "meant"), [("brightnes", "brightness"), ("colorfulness", "colourfulness"), ("scene", "scenes")]
)
def test_unknown_name_says_what_was_meant(typo, meant):
    with pytest.raises(ConfigError, match=f"no reward called '{typo}'. Did you mean \"{meant}\""):
        load_reward(typo)
    with pytest.raises(ConfigError, match="Known: scenes, brightness, "):
        load_reward("zzz")


def test_bad_options_are_a_sentence():
    with pytest.raises(ConfigError, match="reward.quality: must lie in 1..100, got 0"):
        load_reward({"kind": "compressibility", "quality": 0})
    with pytest.raises(ConfigError, match="reward.nonsense: unknown option for Brightness"):
        load_reward({"kind": "brightness", "nonsense": 1})


MINE = """
from __future__ import annotations
from dataclasses import dataclass
import torch

@dataclass(frozen=True, kw_only=True)
class Warmth:
    gain: float = 1.0
    name = "warmth"
    differentiable = False
    columns = ("offset",)

    def __call__(self, images, prompts, offset):
        return torch.tensor([self.gain * image.getpixel((0, 0))[0] + o for image, o in zip(images, offset)])
"""


def test_rewards_from_a_file(tmp_path):
    file = tmp_path / "my_warmth.py"
    file.write_text(MINE)
    try:
        assert rewards_from(file) == ["warmth"]
        mine = load_reward({"kind": "warmth", "gain": 2})
        assert judged(mine, [flat(3, 0, 0)], [""], {"offset": [1.0]}).tolist() == [7.0]
        with pytest.raises(DataError, match='"warmth" reads a column "offset"'):
            judged(mine, [flat(3, 0, 0)], [""])
        with pytest.raises(ConfigError, match="a reward called 'warmth' already"):
            rewards_from(file)
    finally:
        REWARDS.pop("warmth", None)


@pytest.mark.parametrize(("text", "words"), [("x = 1", "holds no reward"), ("import wings", "No module named 'wings'"),
                                             ("def (", "SyntaxError"), ("raise SystemExit(3)", "SystemExit")])
def test_files_without_a_reward(tmp_path, text, words):
    (tmp_path / "odd.py").write_text(text)
    with pytest.raises(ConfigError, match=words):
        rewards_from(tmp_path / "odd.py")
    with pytest.raises(ConfigError, match="none.py"):
        rewards_from(tmp_path / "none.py")


@pytest.mark.parametrize(("scores", "expected"), [
    ([1.0, math.inf], [1.0, None]), ([-math.inf, 0.0], [None, 0.0]), (np.array([1, 2]), [1.0, 2.0])])
def test_scores_are_float32_with_nan_for_unscored(scores, expected):
    class Fixed:
        name, differentiable = "fixed", False

        def __call__(self, images, prompts):
            return scores
    found = judged(Fixed(), [None, None], ["", ""])
    assert found.dtype == torch.float32 and [None if math.isnan(x) else x for x in found.tolist()] == expected
    with pytest.raises(RewardError, match=r"shape \(2,\) for 1 pictures"):
        judged(Fixed(), [None], [""])


def fails(error):
    def call(self, images, prompts):
        raise error
    return call


@pytest.mark.parametrize(("call", "words"), [
    (fails(RuntimeError("kaboom\nmore")), r'"odd" failed on 2 pictures \(RuntimeError: kaboom\)'),
    (fails(KeyError()), "KeyError: no message"), (fails(SystemExit(0)), "SystemExit: 0"),  # which would pass for success
    (lambda self, images, prompts: None, "must give one number per picture"),
    (lambda self, images, prompts: ["a", "b"], "must give one number per picture"),
    (lambda self, images, prompts: 3.0, r"shape \(\) for 2"),
    (lambda self, images, prompts: torch.zeros(2, 1), r"shape \(2, 1\)")])
def test_a_reward_that_fails_is_named_in_one_line(call, words):
    odd = type("Odd", (), {"name": "odd", "differentiable": False, "__call__": call})()
    with pytest.raises(RewardError, match=words) as found:
        judged(odd, [None, None], ["", ""])
    assert "\n" not in str(found.value)


def test_errors_of_a_reward_that_the_user_can_mend_stay_what_they_are():
    odd = type("Odd", (), {"name": "odd", "differentiable": False, "__call__": fails(DataError("row 3: broken")),
                           "check": lambda self: fails(OSError("gone"))(0, 0, 0), "identity": lambda self: 1 / 0})
    with pytest.raises(DataError, match="^row 3: broken$"):
        judged(odd(), [None], [""])
    odd.__call__ = fails(MemoryError())
    with pytest.raises(ResourceError, match='"odd": out of memory'):
        judged(odd(), [None], [""])
    with pytest.raises(RewardError, match=r"check\(\) \(OSError: gone\)"):
        check(odd())
    with pytest.raises(RewardError, match=r"identity\(\) \(ZeroDivisionError"):
        identity(odd())


def test_a_reward_with_parts_is_built_from_a_recipe():
    """``tuple[Reward, ...]`` and ``dict[str, Reward]`` in a component, and back to a plain tree."""
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Both:
        parts: tuple[Reward, ...] = ()
        named: dict[str, Reward] = dataclasses.field(default_factory=dict)

    tree = {"parts": [{"kind": "compressibility", "quality": 80}, {"kind": "scenes"}], "named": {"a": {"kind": "brightness"}}}
    both = _build_locally(Both, {**tree, "parts": [tree["parts"][0], "scenes"], "named": {"a": "brightness"}})
    assert both.parts == (Compressibility(quality=80), SceneChecker()) and as_tree(both) == tree
    for wrong, words in (({"parts": "scenes"}, "parts: expected a list"), ({"named": ["scenes"]}, "named: expected names"),
                         ({"parts": ["scens"]}, "parts.0.kind: no reward called 'scens'")):
        with pytest.raises(ConfigError, match=words):
            _build_locally(Both, wrong)


def _build_locally(cls, tree):
    """The annotations of a class inside a test name what this module knows."""
    hints = {"parts": tuple[Reward, ...], "named": dict[str, Reward]}
    cls.__annotations__ = hints
    return config._build(cls, tree, "")
