"""Recipes on a device that is not the CPU: no tensor is left behind, the losses are the CPU's, and a step waits once.

The device is ``shadow``, in a process of its own: it stays registered, and reads diffalign's sources for CUDA.
"""

import json
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from diffalign.config import load_recipe
from diffalign.run import train
from tests.e2e.conftest import DATA, ROOT

pytestmark = pytest.mark.slow
RECIPES = {"dpo": ["train.gradient_accumulation_steps=2", "train.gradient_checkpointing=true", "train.ema_decay=0.9"],
           "timestep_aware": ["likelihood.weighting=elbo"], "beta_dpo": [], "spo": ["source.updates=2"]}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """recipe -> (losses and gradient norms on the CPU, what ``shadow.main`` says of the device)."""
    folder = tmp_path_factory.mktemp("shadow")
    pq.write_table(pq.read_table(DATA / "train.parquet").slice(0, 12), folder / "train.parquet")

    def asked(name: str, cpu: bool) -> list[str]:
        home = folder / ("cpu" if cpu else "shadow")
        return [str(ROOT / "configs" / "tiny" / f"{name}.yaml"), f"data.path={folder / 'train.parquet'}", f"train.cpu={cpu}",
                f"data.cache_dir={home / 'cache'}", f"output_dir={home / name}", "data.validation=null", "evaluate=null",
                "model.lora.rank=4", "train.max_train_steps=2", "train.train_batch_size=2", "train.logging_steps=1",
                "train.validation_steps=0", "train.checkpointing_steps=2", "train.mixed_precision=no", *RECIPES[name]]

    runs = json.dumps([asked(name, cpu=False) for name in RECIPES])
    device = subprocess.run([sys.executable, "-m", "tests.train.shadow", runs], cwd=ROOT, capture_output=True, text=True,
                            timeout=300)
    assert device.returncode == 0, device.stderr[-3000:]
    found = dict(zip(RECIPES, json.loads(device.stdout.splitlines()[-1]), strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for name in RECIPES:
            path, *options = asked(name, cpu=True)
            train(load_recipe(path, options))
    lines = {name: map(json.loads, (folder / "cpu" / name / "metrics.jsonl").read_text().splitlines()) for name in RECIPES}
    return {name: ([[line["loss"], line["grad_norm"]] for line in lines[name] if "loss" in line], found[name])
            for name in RECIPES}


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_is_the_cpus(both, name):
    cpu, device = both[name]
    assert len(cpu) == len(device["figures"]) == 2
    for here, there in zip(cpu, device["figures"]):
        assert there == pytest.approx(here, rel=1e-4)


@pytest.mark.parametrize("name", ["dpo", "timestep_aware", "beta_dpo"])
def test_a_step_waits_for_the_device_once(both, name):
    """When its totals are read: batches, times, noise and tables were pinned."""
    assert both[name][1]["waits"] == [["to the CPU", "reduce"]] * 2
