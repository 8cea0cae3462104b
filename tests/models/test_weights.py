"""The weight bank: policy, reference, gradients, state."""

from __future__ import annotations

import copy
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffalign.errors import CheckpointError, ConfigError
from diffalign.models import LoRA, WeightBank, enable_gradient_checkpointing
from diffalign.models.lora import adapters_off

from . import tiny

FAMILIES = ["sd", "sdxl", "sd3"]
BOTH = ("policy", "reference")


def predict(bank, name, inputs, autocast=None):
    """Without gradients, in an autocast context of its own: autocast keeps the casts of weights until its end."""
    with torch.no_grad(), torch.autocast("cpu", autocast, enabled=autocast is not None):
        return bank.predict(name, *inputs)


RANK_4 = LoRA(rank=4)


def bank_of(folder, lora=RANK_4, *, reads=BOTH, seed=0, dtype=torch.float32, **options) -> WeightBank:
    denoiser = tiny.load_denoiser(tiny.spec(folder), dtype=dtype)
    return WeightBank.build(denoiser, lora, reads=reads, seed=seed, **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_reference_is_the_base_bit_for_bit(folders, family, dtype):
    base = tiny.load_denoiser(tiny.spec(folders(family)), dtype=dtype)
    bank = bank_of(folders(family), dtype=dtype)
    inputs, autocast = tiny.random_input(base), None if dtype == torch.float32 else dtype
    with torch.no_grad(), torch.autocast("cpu", autocast, enabled=autocast is not None):
        expected = base(*inputs)
    assert torch.equal(predict(bank, "reference", inputs, autocast), expected)
    assert torch.equal(predict(bank, "policy", inputs, autocast), expected)     # B is zero: log-ratio 0 at the start
    tiny.perturb(bank.trainable().values())
    assert torch.equal(predict(bank, "reference", inputs, autocast), expected)
    assert not torch.equal(predict(bank, "policy", inputs, autocast), expected)
    assert bank.identity == f"adapter_off:{base.identity[:12]}" and len(base.identity) == 64


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_full_reference_is_a_frozen_copy(folders, family, autocast):
    bank = bank_of(folders(family), None, forward_dtype=autocast or torch.float32)
    inputs = tiny.random_input(bank.denoiser)
    start = predict(bank, "policy", inputs, autocast)
    assert torch.equal(predict(bank, "reference", inputs, autocast), start)
    tiny.perturb(bank.trainable().values(), scale=0.02)
    assert torch.equal(predict(bank, "reference", inputs, autocast), start)
    assert not torch.equal(predict(bank, "policy", inputs, autocast), start)
    if autocast is not None:   # and it is really stored in half the bytes
        assert sum(p.dtype == torch.bfloat16 for p in bank._frozen.parameters()) > 10
    assert bank.identity.startswith("frozen:")


def test_reference_free_keeps_no_copy(folders):
    bank = bank_of(folders("sd"), None, reads=("policy",))
    assert bank.identity == "none" and bank._frozen is None
    with pytest.raises(KeyError, match="'reference'.*policy"):
        bank.predict("reference", *tiny.random_input(bank.denoiser))
    with pytest.raises(KeyError, match="past"):
        bank_of(folders("sd"), reads=("policy", "past"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trainable_is_float32_sorted_and_only_the_adapter(folders, dtype):
    bank = bank_of(folders("sdxl"), dtype=dtype)
    names = list(bank.trainable())
    assert names == sorted(names) and all(".policy." in name for name in names)
    assert {p.dtype for p in bank.trainable().values()} == {torch.float32}
    trained = {name for name, p in bank.denoiser.module.named_parameters() if p.requires_grad}
    assert trained == set(names)
    assert {p.dtype for n, p in bank.denoiser.module.named_parameters() if n not in trained} == {dtype}


def test_half_precision_full_training_is_refused(folders):
    with pytest.raises(ValueError, match="float32"):
        bank_of(folders("sd"), None, dtype=torch.bfloat16)


def test_initialisation_depends_on_the_seed_alone(folders):
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    one = bank_of(folders("sd"), seed=7).state()
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(4)
    two, three = bank_of(folders("sd"), seed=7).state(), bank_of(folders("sd"), seed=8).state()
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert any(not torch.equal(one[n], three[n]) for n in one)
    assert all(not x.any() for n, x in one.items() if "lora_B" in n)


def gradients(bank, *, checkpointing: bool | str) -> dict:
    if checkpointing:
        enable_gradient_checkpointing(bank.denoiser, selective=checkpointing == "selective")
    inputs = tiny.random_input(bank.denoiser)
    reference = bank.predict("reference", *inputs)
    assert not reference.requires_grad
    loss = (bank.predict("policy", *inputs) - 0.3 * reference).square().mean()
    loss.backward()
    return {name: p.grad for name, p in bank.trainable().items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [RANK_4, None])
def test_gradients_do_not_depend_on_checkpointing(folders, family, lora):
    """After a reference pass, in train mode: what recomputation must not see is the adapter switched off."""
    results = []
    for checkpointing in (False, True, "selective"):
        bank = bank_of(folders(family), lora)
        tiny.perturb(bank.trainable().values(), scale=0.02)
        bank.denoiser.module.train()
        results.append(gradients(bank, checkpointing=checkpointing))
    plain, *others = results
    for name, gradient in plain.items():
        assert gradient.abs().sum() > 0, name    # every trained weight has an effect
        for recomputed in others:
            torch.testing.assert_close(recomputed[name], gradient, atol=1e-6, rtol=1e-5)


def test_selective_checkpointing_runs_no_convolution_and_no_attention_again(folders):
    counts = []
    for checkpointing in (False, "selective", True):
        bank = bank_of(folders("sd"))
        bank.denoiser.module.train()
        with Calls() as calls:
            gradients(bank, checkpointing=checkpointing)
        counts.append([calls.of[name] for name in ("convolution", "_scaled_dot_product_flash_attention_for_cpu",
                                                   "native_group_norm")])
    plain, selective, whole = counts
    assert selective[:2] == plain[:2] and selective[2] > plain[2]
    assert whole[0] > plain[0] and whole[1] > plain[1]


class Calls(TorchDispatchMode):
    """How often each operation ran, by its name."""

    def __init__(self):
        super().__init__()
        self.of = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.of[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def test_selective_checkpointing_is_refused_where_a_model_has_none():
    class Sealed(torch.nn.Module):
        def enable_gradient_checkpointing(self):
            pass

    with pytest.raises(ConfigError, match="train.gradient_checkpointing: Sealed knows true and false only"):
        enable_gradient_checkpointing(SimpleNamespace(module=Sealed()), selective=True)


def test_adapters_are_on_again_after_an_exception(folders):
    bank = bank_of(folders("sd"))
    tiny.perturb(bank.trainable().values())
    xt, t, cond = tiny.random_input(bank.denoiser)
    with torch.no_grad():
        policy = bank.predict("policy", xt, t, cond)
        with pytest.raises(RuntimeError):
            bank.predict("reference", xt[:, :3], t, cond)   # a channel short
        assert torch.equal(bank.predict("policy", xt, t, cond), policy)
    assert all(p.requires_grad for p in bank.trainable().values())


def test_adapters_are_off_by_peft_s_own_word_and_nothing_else_changes(folders):
    """The flag that ``adapters_off`` sets is private to peft; its public property must say the same."""
    bank = bank_of(folders("sd"))
    assert bank._adapters and not any(layer.disable_adapters for layer in bank._adapters)
    with adapters_off(bank._adapters):
        assert all(layer.disable_adapters for layer in bank._adapters)
        assert all(p.requires_grad for p in bank.trainable().values())
    assert not any(layer.disable_adapters for layer in bank._adapters)


def test_dropout_makes_no_difference(folders):
    """A checkpoint with dropout in its configuration, in train mode: policy and reference still agree."""
    denoiser = tiny.load_denoiser(tiny.spec(folders("sd")))
    for module in denoiser.module.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    bank = WeightBank.build(denoiser, LoRA(rank=2), reads=BOTH, seed=0)
    inputs = tiny.random_input(denoiser)
    denoiser.module.train()
    with torch.no_grad():
        assert torch.equal(bank.predict("policy", *inputs), bank.predict("reference", *inputs))


def test_state_round_trip_and_refusals(folders):
    bank, other = bank_of(folders("sd")), bank_of(folders("sd"), seed=5)
    tiny.perturb(bank.trainable().values())
    state = {name: x.clone() for name, x in bank.state().items()}
    assert all(name.startswith("policy/") for name in state)
    other.load_state(state)
    assert all(torch.equal(x, state[name]) for name, x in other.state().items())
    first = sorted(state)[0]
    with pytest.raises(CheckpointError, match=first):
        other.load_state({n: x for n, x in state.items() if n != first})
    with pytest.raises(CheckpointError, match="rank"):
        bank_of(folders("sd"), LoRA(rank=2)).load_state(state)
    assert all(torch.equal(x, state[name]) for name, x in other.state().items())   # a refusal changes nothing


def test_lora_targets_that_match_nothing(folders):
    with pytest.raises(ConfigError, match="model.lora.target_modules.*to_kk"):
        bank_of(folders("sd"), LoRA(target_modules=("to_kk",)))


def test_distributed_wrapper(folders, tmp_path):
    """One gloo process: the policy goes through DDP, the reference past it, gradients arrive, names are the same."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    plain = bank_of(folders("sd"))
    bank = bank_of(folders("sd"))
    names, expected = list(bank.trainable()), gradients(plain, checkpointing=False)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        bank.denoiser.module = DistributedDataParallel(bank.denoiser.module)
        found = gradients(bank, checkpointing=True)
    finally:
        dist.destroy_process_group()
    assert list(bank.trainable()) == names
    for name in names:
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-5)


def test_only_the_policy_goes_through_a_wrapper(folders):
    """DDP would wait for other ranks, and prepare for a backward pass that a reference never has."""
    class Wrapper(torch.nn.Module):
        calls = 0

        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            self.calls += 1
            return self.module(*args, **kwargs)

    for lora in (RANK_4, None):
        bank = bank_of(folders("sd"), lora)
        bank.denoiser.module = wrapper = Wrapper(bank.denoiser.module)
        inputs = tiny.random_input(bank.denoiser)
        predict(bank, "reference", inputs)
        assert wrapper.calls == 0
        predict(bank, "policy", inputs)
        assert wrapper.calls == 1


def test_weights_without_effect_are_not_trained(folders):
    """SD3's last block drops its text stream: what its text queries compute never reaches the output."""
    idle = "transformer_blocks.1.attn.add_q_proj"
    for lora in (RANK_4, None):
        bank = bank_of(folders("sd3"), lora)
        assert not any(name.startswith(idle) for name in bank.trainable())
        inputs = tiny.random_input(bank.denoiser)
        before = predict(bank, "policy", inputs)
        tiny.perturb(bank.denoiser.module.get_submodule(idle).parameters(), scale=1.0)
        assert torch.equal(predict(bank, "policy", inputs), before)
        assert any(name.startswith("transformer_blocks.1.attn.add_k_proj") for name in bank.trainable())


@pytest.mark.parametrize("family", FAMILIES)
def test_full_training_moves_every_weight_and_saves(folders, tmp_path, family):
    bank = bank_of(folders(family), None)
    before = copy.deepcopy(bank.state())
    gradients(bank, checkpointing=False)
    torch.optim.SGD(bank.trainable().values(), lr=1.0).step()
    assert [name for name, x in bank.state().items() if torch.equal(x, before[name])] == []
    bank.save(tmp_path, {})
    assert (tmp_path / bank.denoiser.component / "diffusion_pytorch_model.safetensors").is_file()
