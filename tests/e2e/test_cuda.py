"""What only a CUDA device can show; ``pytest -m gpu``. The command line on the embedded model, and one pair at full size."""

import json
import math
import warnings

import pytest
import torch
from safetensors.torch import load_file

from diffalign.cli import main
from diffalign.models import LoRA
from diffalign.models.base import enable_gradient_checkpointing, narrow_norms
from diffalign.models.counts import inputs, peak_bytes
from diffalign.models.published import SDXL_SCHEDULER, SDXL_UNET, on_meta
from diffalign.models.weights import WeightBank

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
GIB = 2**30


def trained(small, folder, **train) -> tuple[list[float], dict]:
    """Losses by step and the LoRA of a run of four steps."""
    folder.mkdir(exist_ok=True)
    file = small(folder, train={"cpu": False, **train}, evaluate=None)
    assert main(["train", str(file)]) == 0
    return losses_of(folder), load_file(folder / "run" / "pytorch_lora_weights.safetensors")


def losses_of(folder) -> list[float]:
    lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]  # there are lines of the validation too


def apart(a: dict, b: dict) -> float:
    difference = sum((a[name] - b[name]).square().sum() for name in b)
    return (difference / sum(tensor.square().sum() for tensor in b.values())).sqrt().item()


def test_losses_are_the_cpus(small, tmp_path):
    """Noise, times and order are keyed and drawn on the CPU; float32 without TF32."""
    there, weights = trained(small, tmp_path / "cuda", allow_tf32=False)
    here, expected = trained(small, tmp_path / "cpu", cpu=True)
    assert there == pytest.approx(here, rel=1e-4) and apart(weights, expected) < 1e-2


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("checkpointing", [False, True, "selective"])
def test_policy_and_reference_agree_at_the_start(small, tmp_path, precision, checkpointing):
    """Twelve steps: the first of float16 may overflow, each of which halves the scale and moves nothing."""
    losses, _ = trained(small, tmp_path / "run", max_train_steps=12, mixed_precision=precision,
                        gradient_checkpointing=checkpointing)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and all(map(math.isfinite, losses)) and len(set(losses)) > 1


def test_a_full_fine_tune_agrees_at_the_start_too(small, tmp_path):
    file = small(tmp_path, train={"cpu": False, "mixed_precision": "bf16"}, model={"lora": None}, evaluate=None)
    assert main(["train", str(file)]) == 0
    assert losses_of(tmp_path)[0] == pytest.approx(math.log(2), abs=1e-6)


@pytest.fixture
def same_sums(monkeypatch):
    """Kernels that add up in the same order every time: attention's backward otherwise adds where a block happens to end."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def test_a_resumed_run_is_the_uncut_one(small, tmp_path, same_sums):
    (tmp_path / "cut").mkdir()
    _, whole = trained(small, tmp_path / "whole")
    trained(small, tmp_path / "cut", max_train_steps=2)
    _, cut = trained(small, tmp_path / "cut", max_train_steps=4, allow_change=["train.max_train_steps"])
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)


def test_compiled_blocks_train_the_same(small, tmp_path):
    plain, _ = trained(small, tmp_path / "plain", allow_tf32=False)
    compiled, _ = trained(small, tmp_path / "compiled", allow_tf32=False, compile="on")
    assert compiled == pytest.approx(plain, rel=1e-3)


def test_a_step_waits_for_the_device_once(small, tmp_path):
    """torch's own watch over synchronising calls, in the fourth of five steps (the third checks that weights move)."""
    from diffalign.train import trainer
    step, waits = trainer._Trainer._step, []

    def watched(self):
        if self.state.step != 3:
            return step(self)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                return step(self)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                # the mode's own notice, that it is a prototype, speaks of synchronizing operations too
                waits.extend(str(w.message) for w in caught if "called a synchronizing" in str(w.message))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer._Trainer, "_step", watched)
        trained(small, tmp_path / "run", max_train_steps=5, gradient_accumulation_steps=2, mixed_precision="bf16")
    assert len(waits) == 1, waits


def test_drawing_judging_and_the_report(small, tmp_path):
    file = small(tmp_path, train={"cpu": False, "mixed_precision": "bf16"})
    assert main(["train", str(file)]) == 0 and main(["evaluate", str(file)]) == 0
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize("checkpointing, most", [(False, 20), ("selective", 20), (True, 9)])
def test_a_full_size_pair(checkpointing, most):
    """SDXL at 1024x1024, LoRA r64, bfloat16: below what was promised, and the activations as planned within 15 %."""
    def built(device):
        denoiser = on_meta("sdxl", SDXL_UNET, SDXL_SCHEDULER, dtype=torch.bfloat16)
        narrow_norms(denoiser)
        if device != "meta":
            denoiser.module.to_empty(device=device)
            for p in denoiser.module.parameters():
                torch.nn.init.normal_(p, std=0.02)
        with torch.device(device):
            bank = WeightBank.build(denoiser, LoRA(rank=64), reads=("policy",), seed=0, forward_dtype=torch.bfloat16)
        denoiser.module.train()
        if checkpointing:
            enable_gradient_checkpointing(denoiser, selective=checkpointing == "selective")
        return denoiser, bank

    denoiser, bank = built("cuda")
    optimizer = torch.optim.AdamW(bank.trainable().values(), fused=True)
    xt, t, cond = inputs(denoiser, 2, 128, 128, device="cuda")

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            raw = bank.predict("policy", torch.randn_like(xt), t, cond)
        raw.float().square().mean().backward()
        optimizer.step()

    step()  # moments and gradients are there afterwards, as when gradients are accumulated
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    peak = torch.cuda.max_memory_allocated()
    assert peak < most * GIB
    planned = peak_bytes(built("meta")[0], 2, 128, 128, dtype=torch.bfloat16)
    assert peak - held == pytest.approx(planned, rel=0.15)
