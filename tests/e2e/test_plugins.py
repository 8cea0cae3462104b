"""A method added by a third party: an installed package's entry points name it, a recipe uses it, diffalign is not touched."""

import configparser
import math
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from diffalign import run
from diffalign.cli import main
from diffalign.config import as_tree, build_recipe, dump, load_recipe, load_reward
from diffalign.errors import ConfigError
from diffalign.objectives import Logistic, Pairwise, needs_scores, title_of
from diffalign.rewards import judged

PACKAGE = Path(__file__).parents[1] / "example_package"
RECIPE = {"output_dir": "runs/x", "model": {"pretrained_model_name_or_path": "assets/tiny-sdxl", "lora": {"rank": 4}},
          "data": {"path": "pairs.parquet"}}


def install(monkeypatch, folder: Path, name: str, points: dict[str, dict[str, str]], *paths: Path) -> None:
    """What pip leaves behind that imports and importlib.metadata read: a dist-info, and modules on the path."""
    info = folder / f"{name}-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
    lines = [line for group, found in points.items() for line in (f"[{group}]", *(f"{k} = {v}" for k, v in found.items()))]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    for path in (folder, *paths):
        monkeypatch.syspath_prepend(str(path))


def declared() -> dict[str, dict[str, str]]:
    """The entry points of the example's pyproject.toml: plain enough for configparser, since Python 3.10 has no tomllib."""
    reader = configparser.ConfigParser()
    reader.optionxform = str
    reader.read(PACKAGE / "pyproject.toml")
    marker = "project.entry-points."
    return {section[len(marker):].strip('"'): {name: value.strip('"') for name, value in reader[section].items()}
            for section in reader.sections() if section.startswith(marker)}


@pytest.fixture
def example(monkeypatch, tmp_path):
    install(monkeypatch, tmp_path / "site", "diffalign_example", declared(), PACKAGE)
    yield
    sys.modules.pop("diffalign_example", None)


@pytest.fixture
def stranger(monkeypatch, tmp_path):
    """A function (source, group, value) that installs a module of that source, which offers ``Odd`` in it as ``odd``."""
    names = []

    def add(source: str, group: str = "diffalign.objectives", value: str = "Odd") -> None:
        name = f"stranger_{tmp_path.name}_{len(names)}".replace("-", "_")
        folder = tmp_path / name
        folder.mkdir()
        (folder / f"{name}.py").write_text(source)
        install(monkeypatch, folder, name, {group: {"odd": f"{name}:{value}"}})
        names.append(name)

    yield add
    for name in names:
        sys.modules.pop(name, None)


def build(objective, **sections):
    return build_recipe({**RECIPE, **sections, "objective": objective})


def test_the_example_declares_all_groups():
    assert set(declared()) == {"diffalign.links", "diffalign.objectives", "diffalign.labels", "diffalign.rewards"}


def test_its_rewards_score_pictures_by_hand(example):
    """A black half beside a white half: its mirror image differs by 1 everywhere, its mean colour is 1/2 in every channel."""
    halves = torch.cat([torch.zeros(3, 8, 4), torch.ones(3, 8, 4)], dim=2)
    flat = torch.full((3, 8, 8), 0.5)
    one, other = (load_reward({"kind": "symmetry", "axis": axis}) for axis in "xy")
    assert judged(one, [halves, flat], ["", ""]).tolist() == [-1, 0] and judged(other, [halves], [""]).tolist() == [0]
    # inside, two of six columns see an edge, +1 and -1: variance 2/6
    assert judged(load_reward("sharpness"), [halves, flat], ["", ""]).tolist() == pytest.approx([1 / 3, 0])
    scores = judged(load_reward("house"), [halves, halves], ["", ""], {"house_colour": [[127.5, 127.5, 127.5], None]})
    assert scores[0] == 0 and scores[1].isnan()
    image = torch.rand(3, 8, 8, requires_grad=True)
    for reward in (one, load_reward("sharpness")):
        assert reward.differentiable and torch.autograd.grad(reward([image], [""])[0], image)[0].abs().sum() > 0
    with pytest.raises(ConfigError, match="reward.axis: must be x or y"):
        load_reward({"kind": "symmetry", "axis": "z"})


def test_a_recipe_names_its_rewards(example, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({**RECIPE, "objective": {"kind": "dpo", "beta": 2000},
                                    "source": {"kind": "online", "reward": {"kind": "symmetry", "axis": "y"}},
                                    "evaluate": {"prompts": "prompts.txt", "judge": "sharpness"}}))
    recipe = load_recipe(file)
    assert recipe.source.reward.axis == "y" and recipe.evaluate.judge.name == "sharpness"
    assert build_recipe(as_tree(recipe)) == recipe


def test_a_recipe_names_them_and_a_written_tree_reads_back(example, tmp_path):
    objective = {"kind": "focal", "beta": 2000, "link": {"kind": "alpha_po", "alpha": 0.5}}
    file = tmp_path / "recipe.yaml"
    for tree in (objective, {"kind": "regularized", "sft": 0.1, "objective": objective},
                 {"kind": "dpo", "beta": 5, "link": "alpha_po", "labels": {"kind": "clear_pairs", "least": 0.2}}):
        file.write_text(yaml.safe_dump({**RECIPE, "objective": tree}))
        recipe = load_recipe(file)
        assert build_recipe(yaml.safe_load(dump(recipe))) == recipe
    written = as_tree(build(objective).objective)
    assert (written["kind"], written["link"], written["pairs"]) == (
        "focal", {"kind": "alpha_po", "alpha": 0.5, "gamma": 0.0}, {"kind": "best_worst"})
    assert as_tree(recipe.objective)["labels"] == {"kind": "clear_pairs", "least": 0.2}


def test_a_class_that_is_offered_under_another_path_keeps_its_kind(stranger):
    stranger("from diffalign.objectives import Pairwise\nfrom dataclasses import dataclass\n"
             "class Box:\n    @dataclass(frozen=True)\n    class Inner:\n        reference_free = False\n        min_k = 2\n"
             "        def __call__(self, est, batch, memory): ...\nOdd = Box.Inner\n")
    assert as_tree(build({"kind": "odd"}).objective) == {"kind": "odd"}


def test_title_and_needs_scores_may_be_absent(example):
    focal = build({"kind": "focal", "beta": 5}).objective
    assert (title_of(focal), needs_scores(focal)) == ("Focal", False)
    wrapped = build({"kind": "regularized", "sft": 0.1, "objective": {"kind": "focal", "beta": 5}}).objective
    assert (title_of(wrapped), needs_scores(wrapped)) == ("Focal + sft", False)
    bent = build({"kind": "dpo", "beta": 5, "link": "alpha_po"}).objective
    assert title_of(bent) == "AlphaPO"
    with pytest.raises(ConfigError, match="compares 2"):
        build({"kind": "focal", "beta": 5}, data={**RECIPE["data"], "layout": "unpaired"})
    with pytest.raises(ConfigError, match="has no scores, which AlphaPO needs"):
        build({"kind": "dpo", "beta": 5, "link": "alpha_po", "labels": "clear_pairs"},
              data={**RECIPE["data"], "layout": "pickapic"})


def test_its_options_are_checked_like_ours(example):
    for objective, message in (
            ({"kind": "focal", "beta": 5, "powr": 1}, r"objective.powr: unknown option for Focal. Did you mean \"power\"\?"),
            ({"kind": "focal"}, "objective.beta: is missing"),
            ({"kind": "focal", "beta": "much"}, "objective.beta: "),
            ({"kind": "dpo", "beta": 5, "link": {"kind": "alpha_po", "alpha": 0}}, "objective.link.alpha: must differ")):
        with pytest.raises(ConfigError, match=message):
            build(objective)


def test_formulas(example):
    from diffalign_example import AlphaPO

    # lm_objectives.md: mean log-probs -1 and -1.2, a = .25, b = 2, g = 1: r = -1.136102, -1.399435; loss .957562
    w, l = torch.tensor([-1.0], dtype=torch.float64), torch.tensor([-1.2], dtype=torch.float64)
    assert AlphaPO(alpha=0.25, gamma=1.0)(w, l, 2.0).item() == pytest.approx(0.957562, abs=1e-6)
    assert AlphaPO(alpha=1e-9)(w, l, 2.0).item() == pytest.approx(Logistic()(w, l, 2.0).item(), abs=1e-8)


def test_it_trains(example, small, tmp_path):
    objective = {"kind": "regularized", "sft": 0.1,
                 "objective": {"kind": "focal", "beta": 500, "link": {"kind": "alpha_po", "alpha": 0.5}}}
    file = small(tmp_path, objective=objective, train={"max_train_steps": 2}, data={"validation": None})
    facts = run.train(load_recipe(file))
    assert facts["step"] == 2 and facts["objective"] == "Focal + sft"
    written = load_recipe(tmp_path / "run" / "config.resolved.yaml")
    assert written == load_recipe(file)
    weights = load_file(tmp_path / "run" / "pytorch_lora_weights.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in weights.items() if ".lora_B." in name or ".lora.up." in name)
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_a_label_trains(example, small, tmp_path):
    objective = {"kind": "dpo", "beta": 500, "labels": {"kind": "clear_pairs", "least": 0.3}}
    file = small(tmp_path, objective=objective, train={"max_train_steps": 2},
                 data={"validation": None, "layout": "pickapic_scored"})
    assert math.isfinite(run.train(load_recipe(file))["wall_seconds"])


@pytest.mark.parametrize("objective, place, known", [
    ({"kind": "focel", "beta": 5}, "objective.kind", "focal"),
    ({"beta": 5}, "objective.kind", "focal"),
    (3, "objective", "focal"),
    ({"kind": "dpo", "beta": 5, "link": "alphapo"}, "objective.link.kind", "alpha_po"),
    ({"kind": "dpo", "beta": 5, "labels": "clear_pair"}, "objective.labels.kind", "clear_pairs"),
])
def test_unknown_kinds_list_plugins(example, objective, place, known):
    with pytest.raises(ConfigError) as refused:
        build(objective)
    text = str(refused.value)
    assert text.startswith(f"{place}: ") and known in text and "\n" not in text
    if isinstance(objective, dict) and "kind" in objective:
        assert f'Did you mean "{known}"?' in text


def test_ours_win_over_theirs(monkeypatch, tmp_path):
    install(monkeypatch, tmp_path, "shadow", {"diffalign.objectives": {"dpo": "nowhere:Nothing"}})
    assert type(build({"kind": "dpo", "beta": 5}).objective) is Pairwise


HEAD = "from dataclasses import dataclass\n"
CALL = "    def __call__(self, est, batch, memory): ...\n"
FROZEN = HEAD + "@dataclass(frozen=True)\nclass Odd:\n"


@pytest.mark.parametrize("source, problem", [
    ("raise RuntimeError('no\\nluck')", "cannot be loaded: no"),
    ("import a_module_that_is_not_there", "cannot be loaded: No module named 'a_module_that_is_not_there'"),
    ("import sys; sys.exit(3)", "cannot be loaded: 3"),
    ("def broken(:", "cannot be loaded: "),
    ("Other = 1", "cannot be loaded: "),
    ("Odd = 3", "is not a frozen dataclass"),
    ("def Odd(**options): ...", "is not a frozen dataclass"),
    ("class Odd:\n    reference_free = False\n    min_k = 2\n" + CALL, "is not a frozen dataclass"),
    (HEAD + "@dataclass\nclass Odd:\n    reference_free = False\n    min_k = 2\n" + CALL, "is not a frozen dataclass"),
    (FROZEN + "    reference_free = False\n    min_k = 2\n", "has no __call__"),
    (FROZEN + "    min_k = 2\n" + CALL, "lacks reference_free"),
    (FROZEN + CALL, "lacks reference_free and min_k"),
    (FROZEN + "    x: 'Unknown' = 1\n    reference_free = False\n    min_k = 2\n" + CALL, "type cannot be read"),
    (FROZEN + "    x: object() = 1\n    reference_free = False\n    min_k = 2\n" + CALL, "a recipe cannot hold: x"),
])
def test_unfit_plugins_are_refused_in_one_line(stranger, tmp_path, capsys, source, problem):
    stranger(source)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({**RECIPE, "objective": {"kind": "odd"}}))
    with pytest.raises(ConfigError) as refused:
        load_recipe(file)
    text = str(refused.value)
    assert text.startswith("objective.kind: the plug-in 'odd' (stranger_") and problem in text and "\n" not in text
    assert ":Odd, entry point of diffalign.objectives)" in text
    assert main(["train", str(file)]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_links_and_labels_need_no_reference_free(stranger):
    stranger(FROZEN + "    def __call__(self, winner, loser, beta): return loser - winner\n", group="diffalign.links")
    assert title_of(build({"kind": "dpo", "beta": 5, "link": "odd"}).objective) == "Odd"


def test_an_optional_slot_of_a_plugin(stranger):
    stranger("from diffalign.objectives import Hinge, Link\n" + FROZEN +
             "    link: Link | None = None\n    reference_free = False\n    min_k = 2\n" + CALL)
    assert build({"kind": "odd"}).objective.link is None
    recipe = build({"kind": "odd", "link": "hinge"})
    assert title_of(recipe.objective.link) == "Diffusion-SLiC"
    assert build_recipe(yaml.safe_load(dump(recipe))) == recipe


def test_one_name_from_two_packages_is_refused(stranger):
    for _ in range(2):
        stranger(FROZEN + "    reference_free = False\n    min_k = 2\n" + CALL)
    with pytest.raises(ConfigError, match="offered by several packages"):
        build({"kind": "odd"})
