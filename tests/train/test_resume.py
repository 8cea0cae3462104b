"""A resumed run is the uncut run, to the bit; another run's checkpoint is refused, by name."""

import json
import random
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from diffalign.errors import CheckpointError
from diffalign.train import Preempted
from diffalign.train.checkpoint import checkpoints, load

from . import toy

STEPS = 10
OPTIONS = {"max_train_steps": STEPS, "ema_decay": 0.9, "logging_steps": 4, "checkpointing_steps": 1,
           "lr_scheduler": "cosine", "lr_warmup_steps": 2, "validation_steps": 3}


class Remembering:
    """A method with a running mean that changes its loss, so that a forgotten memory shows."""

    reads = ("policy", "reference")

    def loss(self, batch, ctx):
        loss = toy.method().loss(batch, ctx)
        seen = {"loss": (loss.per_group.detach().sum(), torch.tensor(float(batch.groups)))}
        return replace(loss, per_group=loss.per_group * (1 + ctx.memory.read("loss")), observed=seen)


class StopAt:
    """Asks the run to stop after a step, as a signal would."""

    def __init__(self, step):
        self.step = step

    def after_step(self, state, report):
        if state.step == self.step:
            import os
            import signal
            os.kill(os.getpid(), signal.SIGTERM)


def scramble():
    """Whatever a library may do to the global generators."""
    torch.manual_seed(random.randrange(2**31))
    np.random.seed(random.randrange(2**31))
    torch.rand(random.randrange(50))


def validate(bank, step):
    return {"size": sum(p.square().sum().item() for p in bank.trainable().values())}


def run(folder, source=None, **options):
    scramble()
    source = source or toy.Source((2, 2))
    return toy.train(folder, source=source, method=Remembering(), validation=validate, **{**OPTIONS, **options}), source


def contents(folder, step=STEPS):
    """Everything a checkpoint holds, without the wall clock."""
    stored = load(folder / f"checkpoint-{step}")
    stored.state.pop("seconds")
    return stored


def assert_same(a, b):
    assert a.state == b.state
    assert a.tensors.keys() == b.tensors.keys() == {"weights", "optimizer", "ema"}
    for group in a.tensors:
        assert a.tensors[group].keys() == b.tensors[group].keys()
        for name, tensor in a.tensors[group].items():
            assert torch.equal(tensor, b.tensors[group][name]), name


@pytest.fixture(scope="module")
def uncut(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uncut")
    (_, summary), _ = run(folder)
    return folder, contents(folder), (folder / "metrics.jsonl").read_text(), summary


@pytest.mark.parametrize("cut", range(1, STEPS))
def test_resume_is_bit_equal_at_every_step(tmp_path, uncut, cut):
    folder = tmp_path / "run"
    stop = StopAt(cut - 1)  # the signal is seen by the step after it
    if cut > 1:
        with pytest.raises(Preempted, match=f"checkpoint-{cut} is saved: resume by running the same command again"):
            run_with(folder, stop)
    else:
        run_killed_at(folder, 1)
    (bank, summary), source = run(folder)
    assert source.taken == list(range(cut, STEPS))  # the data go on where they stopped
    assert_same(contents(folder), uncut[1])
    assert (folder / "metrics.jsonl").read_text() == uncut[2]
    assert replace(summary, seconds=0) == replace(uncut[3], seconds=0)


def run_with(folder, hook):
    scramble()
    return toy.train(folder, source=toy.Source((2, 2)), method=Remembering(), validation=validate, hooks=[hook], **OPTIONS)


def run_killed_at(folder, step, **options):
    """An exception after step ``step`` (and its checkpoint, where there is one), before the next one ends."""
    class Crash(Remembering):
        def loss(self, batch, ctx):
            if ctx.step == step:
                raise KeyboardInterrupt
            return super().loss(batch, ctx)

    with pytest.raises(KeyboardInterrupt):
        toy.train(folder, source=toy.Source((2, 2)), method=Crash(), validation=validate, **{**OPTIONS, **options})


def test_a_crash_between_checkpoints_drops_the_log_lines_after_it(tmp_path, uncut):
    folder = tmp_path / "run"
    run_killed_at(folder, 5, checkpointing_steps=3)
    lines = (folder / "metrics.jsonl").read_text()
    assert '"step": 4' in lines and [path.name for path in checkpoints(folder)] == ["checkpoint-3"]
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "torn')
    run(folder, checkpointing_steps=3)
    assert (folder / "metrics.jsonl").read_text() == uncut[2]


def test_a_crash_before_the_first_checkpoint_leaves_no_lines(tmp_path, uncut):
    """Step 0 has been validated before, and is validated again."""
    folder = tmp_path / "run"
    run_killed_at(folder, 5, checkpointing_steps=STEPS)
    assert '"step": 0' in (folder / "metrics.jsonl").read_text() and not checkpoints(folder)
    run(folder, checkpointing_steps=STEPS)
    assert (folder / "metrics.jsonl").read_text() == uncut[2]


def test_another_split_of_the_same_batch_may_resume(tmp_path):
    toy.train(tmp_path, max_train_steps=5)
    _, summary = toy.train(tmp_path, max_train_steps=10, train_batch_size=1, gradient_accumulation_steps=4)
    assert summary.step == 10 and summary.initial_loss == pytest.approx(np.log(2), abs=1e-6)


def test_a_longer_run_of_a_constant_schedule_equals_the_uncut_one(tmp_path):
    """5 steps, then the same recipe with 10: the partial log line of the short run is dropped again."""
    toy.train(tmp_path / "a", max_train_steps=10, logging_steps=4)
    toy.train(tmp_path / "b", max_train_steps=5, logging_steps=4)
    assert '"partial": true' in (tmp_path / "b" / "metrics.jsonl").read_text()
    toy.train(tmp_path / "b", max_train_steps=10, logging_steps=4)
    a, b = (load(tmp_path / name / "checkpoint-10") for name in "ab")
    assert all(torch.equal(a.tensors["weights"][name], b.tensors["weights"][name]) for name in a.tensors["weights"])
    assert (tmp_path / "a" / "metrics.jsonl").read_text() == (tmp_path / "b" / "metrics.jsonl").read_text()


def test_a_finished_run_stays_finished(tmp_path):
    bank, first = toy.train(tmp_path, ema_decay=0.9, validation=validate)
    lines = (tmp_path / "metrics.jsonl").read_text()
    source = toy.Source((4,))
    again, second = toy.train(tmp_path, ema_decay=0.9, validation=validate, source=source)
    assert source.taken == [] and second.step == first.step == 10
    assert (tmp_path / "metrics.jsonl").read_text() == lines
    assert replace(second, seconds=0) == replace(first, seconds=0) and first.metrics and first.initial_loss
    for name, p in again.trainable().items():
        assert torch.equal(p, bank.trainable()[name])


def test_saving_changes_nothing(tmp_path):
    """A run that saves at each step equals one that saves only at its end."""
    toy.train(tmp_path / "a", checkpointing_steps=1, ema_decay=0.9)
    toy.train(tmp_path / "b", checkpointing_steps=100, ema_decay=0.9)
    a, b = (load(tmp_path / name / "checkpoint-10").tensors for name in "ab")
    assert all(torch.equal(a[group][name], b[group][name]) for group in a for name in a[group])


CHANGES = {"learning_rate": 2e-3, "optimizer": "adafactor", "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6,
           "adam_weight_decay": 0.0, "max_grad_norm": 2.0, "mixed_precision": "bf16", "lr_scheduler": "constant",
           "lr_warmup_steps": 1, "ema_decay": 0.5, "gradient_checkpointing": True}


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    folder = tmp_path_factory.mktemp("short")
    toy.train(folder, max_train_steps=4)
    return folder


def resumed(folder, tmp_path, **options):
    import shutil
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    return toy.train(copy, **{"max_train_steps": 5, **options})


@pytest.mark.parametrize("key", CHANGES)
def test_a_changed_key_is_refused_with_both_values(tmp_path, short, key):
    old, new = getattr(toy.spec(), key), CHANGES[key]
    with pytest.raises(CheckpointError) as caught:
        resumed(short, tmp_path, **{key: new})
    assert f"train.{key} was {json.dumps(old)}, now {json.dumps(new)}" in str(caught.value)


@pytest.mark.parametrize("key", ["learning_rate", "adam_weight_decay", "ema_decay"])
def test_allow_change_lets_exactly_that_key_through(tmp_path, short, key):
    _, summary = resumed(short, tmp_path, **{key: CHANGES[key], "allow_change": (f"train.{key}",)})
    assert summary.step == 5
    with pytest.raises(CheckpointError, match="train.adam_beta2 was"):
        resumed(short, tmp_path / "b", **{key: CHANGES[key], "adam_beta2": 0.9, "allow_change": (f"train.{key}",)})


@pytest.mark.parametrize("changes", [
    {"logging_steps": 2}, {"checkpointing_steps": 2}, {"checkpoints_total_limit": 3}, {"validation_steps": 1},
    {"dataloader_num_workers": 1}, {"report_to": ()}, {"max_train_steps": 6}])
def test_harmless_keys_pass(tmp_path, short, changes):
    assert resumed(short, tmp_path, **changes)[1].step == changes.get("max_train_steps", 5)


def test_max_train_steps_is_part_of_a_cosine_schedule(tmp_path):
    toy.train(tmp_path, max_train_steps=4, lr_scheduler="cosine")
    with pytest.raises(CheckpointError, match="train.max_train_steps was 4, now 6"):
        toy.train(tmp_path, max_train_steps=6, lr_scheduler="cosine")


def test_another_batch_is_refused(tmp_path, short):
    with pytest.raises(CheckpointError, match="train.train_batch_size was 4, now 8.*groups a step was 4, now 8"):
        resumed(short, tmp_path, train_batch_size=8)


def test_a_nested_key_and_a_new_key_are_named(tmp_path, short):
    train = toy.spec(max_train_steps=5)
    config = toy.recipe(train, objective={"beta": 5000.0, "link": {"kind": "hinge"}})
    with pytest.raises(CheckpointError) as caught:
        resumed(short, tmp_path, config=config)
    assert "objective.beta was 2000.0, now 5000.0; objective.link.kind was absent, now \"hinge\"" in str(caught.value)
    resumed(short, tmp_path / "b", config=toy.recipe(train, output_dir="elsewhere", evaluate={"prompts": 3}))


def test_another_model_or_data_set_is_refused(tmp_path, short):
    with pytest.raises(CheckpointError, match='reference was "frozen:toy0", now "frozen:toy1"'):
        resumed(short, tmp_path / "a", bank=toy.Bank(seed=1))
    with pytest.raises(CheckpointError, match='data was "toy-data", now "other"'):
        resumed(short, tmp_path / "b", source=toy.Source((4,), identity="other"))
    changed = toy.recipe(toy.spec(max_train_steps=5), data={"resolution": 8})
    with pytest.raises(CheckpointError, match='data.resolution was absent, now 8; data was "toy-data", now "other"'):
        resumed(short, tmp_path / "d", source=toy.Source((4,), identity="other"), config=changed)
    with pytest.raises(CheckpointError, match='model was absent, now "sha"'):
        resumed(short, tmp_path / "c", identity={"model": "sha"})


def test_resume_never_refuses_an_old_run(tmp_path, short):
    with pytest.raises(CheckpointError, match="train.resume: .* holds checkpoints of an earlier run"):
        resumed(short, tmp_path, resume="never")


def test_a_source_with_windows_saves_only_at_boundaries(tmp_path):
    source = toy.Source((4,), boundary=lambda step: step % 6 == 0)
    toy.train(tmp_path, source=source, max_train_steps=12, checkpointing_steps=4, checkpoints_total_limit=9)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-6", "checkpoint-12"]
    with pytest.raises(Preempted, match="after step 6 of"):  # asked at step 2, saved where it is exact
        toy.train(tmp_path / "b", source=source, max_train_steps=12, hooks=[StopAt(2)])


def test_the_average_is_what_users_get(tmp_path):
    """The final files and the bank hold the average; validation saw it; the checkpoint keeps both."""
    from safetensors.torch import load_file
    seen = {}

    def look(bank, step):
        seen[step] = {name: p.detach().clone() for name, p in bank.trainable().items()}
        return {}

    bank, _ = toy.train(tmp_path, ema_decay=0.9, validation=look)
    stored = load(tmp_path / "checkpoint-10").tensors
    saved = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    in_checkpoint = load_file(tmp_path / "checkpoint-10" / "pytorch_lora_weights.safetensors")
    for name, p in bank.trainable().items():
        assert torch.equal(p, stored["ema"][name]) and torch.equal(p, saved[f"policy/{name}"])
        assert torch.equal(p, seen[10][name]) and torch.equal(p, in_checkpoint[f"policy/{name}"])
        assert not torch.equal(p, stored["weights"][f"policy/{name}"])


def test_the_recipe_is_written_beside_the_weights(tmp_path):
    toy.train(tmp_path, max_train_steps=3, metadata={"method": "dpo"})
    state = load(tmp_path / "checkpoint-3").state
    assert state["config"] == json.loads(json.dumps(toy.recipe(toy.spec(max_train_steps=3))))
    assert state["config"]["train"] == json.loads(json.dumps(asdict(toy.spec(max_train_steps=3))))
    from safetensors import safe_open
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        assert file.metadata()["method"] == "dpo" and file.metadata()["step"] == "3"
