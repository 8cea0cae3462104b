"""Weights cut by FSDP2 over gloo processes: the losses, held-out figures, checkpoints and files of one process."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffalign.errors import ConfigError
from diffalign.train.checkpoint import checkpoints, load
from diffalign.train.launch import make_accelerator
from diffalign.train.sharding import is_asked

from .. import ranks
from ..models import tiny
from . import cut, toy
from .test_world import apart, log

LIMIT = 500  # seconds: a quarter of a minute on an idle machine
pytestmark = [pytest.mark.timeout(600),  # and the first block, before which nothing is trained:
              pytest.mark.filterwarnings("ignore:Full backward hook is firing")]
QUICK = ("full", "lora")  # by default; four processes run all
CUT = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
COPIES = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
          "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2"}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A folder with the runs of one process, and what the others begin from."""
    folder = tmp_path_factory.mktemp("cut")
    tiny.make("sd", folder)
    for name in QUICK:
        cut.train(folder / "one", folder / "pipeline", name)
    cut.train(folder / "ended-cut", folder / "pipeline", "full", steps=1)
    return folder


def run(folder: Path, one: Path, world: int, scenarios) -> Path:
    shutil.copytree(one, folder, dirs_exist_ok=True)
    ranks.together(cut.main, folder, list(scenarios), folder=folder, world=world, limit=LIMIT, **CUT)
    return folder


@pytest.fixture(scope="module")
def two(one, tmp_path_factory):
    return run(tmp_path_factory.mktemp("two"), one, 2, QUICK)


@pytest.fixture(scope="module")
def four(one, tmp_path_factory):
    for name in set(cut.SCENARIOS) - set(QUICK):
        cut.train(one / "one", one / "pipeline", name)
    cut.train(one / "ended-cut", one / "pipeline", "full_copies", steps=1)
    return run(tmp_path_factory.mktemp("four"), one, 4, cut.SCENARIOS)


def assert_equal_one(folder: Path, name: str, world: int) -> None:
    a, b = folder / "cut" / name, folder / "one" / name
    assert apart(a, b) < 1e-6
    if "ema_decay" in cut.SCENARIOS[name]:
        assert apart(a, b, "ema") < 1e-6
    assert apart(a, b, "optimizer") < 1e-4
    for mine, his in zip(log(a), log(b), strict=True):
        assert mine["loss"] == pytest.approx(his["loss"], rel=3e-4)  # beta 2000 times float32's 1e-7
        assert mine["grad_norm"] == pytest.approx(his["grad_norm"], rel=1e-3)
        assert mine["update_norm"] == pytest.approx(his["update_norm"], rel=1e-5)
    for mine, his in zip(heldout(a), heldout(b), strict=True):
        assert mine == pytest.approx(his, rel=1e-3, abs=5e-7)  # differences of errors near 1
    results = [json.loads((folder / f"result-{rank}.json").read_text())[name] for rank in range(world)]
    assert all(result == results[0] and result["plain"] for result in results)
    assert results[0]["parameters"] == sum(t.numel() for key, t in load(checkpoints(b)[-1]).tensors["weights"].items()
                                           if key.startswith("policy/"))


def heldout(folder: Path) -> list[dict[str, float]]:
    """The held-out figures of a run, at its start and its end."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "validation/margin" in line]


@pytest.mark.parametrize("name", QUICK)
def test_two_processes_equal_one(two, name):
    assert_equal_one(two, name, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", cut.SCENARIOS)
def test_four_processes_equal_one(four, name):
    assert_equal_one(four, name, 4)


@pytest.mark.slow
def test_in_bfloat16_one_process_adds_in_another_order(four):
    """As users run it, without hooks: 18.21 against 18.26 at first, which Adam and beta 2000 make more of later."""
    cut.train(four / "plain", four / "pipeline", "lora_bf16", by_blocks=False)
    (plain, later), (mine, _) = (log(four / side / "lora_bf16") for side in ("plain", "cut"))
    assert plain["loss"] == mine["loss"] and 1e-3 < abs(plain["grad_norm"] / mine["grad_norm"] - 1) < 4e-3
    assert later["loss"] == pytest.approx(0.53, abs=5e-3)


@pytest.mark.slow
def test_copies_of_cut_weights_are_compared(four):
    """Processes 0 and 2 hold the first half, 1 and 3 the second; process 1 then changes its own."""
    for rank in range(4):
        found = json.loads((four / f"result-{rank}.json").read_text())["copied"]
        assert (found["part"], found["copies"], found["rows"]) == ([rank % 2], 2, 0.5)
        assert len(found["said"]) == 1 and "the processes hold different weights in" in found["said"][0]


def files(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{path.name}/{name}": tensor for path in sorted(folder.glob("*.safetensors"))
            for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("name, files_of", [("full", "unet"), ("lora", ".")])
def test_files_for_users_are_whole_also_in_checkpoints(two, name, files_of):
    """They hold the moving average, which only ever lay cut in the processes."""
    for place in ("checkpoint-2", "."):
        mine, his = (files(two / side / name / place / files_of) for side in ("cut", "one"))
        mine, his = ({key: t for key, t in found.items() if not key.startswith(("weights.", "optimizer.", "ema."))}
                     for found in (mine, his))
        assert mine.keys() == his.keys() and len(his) > 10
        for key, tensor in his.items():
            torch.testing.assert_close(mine[key], tensor, rtol=1e-4, atol=1e-6)


def test_one_process_hands_over_to_two(two):
    assert json.loads((two / "result-0.json").read_text())["resumed"] == cut.STEPS
    assert apart(two / "ended-cut" / "full", two / "one" / "full") < 1e-6


@pytest.mark.slow
def test_one_process_hands_over_to_two_copies(four):
    assert checkpoints(four / "ended-cut" / "full_copies")[-1].name == f"checkpoint-{cut.STEPS}"
    for group in ("weights", "ema"):
        assert apart(four / "ended-cut" / "full_copies", four / "one" / "full_copies", group) < 1e-6


def test_two_processes_hand_over_to_one(two):
    cut.train(two / "begun-cut", two / "pipeline", "full")
    assert apart(two / "begun-cut" / "full", two / "one" / "full") < 1e-6
    assert apart(two / "begun-cut" / "full", two / "one" / "full", "ema") < 1e-6
    rows = [line["step"] for line in log(two / "begun-cut" / "full")]
    assert rows == [1, 2]


@pytest.mark.parametrize("variables, changes, said", [
    ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "DeepSpeed moves the weights inside backward"),
    ({**CUT, "FSDP_VERSION": "1"}, {}, "fsdp_version 1 is not supported"),
    ({**CUT, "FSDP_OFFLOAD_PARAMS": "true"}, {}, "fsdp_offload_params is not supported"),
    ({**CUT, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "train.gradient_checkpointing=true"),
    ({**CUT, **COPIES, "WORLD_SIZE": "4", "PARALLELISM_CONFIG_TP_SIZE": "2"}, {}, "config_tp_size 2 is not supported"),
    ({**CUT, **COPIES, "WORLD_SIZE": "8"}, {}, "replicate_size 2 times dp_shard_size 2 must be the 8 processes"),
    ({**CUT, **COPIES, "WORLD_SIZE": "2", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "1"}, {}, "whole weights: configs/acc"),
    (CUT, {"optimizer": "adafactor"}, "train.optimizer: adafactor cannot work on weights that FSDP2 has cut"),
])
def test_what_accelerate_was_told_and_the_loop_does_not_do_is_refused(monkeypatch, tmp_path, variables, changes, said):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=said):
        make_accelerator(toy.spec(**changes), tmp_path)


def test_cutting_is_asked_for_by_accelerate_alone(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    assert not is_asked()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "True")
    assert is_asked()


def test_one_process_has_nothing_to_cut(monkeypatch, tmp_path):
    """As accelerate is on a GPU, where it refuses to prepare a model without its optimizer; on a CPU it knows no FSDP."""
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    for name, value in CUT.items():
        monkeypatch.setenv(name, value)
    accelerator = make_accelerator(toy.spec(), tmp_path)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    with pytest.raises(ValueError, match="FSDP2"):
        accelerator.prepare_model(toy.Net())
    bank, summary = toy.train(tmp_path / "run", accelerator=accelerator, max_train_steps=2, checkpointing_steps=2)
    plain, _ = toy.train(tmp_path / "plain", max_train_steps=2)
    assert summary.step == 2 and all(torch.equal(a, b) for a, b in zip(bank.state().values(), plain.state().values()))
