"""What the tests of every family of sound do alike: rows of clips on disk, and a LoRA that has moved."""

import json

import numpy as np
import torch

from diffalign.data.audio import write_wav
from diffalign.data.spec import DataSpec
from diffalign.models.load import load_denoiser
from diffalign.models.spec import LoRA, ModelSpec
from diffalign.models.weights import WeightBank


def spec_of(folder, **options):
    return ModelSpec(pretrained_model_name_or_path=str(folder), **{"lora": None, **options})


def tone(samples, rate, level=0.5):
    return write_wav(level * np.sin(np.arange(samples)), rate)


def rows_of(folder, *rows):
    """rows: (chosen, rejected, further columns); the prompt is "a b" unless a column says otherwise."""
    folder.mkdir(exist_ok=True)
    lines = []
    for i, (chosen, rejected, columns) in enumerate(rows):
        (folder / f"chosen{i}.wav").write_bytes(chosen)
        (folder / f"rejected{i}.wav").write_bytes(rejected)
        lines.append({"prompt": "a b", "chosen": f"chosen{i}.wav", "rejected": f"rejected{i}.wav", **columns})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return DataSpec(path=str(folder / "pairs.jsonl"))


def pair_of(folder, chosen, rejected):
    return rows_of(folder, (chosen, rejected, {}))


def moved_lora(folder, inputs):
    """A bank whose LoRA starts as nothing, gets gradients and is then moved; and what it predicts of ``inputs`` (xt, t, cond)
    without and with it."""
    bank = WeightBank.build(load_denoiser(spec_of(folder)), LoRA(rank=2), reads=("policy", "reference"), seed=0)
    reference = bank.predict("reference", *inputs)
    assert torch.equal(bank.predict("current", *inputs), reference)
    bank.predict("policy", *inputs).sum().backward()
    assert any(p.grad.abs().sum() > 0 for p in bank.trainable().values())
    with torch.no_grad():
        for p in bank.trainable().values():
            p.add_(0.2)
    assert torch.equal(bank.predict("reference", *inputs), reference)
    ours = bank.predict("current", *inputs)
    assert not torch.allclose(ours, reference, atol=1e-3)
    return bank, ours


def read_by_peft(bank, folder, saved, inputs):
    """What a fresh model with the bank's LoRA, written to ``saved`` and read by peft, predicts."""
    from peft import PeftModel

    bank.save(saved, {})
    fresh = load_denoiser(spec_of(folder))
    fresh.module = PeftModel.from_pretrained(fresh.module, saved).base_model.model
    return fresh(*inputs)
