"""``diffalign plan``: what is predicted equals what was counted independently and what a process really takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib import import_module

import pytest

from diffalign.cli import main
from diffalign.config import load_recipe
from diffalign.run.plan import GIB, _budget, _Plan, plan

TINY = "configs/quickstart.yaml"
module = import_module("diffalign.run.plan")  # whose name in diffalign.run is the function's


@pytest.fixture(scope="module", autouse=True)
def counted_once():
    """Counts of a model are shared by the tests of this file: seconds each, and the same for every batch and optimizer."""
    real, known, patch = module._counted, {}, pytest.MonkeyPatch()

    def counted(recipe, layout, side):
        batch = dict(train_batch_size=1, gradient_accumulation_steps=1, max_train_steps=1, optimizer="adamw")
        key = repr((replace(recipe, train=replace(recipe.train, **batch)), layout, side))
        if key not in known:
            known[key] = real(recipe, layout, side)
        return known[key]

    patch.setattr(module, "_counted", counted)
    yield
    patch.undo()


def planned(tmp_path, *words):
    assert main(["plan", *words, "--json", str(tmp_path / "plan.json")]) == 0
    return json.loads((tmp_path / "plan.json").read_text())


def test_the_parts_of_a_small_run(tmp_path, capsys):
    found = planned(tmp_path, TINY, "train.max_train_steps=10", "train.train_batch_size=4",
                    "train.gradient_accumulation_steps=2", "--gpus", "3", "--gpu", "H200", "--efficiency", "0.5")
    memory = found["memory_bytes"]
    assert memory["gradients"] == 4 * found["trained"] and memory["optimizer"] == 2 * memory["gradients"]
    assert found["groups"] == 10 * 4 * 2 * 3
    rate = 3 * 0.5 * 989 / 2 / found["tflop_per_group"]  # float32 is computed in TF32
    assert found["groups_per_s"] == pytest.approx(rate) and found["hours"] == pytest.approx(240 / rate / 3600)
    assert found["fits"] and found["instead"] == []
    said = capsys.readouterr().out
    assert "fits" in said and f"240 groups in {240 / rate:.3g} seconds" in said


def test_a_full_fine_tune_pays_for_its_reference_and_its_moments(tmp_path):
    lora, full = planned(tmp_path, TINY), planned(tmp_path, TINY, "model.lora=null")
    free = planned(tmp_path, TINY, "model.lora=null", "objective={kind: mapo}")
    eight = planned(tmp_path, TINY, "model.lora=null", "train.optimizer=adamw_8bit")
    weights = full["memory_bytes"]["weights"]
    assert full["trained"] * 4 == pytest.approx(weights, rel=0.02) and "reference" not in lora["memory_bytes"]
    assert full["memory_bytes"]["reference"] == pytest.approx(weights, rel=0.02) and "reference" not in free["memory_bytes"]
    assert eight["memory_bytes"]["optimizer"] == full["memory_bytes"]["optimizer"] // 4
    assert free["tflop_per_group"] < full["tflop_per_group"] and lora["tflop_per_group"] < full["tflop_per_group"]
    half = planned(tmp_path, TINY, "model.lora=null", "train.mixed_precision=bf16")
    assert half["memory_bytes"]["reference"] == pytest.approx(weights / 2, rel=0.05), "its matrices are kept in bfloat16"
    assert half["tflop_per_group"] == full["tflop_per_group"]


def test_what_to_change_where_it_does_not_fit():
    recipe = load_recipe(TINY, ["train.train_batch_size=65536", "train.gradient_accumulation_steps=2"])
    found = plan(recipe, gpu="t4")
    assert not found["fits"] and found["total_bytes"] > found["limit_bytes"]
    last = found["instead"][-1]
    assert last["fits"] and last["total_bytes"] <= found["limit_bytes"]
    size, steps = (int(word.split("=")[1]) for word in last["options"][0].split())
    assert size * steps == 65536 * 2
    again = plan(load_recipe(TINY, last["options"][0].split()), gpu="t4")
    assert again["fits"] and again["total_bytes"] == last["total_bytes"]
    twice = plan(load_recipe(TINY, [f"train.train_batch_size={2 * size}"]), gpu="t4")
    assert not twice["fits"], "the batch is not halved more often than it must"


def test_selective_checkpointing_is_offered_where_it_is_enough():
    recipe = load_recipe(TINY, ["train.train_batch_size=1", "train.gradient_accumulation_steps=1"])
    found = _Plan(recipe)

    def total(how):
        return sum(_budget(found.needs(replace(recipe, train=replace(recipe.train, gradient_checkpointing=how)))).values())

    kept = total("selective")
    assert total(True) < kept
    assert found.instead(kept)[-1]["options"] == ["train.gradient_checkpointing=selective"]
    assert found.instead(kept - 1)[-1]["options"] == ["train.gradient_checkpointing=true"]


@pytest.mark.parametrize("how", ["true", "selective"])
def test_checkpointing_in_float16_can_be_counted(how):
    """There CUDA's autocast has norms in float32, when they are run again too."""
    kept, again = (plan(load_recipe(TINY, ["train.mixed_precision=fp16", f"train.gradient_checkpointing={value}"]))
                   for value in ("false", how))
    assert again["memory_bytes"]["activations"] < kept["memory_bytes"]["activations"]


@pytest.mark.parametrize("words, message", [
    ((TINY, "--gpu", "voodoo"), "--gpu: no card called 'voodoo'; known are b200, h200"),
    ((TINY, "--json", "."), "cannot write .: "), ((TINY, "--json", "/"), "cannot write /: "),
    ((TINY, "--gpus", "0"), "--gpus must be at least 1"),
    ((TINY, "--gpus", "2", "--sharding", "zero9"), "--sharding: choose one of none, fsdp2, zero2, got 'zero9'"),
    ((TINY, "--sharding", "fsdp2"), "weights are cut over two GPUs or more (--gpus)"),
    ((TINY, "--gpus", "2", "--sharding", "fsdp2", "train.optimizer=adamw_8bit"), "with train.optimizer=adamw"),
    ((TINY, "--efficiency", "1.5"), "--efficiency must be above 0 and at most 1"),
    ((TINY, "--gpu", "t4", "train.mixed_precision=bf16"), "train.mixed_precision: a t4 has no bfloat16"),
    ((TINY, "model.pretrained_model_name_or_path=some/model"), "no configuration of it is shipped"),
    (("configs/text/tiny_vrpo.yaml",), "likelihood.kind"),
    (("configs/tiny/lpo.yaml",), "likelihood.kind"),
    ((TINY, "source={kind: online, reward: {kind: scenes}}"), "source.kind: `diffalign plan` does not count"),
])
def test_what_it_cannot_plan(capsys, words, message):
    assert main(["plan", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_audio_is_refused(tmp_path, capsys):
    from ..models import tiny_audio

    tiny_audio.make(tmp_path / "pipeline")
    assert main(["plan", TINY, f"model.pretrained_model_name_or_path={tmp_path / 'pipeline'}"]) == 2
    assert "model: `diffalign plan` is not for audio" in capsys.readouterr().err


def test_a_card_given_twice(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["plan", TINY, "--gpu", "h100", "--gpu", "4090"])
    assert "argument --gpu: is given twice" in capsys.readouterr().err


MEASURE = """
import sys
from diffalign.config import load_recipe
from diffalign.models.base import enable_gradient_checkpointing
from diffalign.models.counts import inputs
from diffalign.models.weights import WeightBank
from diffalign.run import parts
from diffalign.train.optim import build_optimizer

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

recipe = load_recipe(sys.argv[1], sys.argv[2:])
denoiser = parts.denoiser_of(recipe)
denoiser.module.train()
bank = WeightBank.build(denoiser, recipe.model.lora, reads=("policy",), seed=0)
if recipe.train.gradient_checkpointing:
    enable_gradient_checkpointing(denoiser)
optimizer = build_optimizer(bank.trainable(), recipe.train)

def step(rows):
    bank.predict("policy", *inputs(denoiser, rows, 16, 16, device="cpu")).float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return peak()

print(-step(2) + step(2 * recipe.train.train_batch_size))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("options", [(), pytest.param(("train.gradient_checkpointing=true",), marks=pytest.mark.slow),
                                     pytest.param(("model.lora=null",), marks=pytest.mark.slow)])
def test_what_a_process_takes(options):
    """32 pairs against one, the peaks of one process: within 15 %. Freed blocks go back to the system at once, as a GPU's
    allocator reuses them; glibc would keep some half as much again for itself.
    """
    fixed = ("train.mixed_precision=no", "data.resolution=128", *options)
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", MEASURE, TINY, "train.train_batch_size=32", *fixed], capture_output=True,
                          text=True, env=environment, check=True)
    many, one = (plan(load_recipe(TINY, [f"train.train_batch_size={n}", *fixed]))["memory_bytes"]["activations"]
                 for n in (32, 1))
    assert many - one == pytest.approx(int(done.stdout.split()[-1]), rel=0.15)


TRACK = """
import json, sys
from diffalign.config import load_recipe
from diffalign.models.base import enable_gradient_checkpointing
from diffalign.models.counts import inputs
from diffalign.models.weights import WeightBank
from diffalign.run import parts
from diffalign.train import sharding
from diffalign.train.optim import build_optimizer
import torch
import torch.distributed as dist
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

recipe = load_recipe(sys.argv[1], sys.argv[3:])
processes, side = int(sys.argv[2]), recipe.data.resolution // 8
dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
denoiser = parts.denoiser_of(recipe)
bank = WeightBank.build(denoiser, recipe.model.lora, reads=("policy",), seed=0)
if recipe.train.gradient_checkpointing:
    enable_gradient_checkpointing(denoiser)
bank.shard(sharding.cutter(torch.device("cpu"), processes), sharding.forget_gathered)
denoiser.module.train()
optimizer = build_optimizer(bank.trainable(), recipe.train)
tracker = FSDPMemTracker(denoiser.module, optimizer)
with tracker:
    for micro in range(4):
        bank.predict("policy", *inputs(denoiser, 2, side, side, device="cpu")).float().square().mean().backward()
        tracker.reset_mod_stats()
        if micro % 2:
            optimizer.step()
            optimizer.zero_grad()
parts = {str(kind).rpartition(".")[2]: size for kind, size in tracker.get_tracker_snapshot("peak").popitem()[1].items()}
print(json.dumps(parts))
"""


@pytest.mark.parametrize("cut", ["fsdp2", pytest.param("zero2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", [("model.lora=null", "data.resolution=32")] + [
    pytest.param((lora, resolution, checkpointing), marks=pytest.mark.slow)
    for lora in ("model.lora=null", "model.lora.rank=8") for resolution in ("data.resolution=32", "data.resolution=128")
    for checkpointing in ("train.gradient_checkpointing=true", "train.gradient_checkpointing=false")])
def test_what_one_of_eight_processes_keeps_of_cut_weights(cut, options):
    """Torch's own tracker follows one of eight processes whose partners are made up: within 15 %. Weights and moments are
    eighths; a pair has two rows; gradients of a first micro-batch are there when the second has its peak."""
    fixed = ("train.mixed_precision=no", "train.train_batch_size=1", "objective={kind: mapo}", *options)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FSDP_RESHARD_AFTER_FORWARD": str(cut == "fsdp2")}
    done = subprocess.run([sys.executable, "-c", TRACK, TINY, "8", *fixed], capture_output=True, text=True, env=environment,
                          check=True)
    tracked, mine = json.loads(done.stdout.splitlines()[-1]), _Plan(load_recipe(TINY, fixed), 8).needs(
        load_recipe(TINY, fixed), cut)
    assert mine.total == pytest.approx(tracked["Total"], rel=0.15)
    assert mine.memory["weights"] == pytest.approx(tracked["SHARDED_PARAM"], rel=0.01)
    assert mine.memory["optimizer"] == pytest.approx(tracked["OPT"], rel=0.01)


def test_cutting_the_weights_is_offered_where_there_are_cards_for_it():
    """A card for a quarter of the state: what changes nothing of the run comes before what does."""
    recipe = load_recipe(TINY, ["model.lora=null", "train.train_batch_size=1", "train.gradient_checkpointing=true"])
    found, one = _Plan(recipe, 8), _Plan(recipe, 1)
    limit = sum(_budget(found.needs(recipe, "fsdp2")).values())
    assert found.instead(limit) == [{"options": ["configs/accelerate/fsdp2.yaml"], "total_bytes": limit, "fits": True}]
    assert found.instead(limit, "zero2")[0]["options"] != ["configs/accelerate/fsdp2.yaml"], "one way of cutting is enough"
    assert "configs/accelerate/fsdp2.yaml" not in one.instead(0)[-1]["options"]
    assert found.instead(0)[-1]["options"] == ["configs/accelerate/fsdp2.yaml", "train.mixed_precision=bf16",
                                               "model.lora.rank=64 train.optimizer=adamw"]
    assert one.instead(0)[-1]["options"][0] == "train.optimizer=adamw_8bit"
    small = _Plan(replace(recipe, train=replace(recipe.train, optimizer="adafactor")), 8)
    assert small.instead(0)[-1]["options"][:2] == ["train.mixed_precision=bf16",
                                                   "train.optimizer=adamw configs/accelerate/fsdp2.yaml"]


@pytest.mark.slow
def test_sdxl_at_1024(tmp_path):
    """42.64 TFLOP a LoRA pair = 2 (14.56 + 6.76), 53.98 where all weights are trained, both counted independently. The bounds
    are what we promise for a pair: with checkpointing, without, and all weights with their reference.
    """
    words = ("configs/sdxl/dpo_lora.yaml", "model.lora.rank=64", "train.train_batch_size=1")
    kept = planned(tmp_path, *words, "train.gradient_checkpointing=true")
    assert kept["tflop_per_group"] == pytest.approx(42.64, rel=0.01) and kept["total_bytes"] < 9 * GIB
    whole = planned(tmp_path, *words, "train.gradient_checkpointing=false")
    assert 10.6 * GIB < whole["memory_bytes"]["activations"] < 12 * GIB and whole["total_bytes"] < 20 * GIB
    full = planned(tmp_path, *words[:1], "model.lora=null", "train.optimizer=adamw_8bit", *words[2:])
    assert full["tflop_per_group"] == pytest.approx(53.98, rel=0.01) and full["total_bytes"] < 40 * GIB
