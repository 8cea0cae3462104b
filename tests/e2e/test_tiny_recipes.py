"""Every recipe of configs/tiny trains: two steps on a few groups. One cache of latents serves them all."""

import json
import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from diffalign.config import load_recipe
from diffalign.data.sources import Online
from diffalign.models.latent_reward import TAU, load_scorer
from diffalign.run import train

from .conftest import DATA, ROOT

RECIPES = sorted((ROOT / "configs" / "tiny").glob("*.yaml"))
ROWS = {"train.parquet": 24, "ranked.parquet": 12}
FILES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights_comfy.safetensors")


@pytest.fixture(scope="session")
def few(tmp_path_factory):
    """A folder with the first rows of the data sets and, once the first recipe has run, their latents."""
    folder = tmp_path_factory.mktemp("few")
    for name, rows in ROWS.items():
        pq.write_table(pq.read_table(DATA / name).slice(0, rows), folder / name)
    return folder


def overrides(path: Path, few: Path, output_dir: Path) -> list[str]:
    """Small and quick. The held-out accuracy costs more than the steps and is the main job's to test, so it is left out."""
    recipe = load_recipe(path)
    data = recipe.data.path
    lora = ["model.lora.rank=4"] if recipe.model.lora else []
    cut = [f"data.path={few / Path(data).name}"] if Path(data).resolve().parent == DATA and Path(data).name in ROWS else []
    size = 8 if isinstance(recipe.source, Online) else 4  # samples that score alike are no group: of four that may be all
    return [*cut, f"data.cache_dir={few / 'cache'}", f"output_dir={output_dir}", "data.validation=null", "evaluate=null",
            *lora, "train.max_train_steps=2", f"train.train_batch_size={size}", "train.logging_steps=1",
            "train.validation_steps=0", "train.checkpointing_steps=2", "train.mixed_precision=no", "train.cpu=true"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_trains(path, few, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # recipes name files from the repository's root
    run = tmp_path / "run"
    recipe = load_recipe(path, overrides(path, few, run))
    facts = train(recipe)
    assert facts["step"] == 2
    losses = [line["loss"] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in line]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    if recipe.model.lora is None:  # a latent reward model: it is read back, and has left where it started
        weights = load_scorer(run / "latent_reward").module.state_dict()
        assert all(torch.isfinite(tensor).all() for tensor in weights.values()) and weights["tau"] != torch.tensor(TAU)
        return
    for name in FILES:
        weights = load_file(run / name)
        assert weights and all(torch.isfinite(tensor).all() for tensor in weights.values()), name
        up = [tensor for key, tensor in weights.items() if key.endswith((".lora_B.weight", ".lora_up.weight"))]
        assert up and any(tensor.count_nonzero() for tensor in up), f"{name}: the weights start at 0 and have not moved"
