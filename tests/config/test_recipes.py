"""Every shipped recipe builds, begins with its command, and pins what it downloads."""

import re
from pathlib import Path

import pytest

from diffalign.config import load_recipe

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs").rglob("*.yaml"))


def test_the_promised_recipes_are_there():
    names = {str(path.relative_to(ROOT / "configs")) for path in RECIPES}
    assert {"quickstart.yaml", "sd15/dpo.yaml", "sd15/dpo_lora.yaml", "sd15/mapo.yaml", "sdxl/dpo.yaml", "sdxl/dpo_lora.yaml",
            "sdxl/mapo.yaml", "sd35/dpo_lora.yaml"} <= names


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
