"""scripts/compare_methods.py: its accounts, its flipped labels, its table; and, slow, a small comparison that resumes."""

import json
import sys
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from diffalign.config import load_recipe
from diffalign.data.flips import flip_labels
from diffalign.errors import ConfigError
from diffalign.evaluate import EvaluateSpec
from diffalign.evaluate.compare import compare
from diffalign.evaluate.cost import BACKWARD, passes_per_group
from diffalign.evaluate.sides import Side, draw_side, implicit_accuracy, pool
from diffalign.methods import Preference
from diffalign.methods.base import Context
from diffalign.rewards.scenes import SceneChecker
from diffalign.types import Batch, Cond, Memory

from ..evaluate.scenes import prompts, side
from ..golden.test_likelihood import sd_process
from .conftest import DATA, ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import compare_methods  # noqa: E402
import compare_table  # noqa: E402

PLAN = ROOT / "scripts" / "compare_methods.yaml"


# --- accounts -------------------------------------------------------------------------------------------------------

def counted(recipe, k: int) -> float:
    """Passes of one group, by running the method's loss on a denoiser that counts."""
    from diffalign.process import Eps
    counts, scale = {}, torch.ones((), requires_grad=True)

    def predict(name, xt, t, cond):
        counts[name] = counts.get(name, 0) + len(xt)
        return (scale if name == "policy" else 0.9) * xt

    batch = Batch(x0=torch.randn(1, k, 4, 2, 2), cond=Cond(tokens=torch.zeros(1, 2, 3)),
                  utility=torch.linspace(1, 0, k)[None], valid=torch.ones(1, k, dtype=torch.bool),
                  key=torch.zeros(1, 2, dtype=torch.int64))
    ctx = Context(predict=predict, process=sd_process(), param=Eps(), seed=0, step=0, memory=Memory())
    Preference(recipe.likelihood, recipe.objective).loss(batch, ctx).per_group.sum().backward()
    return sum(counts.values()) + BACKWARD * counts["policy"]


@pytest.mark.parametrize("name, overrides, k, passes", [
    ("dpo", [], 2, 8), ("dpo", ["likelihood.draws=3"], 2, 24), ("mapo", [], 2, 6), ("sft", [], 2, 6), ("rankdpo", [], 4, 16),
    ("kto", [], 2, 8), ("cpo", [], 2, 6)])
def test_passes_are_those_that_a_step_makes(name, overrides, k, passes):
    recipe = load_recipe(ROOT / "configs" / "tiny" / f"{name}.yaml", overrides)
    assert passes_per_group(recipe, k) == passes == counted(recipe, k)


def test_the_budget_buys_75_steps_of_dpo_and_as_many_passes_of_the_others(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    plan = compare_methods.Plan.read(PLAN)
    steps = {}
    for job in compare_methods.sweep_jobs(plan, ["dpo", "mapo", "rankdpo", "robust"]):
        recipe, per_step = compare_methods.recipe_of(job, plan, tmp_path)
        steps[job.method] = recipe.train.max_train_steps
        assert abs(recipe.train.max_train_steps * per_step - plan.budget) <= per_step / 2
        assert recipe.data.validation is None and recipe.seed == plan.sweep_seed
    assert steps == {"dpo": 75, "mapo": 100, "rankdpo": 75, "robust": 75}


def test_the_plan_names_options_that_exist(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    plan = compare_methods.Plan.read(PLAN)
    there = [name for name in plan.methods if (ROOT / plan.recipe(name)).is_file()]
    assert {"dpo", "sft", "kto", "rankdpo"} <= set(there)
    for name in there:
        values = {compare_methods.identity(load_recipe(plan.recipe(name), job.overrides))
                  for job in compare_methods.sweep_jobs(plan, [name])}
        assert len(values) == len(plan.methods[name].values) >= 2, name


def test_no_prompt_serves_two_purposes(monkeypatch):
    monkeypatch.chdir(ROOT)
    plan = compare_methods.Plan.read(PLAN)
    validation, heldout = (set(compare_methods.prompts_of(plan, part)) for part in ("validation", "heldout"))
    assert len(validation) == 96 and len(heldout) == 96 and not validation & heldout


# --- flipped labels -------------------------------------------------------------------------------------------------

def test_flips_are_exact_nested_and_swap_the_scores(tmp_path):
    source = pq.read_table(DATA / "train.parquet").to_pydict()
    decided = np.asarray(source["label_0"]) != 0.5
    flipped = {}
    for share in (0.1, 0.2, 0.4):
        count = flip_labels(DATA / "train.parquet", tmp_path / f"{share}.parquet", share)
        noisy = pq.read_table(tmp_path / f"{share}.parquet")
        assert noisy.schema.equals(pq.read_schema(DATA / "train.parquet"))
        noisy = noisy.to_pydict()
        changed = np.asarray(noisy["label_0"]) != np.asarray(source["label_0"])
        assert changed.sum() == count == round(share * decided.sum()) and not (changed & ~decided).any()
        assert noisy["jpg_0"] == source["jpg_0"] and noisy["caption"] == source["caption"]
        for i in np.flatnonzero(decided):
            old = (source["score_0"][i], source["score_1"][i])
            assert (noisy["score_0"][i], noisy["score_1"][i]) == (old[::-1] if changed[i] else old)
            assert noisy["label_0"][i] == (1 - source["label_0"][i] if changed[i] else source["label_0"][i])
        flipped[share] = set(np.flatnonzero(changed))
    assert flipped[0.1] < flipped[0.2] < flipped[0.4]


def test_rows_without_a_label_are_not_flipped(tmp_path):
    """Half of the four labelled rows are flipped, and nothing else changes."""
    rows = {"jpg_0": [b""] * 8, "jpg_1": [b""] * 8, "caption": ["a"] * 8, "label_0": [1.0, 0.0, 1.0, 0.0, None, 0.0, 1.0, 0.0],
            "has_label": [True, True, True, None, True, False, False, False]}
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    assert flip_labels(tmp_path / "t.parquet", tmp_path / "flipped.parquet", 0.5) == 2
    noisy = pq.read_table(tmp_path / "flipped.parquet").to_pydict()
    assert noisy["label_0"][4:] == rows["label_0"][4:] and sum(a != b for a, b in zip(noisy["label_0"], rows["label_0"])) == 2


# --- sides ----------------------------------------------------------------------------------------------------------

def test_sides_drawn_apart_agree_with_the_comparison():
    texts = prompts(30)
    spec = EvaluateSpec(prompts="unused", judge=SceneChecker(), seeds=2, seed=0, bootstrap_resamples=500, batch_size=7)
    one, two = side(0.6, 1), side(0.2, 2)
    together = compare({"base": one, "aligned": two}, texts, spec, progress=None)
    base, aligned = (draw_side(model, texts, SceneChecker(), spec) for model in (one, two))
    pooled = pool(base, [aligned], resamples=500)
    assert pooled.statistics == together.statistics and pooled.alarm.statistics == together.alarms["aligned"].statistics
    assert pooled.alarm.diversity.ratio > 0 and pooled.win_rates == [together.statistics.win_rate]


def test_seeds_of_a_prompt_are_one_unit():
    texts, spec = prompts(30), EvaluateSpec(prompts="unused", judge="scenes", seed=0)
    base, aligned = (draw_side(side(*given), texts, SceneChecker(), spec) for given in ((0.6, 1), (0.2, 2)))
    single, thrice = pool(base, [aligned]), pool(base, [aligned] * 3)
    interval = ("win_rate_low", "win_rate_high")  # the same runs again are no new evidence
    assert [getattr(single.statistics, name) for name in interval] == [getattr(thrice.statistics, name) for name in interval]
    assert thrice.statistics.prompts == 30 and thrice.statistics.pairs == 90
    few = [Side(scores=part.scores[:8], statistics=part.statistics[:, :8], spread=part.spread[:8]) for part in (base, aligned)]
    single, thrice = pool(few[0], few[1:]), pool(few[0], few[1:] * 3)
    for one, three in zip(single.alarm.statistics, thrice.alarm.statistics, strict=True):  # nor was the base drawn three times
        assert three.shift == pytest.approx(one.shift)
        assert three.band_high == pytest.approx(one.band_high) and one.band_high > 1


def test_a_side_survives_its_file(tmp_path):
    made = synthetic(0)
    made.save(tmp_path / "side.npz")
    again = Side.load(tmp_path / "side.npz")
    assert all(np.array_equal(value, getattr(again, name)) for name, value in vars(made).items())
    assert implicit_accuracy(made.margins, [again.margins])[0] == 0.5


# --- the table ------------------------------------------------------------------------------------------------------

def synthetic(gain: float, seed: int = 0, count: int = 40) -> Side:
    draw = np.random.default_rng(seed)
    scores = np.clip(np.random.default_rng(9).uniform(0.3, 0.7, (count, 2)) + gain, 0, 1)
    scores = scores + 0.02 * draw.standard_normal(scores.shape) * (gain != 0)
    return Side(scores=scores.astype(np.float32), statistics=np.random.default_rng(8).uniform(size=(3, count, 2)),
                spread=np.full(count, 10.0), margins=draw.standard_normal((20, 8)).astype(np.float32) + gain)


def finished(out, stage, method, value, seed, made) -> None:
    folder = out / stage / method / value / f"seed{seed}"
    made.save(folder / "side.npz")
    (folder / "result.json").write_text(json.dumps(
        {"stage": stage, "method": method, "value": value, "seed": seed, "steps": 100, "passes": 12800, "seconds": 30.0,
         "score": float(made.scores.mean()), "title": method, "identity": "x"}))


def test_the_table_says_what_helped_and_what_is_missing(tmp_path):
    pytest.importorskip("matplotlib")
    out, docs = tmp_path / "out", tmp_path / "methods.md"
    plan = compare_methods.Plan.read(PLAN)
    for part in ("heldout", "validation"):
        synthetic(0).save(out / "base" / f"{part}.npz")
    (out / "plan.json").write_text(json.dumps(asdict(plan)))
    for name, value, gain in (("dpo", "2000", 0.2), ("sft", "0.001", 0.05), ("hinge", "500", -0.2), ("exo", "500", 0.0)):
        finished(out, "sweep", name, value, 0, synthetic(gain))
        for seed in (0, 1, 2):
            finished(out, "final", name, value, seed, synthetic(gain, seed))
    finished(out, "sweep", "dpo", "500", 0, synthetic(0.1))
    for name, gains in (("dpo", (0.2, 0.05)), ("ipo", (0.2, 0.15))):
        for rate, gain in zip(("flip0", "flip0.4"), gains):
            finished(out, "noise", name, rate, 0, synthetic(gain))
    failed = out / "final" / "kto" / "1000" / "seed0"
    failed.mkdir(parents=True)
    (failed / "failed.json").write_text(json.dumps({"reason": "it broke", "kind": "ValueError"}))
    docs.write_text(f"before\n{compare_table.BEGIN}\nstale\n{compare_table.END}\nafter\n")
    for _ in range(2):  # a second table replaces the first
        compare_table.write_table(out, docs, tmp_path / "figures")
    text = docs.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "stale" not in text
    assert text.count("| `dpo` | 2000 |") == 1 and text.index("| `dpo` | 2000") < text.index("| `hinge` | 500")
    assert "Better than the base, by an interval above one half: `dpo`, `sft`." in text
    assert "no difference from the base is shown: `exo`; worse than the base: `hinge`." in text
    assert "picture by picture, better: `dpo`; worse: `exo`, `hinge`" in text
    assert "it broke" in text and "`mapo`" in text and "**2000: " in text and "no value above the base" in text
    assert "At 40 % flipped, picture by picture against `dpo`, better: `ipo`" in text
    assert all((tmp_path / "figures" / name).stat().st_size > 5000 for name in ("methods.png", "label_noise.png"))
    docs.write_text("no place")
    with pytest.raises(ConfigError, match="needs the lines"):
        compare_table.write_table(out, docs, tmp_path / "figures")


def test_the_readme_lists_every_recipe_once_and_results_where_there_are_some(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    out, readme = tmp_path / "out", tmp_path / "README.md"
    readme.write_text(f"before\n{compare_table.METHODS}\nstale\n{compare_table.METHODS_END}\nafter\n")
    for _ in range(2):
        plain = compare_table.methods_table(out, readme)
    text, own = readme.read_text(), (ROOT / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "stale" not in text and "win rate" not in plain
    for path in (ROOT / "configs" / "tiny").glob("*.yaml"):
        assert text.count(f"[{path.stem}](configs/tiny/{path.name})") == 1
        assert f"(configs/tiny/{path.name})" in own, "run scripts/compare_methods.py methods"
    row = next(line for line in plain.splitlines() if "[timestep_aware]" in line)
    assert "2505.18736" in row and "| 3: policy, reference, origin | 8 |" in row and "configs/sdxl/timestep_aware.yaml" in row
    assert "| winners | 1: policy | 6 | [sft]" in plain
    assert "| lists with scores | 2: policy, reference | 16 | [rankdpo]" in plain
    for part in ("heldout", "validation"):
        synthetic(0).save(out / "base" / f"{part}.npz")
    (out / "plan.json").write_text(json.dumps(asdict(compare_methods.Plan.read(PLAN))))
    finished(out, "sweep", "dpo", "2000", 0, synthetic(0.2))
    finished(out, "final", "dpo", "2000", 0, synthetic(0.2))
    measured = compare_table.methods_table(out, readme).splitlines()
    assert "; 1.00 [" in next(line for line in measured if "tiny/dpo.yaml" in line)


# --- all of it, small -----------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_small_comparison_resumes_and_counts_alike(small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    common, out = small(tmp_path, train={"train_batch_size": 2}), tmp_path / "out"
    recipe = load_recipe(common)
    (tmp_path / "mapo.yaml").write_text("extends: recipe.yaml\nobjective: {kind: mapo}\n")
    plan = tmp_path / "plan.yaml"
    tree = {"budget": 48, "seeds": [0, 1], "sweep_seed": 0, "common": str(common),
            "heldout": str(DATA / "heldout_prompts.txt"), "validation": recipe.data.validation, "pictures": 2, "train": [],
            "methods": {"dpo": {"recipe": str(common), "option": "objective.beta", "values": [500, 2000]},
                        "mapo": {"recipe": str(tmp_path / "mapo.yaml"), "option": "objective.beta", "values": [0.1]},
                        "broken": {"recipe": str(common), "option": "objective.gamma", "values": [1]},
                        "absent": {"option": "objective.beta", "values": [1]}},
            "noise": {"data": recipe.data.path, "rates": [0, 0.4], "seeds": [0], "methods": {"dpo": None}}}
    plan.write_text(json.dumps(tree))
    monkeypatch.setattr(compare_methods, "prompts_of", lambda plan, part: compare_methods.read_prompts(plan.heldout).texts[:4])

    assert compare_methods.run_all(compare_methods.Plan.read(plan), out) == 3 + 1 + 4 + 2  # sweep, failure, final, noise
    said = capsys.readouterr().out
    assert "absent: no recipe" in said and "objective.gamma: unknown option" in said
    results = {path.parent.relative_to(out): json.loads(path.read_text()) for path in out.glob("*/*/*/*/result.json")}
    assert {(r["method"], r["steps"], r["passes"]) for r in results.values()} == {("dpo", 3, 48), ("mapo", 4, 48)}
    trainings = len(list(out.glob("*/*/*/*/train.json")))
    assert trainings == len(results) - 3, "seed 0 of each final is the sweep's, and so is unflipped dpo"

    assert compare_methods.run_all(compare_methods.Plan.read(plan), out, only=["dpo", "mapo"]) == 0
    lost = next(out.glob("final/mapo/*/seed1"))
    (lost / "result.json").unlink()
    assert compare_methods.run_all(compare_methods.Plan.read(plan), out, only=["mapo"]) == 1
    assert json.loads((lost / "result.json").read_text()) == results[lost.relative_to(out)], "the same again"
    plan.write_text(json.dumps({**tree, "budget": 96}))
    with pytest.raises(ConfigError, match="another --out"):
        compare_methods.run_all(compare_methods.Plan.read(plan), out)
