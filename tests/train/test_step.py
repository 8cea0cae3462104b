"""One step: gradient = sum over groups / global count, clipping, precision, the self-checks, the guard."""

import math
from dataclasses import replace

import pytest
import torch

from diffalign.errors import ConfigError
from diffalign.likelihood import DenoisingELBO
from diffalign.methods import Preference
from diffalign.objectives import KTO, MaPO, Pairwise, Regularized
from diffalign.objectives.links import Squared
from diffalign.train import TrainingError, make_accelerator, optim

from . import toy

SPLITS = [(12,), (6, 6), (5, 4, 3), (11, 1), (1,) * 12]
METHODS = {"dpo": toy.method(), "mapo": Preference(DenoisingELBO(), MaPO()),
           "regularized": Preference(DenoisingELBO(), Regularized(objective=Pairwise(beta=2000.0), sft=0.5))}


class Grab:
    """Keeps the gradients and the report of the last step."""

    def __init__(self, bank):
        self.bank = bank

    def after_step(self, state, report):
        self.grads = {name: p.grad.clone() for name, p in self.bank.trainable().items()}
        self.report = dict(report)


def gradient(folder, splits, method, **options):
    bank = toy.Bank()
    grab = Grab(bank)
    source = toy.Source(splits, invalid=options.pop("invalid", ()), poison=options.pop("poison", None))
    toy.train(folder, bank=bank, source=source, method=method, hooks=[grab],
              **{"max_train_steps": 1, "train_batch_size": 12, "max_grad_norm": 1e9, "adam_weight_decay": 0.5, **options})
    return grab


def apart(a, b):
    """Relative difference of two gradients."""
    a, b = (torch.cat([g.flatten() for g in x.grads.values()]) for x in (a, b))
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("name", METHODS)
def test_splits_give_the_same_gradient(tmp_path, name):
    whole = gradient(tmp_path / "whole", (12,), METHODS[name])
    for splits in SPLITS[1:]:
        part = gradient(tmp_path / str(splits), splits, METHODS[name])
        # MaPO multiplies a difference of two numbers near 1 by 1000, and with it the float32 rounding of the forward pass
        assert apart(part, whole) < (1e-5 if name == "mapo" else 1e-6), splits
        assert part.report["loss"][0] == pytest.approx(whole.report["loss"][0], rel=1e-6)
        assert part.report["accuracy"] == pytest.approx(whole.report["accuracy"])


class MeanOfMeans:
    """The mutant: each micro-batch is averaged, then the micro-batches."""

    reads = ("policy", "reference")

    def __init__(self, micros, total):
        self.micros, self.total = micros, total

    def loss(self, batch, ctx):
        loss = toy.method().loss(batch, ctx)
        return replace(loss, per_group=loss.per_group * self.total / (self.micros * batch.groups))


def test_mean_of_means_would_be_caught(tmp_path):
    whole = gradient(tmp_path / "whole", (12,), toy.method())
    mutant = gradient(tmp_path / "mutant", (11, 1), MeanOfMeans(2, 12))
    assert apart(mutant, whole) > 0.1


def test_gradient_is_the_textbook_one(tmp_path):
    """d/dw of mean over 12 pairs, by autograd on one batch without the loop."""
    grab = gradient(tmp_path, (12,), toy.method())
    bank, batch = toy.Bank(), toy.Source((12,)).take(0)[0]
    from diffalign.methods import Context
    from diffalign.types import Memory
    ctx = Context(predict=bank.predict, process=bank.denoiser.process, param=bank.denoiser.param, seed=3, step=0,
                  memory=Memory())
    toy.method().loss(batch, ctx).per_group.mean().backward()
    for name, p in bank.trainable().items():
        torch.testing.assert_close(grab.grads[name], p.grad, rtol=1e-5, atol=1e-7)


def test_groups_without_candidates_do_not_count(tmp_path):
    """Rows 8..11 are padding: sum over 8 groups / 8, whatever the padding holds."""
    def louder(batch, step):
        x0 = torch.where(batch.valid[:, :, None, None, None], batch.x0, 9 * batch.x0)
        return replace(batch, x0=x0)

    padded = gradient(tmp_path / "a", (12,), toy.method(), invalid=range(8, 12), poison=louder)
    alone = gradient(tmp_path / "b", (8,), toy.method(), train_batch_size=8)
    assert padded.report["loss"][1] == 8
    assert apart(padded, alone) < 1e-6


def test_all_groups_invalid_is_harmless(tmp_path):
    bank = toy.Bank()
    seen = Grab(bank)
    with pytest.raises(TrainingError, match="no gradient"):  # nothing moved: the third update says so
        toy.train(tmp_path, bank=bank, source=toy.Source((4,), invalid=range(400)), hooks=[seen])
    assert all(not p.grad.any() for p in bank.trainable().values())
    assert seen.report["loss"] == (0.0, 0.0)


def test_clipping_clips(tmp_path):
    free = gradient(tmp_path / "free", (12,), toy.method())
    tight = gradient(tmp_path / "tight", (12,), toy.method(), max_grad_norm=0.25)
    recount = math.sqrt(sum(g.double().square().sum().item() for g in free.grads.values()))
    assert tight.report["grad_norm"][0] == pytest.approx(recount, rel=1e-5)
    assert math.sqrt(sum(g.double().square().sum().item() for g in tight.grads.values())) == pytest.approx(0.25, rel=1e-4)
    assert tight.report["clipped"] == (1.0, 1.0) and free.report["clipped"] == (0.0, 1.0)


def test_first_loss_is_ln_2(tmp_path, capsys):
    _, summary = toy.train(tmp_path, progress=True, max_train_steps=3)
    assert summary.initial_loss == pytest.approx(math.log(2), abs=1e-6)
    said = capsys.readouterr().err
    assert "initial loss 0.6931" in said and "1,300 parameters in 8 tensors" in said and "4 pairs a step" in said


def test_a_first_loss_of_any_size_is_read(tmp_path, capsys):
    """IPO in its paper's unit begins at (1 / 2 beta)^2, 6.25e-08 at beta 2000."""
    ipo = Preference(DenoisingELBO(), Pairwise(beta=2000.0, link=Squared()))
    toy.train(tmp_path, method=ipo, progress=True, max_train_steps=3)
    assert "initial loss 6.25e-08 " in capsys.readouterr().err


def test_another_reference_is_refused(tmp_path):
    with pytest.raises(TrainingError, match="'reference' predictions differ from the policy's by 0.29"):
        toy.train(tmp_path, bank=toy.Bank(broken="reference"))


def test_a_cut_off_tensor_is_refused(tmp_path):
    class Cut(toy.Toy):
        def run(self, module, xt, t, cond):
            return module.leave(torch.tanh(module.enter(xt) + module.text(cond.tokens.mean(1))[:, :, None, None]))

    bank = toy.Bank()
    bank.denoiser.__class__ = Cut
    with pytest.raises(TrainingError, match=r"step 3: 2 of 8 trainable tensors get no gradient \(time.bias, time.weight\)"):
        toy.train(tmp_path, bank=bank)


def test_weights_too_large_to_move_are_refused_only_after_the_warm_up(tmp_path):
    bank = toy.Bank()
    bank.module.enter.weight.data += 1e4  # 1e4 + 1e-4 is 1e4 in float32
    bank.frozen.enter.weight.data += 1e4
    with pytest.raises(TrainingError, match="trainable tensors"):
        toy.train(tmp_path / "a", bank=bank, learning_rate=1e-4, adam_weight_decay=0.0)
    # a warm-up of 8 steps to 1e-7 starts below what float32 sees in weights near 1; that alone is no fault
    bank = toy.Bank()
    for module in (bank.module, bank.frozen):
        module.leave.bias.data.fill_(1.0)
    toy.train(tmp_path / "b", bank=bank, learning_rate=4e-7, lr_warmup_steps=8, adam_weight_decay=0.0)


NAN, INF = float("nan"), float("inf")
SITES = [("x0", NAN), ("x0", INF), ("x0", -INF), ("tokens", NAN), ("loss", NAN), ("loss", INF), ("loss", -INF),
         ("gradient", NAN), ("gradient", INF), ("gradient", -INF)]


class Poisoned:
    """Breaks group 1 of step 3 in its loss, or all gradients of that step."""

    reads = ("policy", "reference")

    def __init__(self, place, value):
        self.place, self.value = place, value

    def loss(self, batch, ctx):
        loss = toy.method().loss(batch, ctx)
        if ctx.step == 2 and self.place == "gradient":
            loss.per_group.register_hook(lambda g: g * self.value)
        if ctx.step == 2 and self.place == "loss":
            return replace(loss, per_group=loss.per_group.index_add(0, torch.tensor([1]), torch.tensor([self.value])))
        return loss


@pytest.mark.parametrize("place, value", SITES)
def test_non_finite_never_reaches_the_weights(tmp_path, place, value):
    def poison(batch, step):
        if step == 2 and place == "x0":
            batch.x0[1, 0, 0, 0, 0] = value
        if step == 2 and place == "tokens":
            batch.cond.tokens[1] = value
        return batch

    bank, kept = toy.Bank(), {}

    class Keep:
        def after_step(self, state, report):
            kept.update({name: p.detach().clone() for name, p in bank.trainable().items()}, step=state.step)

    with pytest.raises(TrainingError, match=r"^step 3: .* row 9 visit 0 t=0\.\d+") as caught:
        toy.train(tmp_path, bank=bank, source=toy.Source((4,), poison=poison), method=Poisoned(place, value), hooks=[Keep()])
    assert ("row 8" in str(caught.value)) == (place == "gradient")  # a bad gradient has no row of its own: all are listed
    assert kept.pop("step") == 2
    for name, p in bank.trainable().items():
        assert torch.equal(p, kept[name])


def test_bfloat16_moves_float32_weights(tmp_path):
    bank, summary = toy.train(tmp_path, mixed_precision="bf16", max_train_steps=5)
    start = toy.Bank()
    for name, p in bank.trainable().items():
        assert p.dtype == torch.float32 and not torch.equal(p, start.trainable()[name]), name
    assert summary.initial_loss == pytest.approx(math.log(2), abs=1e-6)  # both sets round alike
    assert bank.denoiser.module is bank.module  # the caller gets its plain module back


def test_autocast_is_on_for_both_sets(tmp_path):
    seen = set()

    class Watch(toy.Toy):
        def run(self, module, xt, t, cond):
            seen.add((module is not self.module, torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu"),
                      xt.dtype, t.dtype))
            return module(xt, t, cond.tokens)

    bank = toy.Bank()
    bank.denoiser.__class__ = Watch
    toy.train(tmp_path, bank=bank, mixed_precision="bf16", max_train_steps=3)
    assert seen == {(other, torch.bfloat16, True, torch.float32, torch.float32) for other in (True, False)}


def test_fp16_on_cpu_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="train.mixed_precision: fp16 needs a CUDA device"):
        toy.train(tmp_path, mixed_precision="fp16")


def test_a_fused_step_that_overflowed_is_no_update(tmp_path, monkeypatch):
    """CUDA's AdamW is fused and skips by itself, which accelerate takes for a step: three of them looked like weights that
    stand still, and ended the run. The scale of 2^126 gives infinite gradients until a few sixteenths of it are left."""
    accelerator = make_accelerator(toy.spec(), tmp_path)
    monkeypatch.setattr(accelerator, "scaler", torch.amp.GradScaler("cpu", init_scale=2.0**126, backoff_factor=2.0**-4))
    monkeypatch.setattr(accelerator, "native_amp", True)
    monkeypatch.setattr(accelerator.state, "_mixed_precision", "fp16")
    monkeypatch.setitem(optim.OPTIMIZERS, "adamw", lambda params, spec: torch.optim.AdamW(params, lr=1e-3, fused=True))
    clean = []

    class Count:
        def after_step(self, state, report):
            clean.append(state.updates)
    toy.train(tmp_path, accelerator=accelerator, max_train_steps=40, hooks=[Count()])
    assert clean[5] == 0 and 0 < clean[-1] < 35 and clean == sorted(clean)


def test_low_precision_weights_are_refused(tmp_path):
    bank = toy.Bank()
    bank.module.to(torch.bfloat16)
    with pytest.raises(ValueError, match="must be float32"):
        toy.train(tmp_path, bank=bank)


def test_out_of_memory_names_the_remedies(tmp_path):
    from diffalign.errors import ResourceError

    class Hungry:
        reads = ("policy",)

        def loss(self, batch, ctx):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(ResourceError, match="train.train_batch_size=4.*gradient_checkpointing=true.*data.resolution"):
        toy.train(tmp_path, method=Hungry())


def test_a_passed_accelerator_is_used_and_must_not_accumulate(tmp_path):
    accelerator = make_accelerator(toy.spec(), tmp_path)
    toy.train(tmp_path, accelerator=accelerator, max_train_steps=3)
    accelerator.gradient_accumulation_steps = 2
    with pytest.raises(ValueError, match="must not accumulate"):
        toy.train(tmp_path / "b", accelerator=accelerator)
    accelerator.gradient_accumulation_steps = 1


def test_the_same_run_twice_writes_the_same_bytes(tmp_path):
    for name in "ab":
        toy.train(tmp_path / name, max_train_steps=20, ema_decay=0.9)
    a, b = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in "ab")
    assert a == b and a.count(b"\n") == 4


def test_prefetching_changes_nothing(tmp_path):
    """Every step is taken once, that of the look before the first step too: an online source draws it."""
    for name, workers in (("a", 0), ("b", 1)):
        source = toy.Source()
        toy.train(tmp_path / name, source=source, max_train_steps=6, dataloader_num_workers=workers)
        assert source.taken == list(range(6))
    a, b = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in "ab")
    assert a == b


@pytest.mark.parametrize("renewed, baselines", [((), [0, 1, 2, 3]), ((1,), [0, 1, 0, 3])])
def test_running_means_end_with_their_reference(tmp_path, renewed, baselines):
    """KTO's baseline against the old reference is no baseline against a new one. baselines: 0 where it starts from nothing."""
    class Moves(toy.Bank):
        renewed = False

        def advance(self, step):
            self.renewed = step in now

    class Baselines(Preference):
        def loss(self, batch, ctx):
            seen.append(ctx.memory.read("kto_gain", default=None))
            return super().loss(batch, ctx)

    now, seen = renewed, []
    toy.train(tmp_path, bank=Moves(), method=Baselines(DenoisingELBO(), KTO(beta=100)), max_train_steps=4)
    assert [0 if value is None else step for step, value in enumerate(seen[-4:])] == baselines
