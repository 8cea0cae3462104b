"""The comparison end to end: rendered scenes with mistakes, and a real pipeline with a LoRA switched off and on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign import _compat  # noqa: F401
from diffalign.config import load_reward
from diffalign.errors import ConfigError, DataError
from diffalign.evaluate import EvaluateSpec, lora_off_and_on, picture_seeds
from diffalign.evaluate.compare import compare
from diffalign.rewards.scenes import SceneChecker, parse

from ..models import tiny
from .scenes import prompts, side


def spec(**fields) -> EvaluateSpec:
    return EvaluateSpec(
        **{"prompts": "unused.txt", "judge": SceneChecker(), "bootstrap_resamples": 500, "grid_prompts": 4, **fields}
    )


def run(base, aligned, texts, fields=None, **options):
    return compare({"base": base, "aligned": aligned}, texts, spec(**(fields or {})), progress=None, **options)


def gains(tiles) -> list[float]:
    return [tile.gain("aligned", "base") for tile in tiles]


def test_better_worse_and_level_are_told_apart():
    texts = prompts(96)
    good, bad = side(0.1, 1), side(0.7, 2)
    assert run(bad, good, texts).statistics.verdict == "better"
    assert run(good, bad, texts).statistics.verdict == "worse"
    same = run(good, good, texts).statistics
    assert (same.verdict, same.ties, same.win_rate, same.difference) == ("undecided", 96, 0.5, 0.0)


def test_figures_are_the_judges_own():
    texts, judge = prompts(10), SceneChecker()
    found = run(side(0.5, 1), side(0.5, 2), texts, {"seeds": 3, "batch_size": 4})
    assert found.sides["base"].scores.shape == found.seeds.shape == (10, 3)
    again = judge(side(0.5, 1)([texts[7]] * 3, found.seeds[7].tolist()), [texts[7]] * 3)
    assert np.array_equal(found.sides["base"].scores[7], again.numpy())
    assert found.statistics.base_score == pytest.approx(float(found.sides["base"].scores.mean()), abs=1e-6)


def test_block_size_does_not_matter():
    texts = prompts(13)
    one, many = (run(side(0.4, 1), side(0.4, 2), texts, {"seeds": 2, "batch_size": size}) for size in (1, 100))
    assert one.statistics == many.statistics and [t.index for t in one.tiles] == [t.index for t in many.tiles]
    assert gains(one.best) == gains(many.best)


def test_seeds_belong_to_the_prompt_and_repeats_differ():
    table = picture_seeds(["a", "b", "a"], 2, 0)
    turned = picture_seeds(["b", "a", "a"], 2, 0)
    assert np.array_equal(table[0], turned[1]) and np.array_equal(table[1], turned[0])
    assert len(np.unique(table)) == 6


def test_seed_of_the_recipe_wins_over_the_runs():
    """evaluate.seed null takes the run's."""

    def seeds(**options):
        return run(side(0, 1), side(0, 1), prompts(3), options.pop("fields", None), **options).seeds

    assert np.array_equal(seeds(run_seed=5), seeds(fields={"seed": 5})) and not np.array_equal(seeds(), seeds(run_seed=5))
    assert np.array_equal(seeds(fields={"seed": 5}, run_seed=9), seeds(run_seed=5))


def test_extremes_are_the_largest_and_random_rows_are_fixed():
    texts = prompts(60)
    found = run(side(0.5, 1), side(0.5, 2), texts, extremes=3)
    change = (found.sides["aligned"].scores - found.sides["base"].scores).ravel()
    assert gains(found.best) == pytest.approx(sorted(change)[::-1][:3])
    assert gains(found.worst) == pytest.approx(sorted(change)[:3])
    assert len(found.tiles) == 4 and [t.index for t in found.tiles] == sorted(t.index for t in found.tiles)
    assert [t.index for t in found.tiles] != [0, 1, 2, 3] and found.tiles[0].prompt == texts[found.tiles[0].index]


def test_unscorable_prompts_are_counted_not_zero():
    texts = [*prompts(20), "an oil painting of a fox"]
    found = run(side(0.0, 1), side(0.0, 1), texts)
    assert (found.statistics.prompts, found.statistics.unscored) == (20, 1) and np.isnan(found.sides["base"].scores[20]).all()
    with pytest.raises(ConfigError, match='evaluate.judge: reward "scenes" could score none of 2 pairs'):
        run(side(0, 1), side(0, 1), ["a fox", "a hen"])


def test_categories():
    texts = prompts(40)
    kinds = [parse(text).kind for text in texts]
    found = run(side(0.6, 1), side(0.1, 2), texts, categories=kinds)
    assert set(found.categories["aligned"]) == set(kinds)
    assert sum(part.prompts for part in found.categories["aligned"].values()) == 40


def test_without_a_judge_there_are_pictures_only():
    found = run(side(0.5, 1), side(0.5, 2), prompts(6), {"judge": None})
    assert found.statistics is None and found.sentence is None and found.judge is None and not found.best
    assert len(found.tiles) == 4 and found.tiles[0].scores == {"base": None, "aligned": None}


def test_the_alarm_fires_when_the_pictures_turn_bright():
    def brighter(texts, seeds):
        return [Image.eval(image, lambda v: min(255, v + 90)) for image in side(0.0, 1)(texts, seeds)]

    calm, hot = run(side(0, 1), side(0, 1), prompts(30)), run(side(0, 1), brighter, prompts(30))
    assert not calm.alarms["aligned"].fired
    assert hot.alarms["aligned"].fired and any("brightness" in reason for reason in hot.alarms["aligned"].reasons)


def test_wrong_sides_are_refused():
    with pytest.raises(DataError, match="no prompt"):
        run(side(0, 1), side(0, 1), [])
    with pytest.raises(ValueError, match="3 pictures came back for 4 prompts"):
        run(lambda texts, seeds: side(0, 1)(texts, seeds)[:3], side(0, 1), prompts(4))


def test_lora_off_is_the_base_and_on_is_not(tmp_path):
    """One pipeline, adapter switched: the base side equals the pipeline without any LoRA, bit for bit."""
    from diffusers import DiffusionPipeline
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTunerLayer

    folder = tiny.make("sdxl", tmp_path)
    plain, tuned = (DiffusionPipeline.from_pretrained(folder) for _ in range(2))
    tuned.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    with torch.no_grad():
        for name, weight in tuned.unet.named_parameters():
            if "lora" in name:
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    options = spec(num_inference_steps=2, batch_size=2, judge=load_reward("brightness"))
    off, on = lora_off_and_on(tuned, options)
    texts = ["a red ring", "a circle", "red"]
    found = compare({"plain": plain, "off": off, "on": on}, texts, options, progress=None)
    scores = {name: one.scores for name, one in found.sides.items()}
    assert np.array_equal(scores["plain"], scores["off"]) and found.results["off"].ties == 3
    assert (scores["on"] != scores["off"]).all()
    assert not any(layer.disable_adapters for layer in tuned.unet.modules() if isinstance(layer, BaseTunerLayer))


def test_adapters_are_on_again_after_a_failure():
    class Pipe:
        components, calls = {}, []

        def disable_lora(self):
            self.calls.append("off")

        def enable_lora(self):
            self.calls.append("on")

        def set_progress_bar_config(self, **_): ...

        def __call__(self, **_):
            raise RuntimeError("lost the device")

    pipe = Pipe()
    with pytest.raises(RuntimeError):
        lora_off_and_on(pipe, spec())[0](["a"], [1])
    assert pipe.calls == ["off", "on"]
