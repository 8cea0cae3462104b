"""Every shipped recipe builds, begins with its command, and pins what it downloads."""

import re
from pathlib import Path

import pytest

from diffalign.config import load_build, load_recipe, load_reward_recipe
from diffalign.evaluate.cost import groups_per_step

ROOT = Path(__file__).parents[2]
BUILDS = sorted((ROOT / "configs" / "build").glob("*.yaml"))
REWARDS = sorted((ROOT / "configs" / "rewards").glob("*.yaml"))
RECIPES = sorted({*(ROOT / "configs").rglob("*.yaml")} - {*BUILDS, *REWARDS})


def test_the_promised_recipes_are_there():
    names = {str(path.relative_to(ROOT / "configs")) for path in RECIPES}
    assert {"quickstart.yaml", "sd35/dpo_lora.yaml"} <= names
    sd15 = ("dpo", "dpo_lora", "mapo", "timestep_aware", "smpo", "inpo", "kto", "seppo")
    sdxl = ("dpo", "dpo_lora", "mapo", "mapo_aaai", "mapo_style", "mapo_safety", "timestep_aware", "smpo", "inpo", "rankdpo")
    assert {*(f"sd15/{name}.yaml" for name in sd15), *(f"sdxl/{name}.yaml" for name in sdxl)} <= names


@pytest.mark.parametrize("name, processes, pairs", [
    ("sd15/smpo", 8, 1024), ("sdxl/smpo", 8, 1024), ("sd15/inpo", 8, 1024), ("sdxl/inpo", 8, 1024), ("sdxl/rankdpo", 8, 1024),
    ("sd15/seppo", 8, 2048), ("sd15/kto", 4, 4), ("sdxl/mapo_aaai", 8, 2048), ("sdxl/mapo_style", 4, 128),
    ("sdxl/mapo_safety", 4, 128), ("sd15/timestep_aware", 16, 2048), ("sdxl/timestep_aware", 16, 2048)])
def test_the_command_gives_the_published_batch(name, processes, pairs):
    path = ROOT / "configs" / f"{name}.yaml"
    assert f"--num_processes {processes} " in path.read_text().splitlines()[0]
    assert processes * groups_per_step(load_recipe(path)) == pairs


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(ROOT / "configs")))
def test_recipe(path):
    recipe = load_recipe(path)
    text = path.read_text()
    command = text.splitlines()[0]
    assert command.startswith("# ") and str(path.relative_to(ROOT)) in text.split("output_dir")[0]
    assert len(text.splitlines()) <= 45
    name = recipe.model.pretrained_model_name_or_path
    if not (ROOT / name).exists():
        assert re.fullmatch(r"[0-9a-f]{40}", recipe.model.revision or ""), "a hub id is pinned to a commit"


@pytest.mark.parametrize("path", BUILDS, ids=lambda p: p.name)
def test_build_recipe(path):
    spec, text = load_build(path), path.read_text()
    assert text.startswith(f"# diffalign build {path.relative_to(ROOT)}") and len(text.splitlines()) <= 45
    assert (ROOT / spec.prompts).is_file()
    for model in spec.models.values():
        name = model.pretrained_model_name_or_path
        assert (ROOT / name).exists() or re.fullmatch(r"[0-9a-f]{40}", model.revision or ""), "a hub id is pinned to a commit"


@pytest.mark.parametrize("path", REWARDS, ids=lambda p: p.name)
def test_reward_recipe(path):
    recipe, text = load_reward_recipe(path), path.read_text()
    assert text.startswith(f"# diffalign train-reward {path.relative_to(ROOT)}") and len(text.splitlines()) <= 45
    assert (ROOT / recipe.backbone).exists() or re.fullmatch(r"[0-9a-f]{40}", recipe.backbone_revision or "")
