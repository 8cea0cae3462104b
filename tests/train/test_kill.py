"""Processes that are killed or asked to stop: what they saved continues to the bit."""

import signal
import time

import pytest
import torch

from diffalign.train.checkpoint import checkpoints, load

from .. import ranks
from . import toy

OPTIONS = {"ema_decay": 0.9, "logging_steps": 4, "checkpoints_total_limit": 9}
LIMIT = 120  # seconds; the first process of a worker waits for the libraries


def start(folder, pause, **options):
    """The toy run in a process of its own."""
    return ranks.start(toy.command, folder, pause, {**OPTIONS, **options}, said=folder.with_name(f"{folder.name}.txt"))


def wait_for(condition, process):
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def newest_name(folder):
    return [path.name for path in checkpoints(folder)][-1:]


def assert_same_end(a, b, step):
    """Weights, moments, average, memory, position and log of two runs."""
    a_end, b_end = load(a / f"checkpoint-{step}"), load(b / f"checkpoint-{step}")
    for stored in (a_end, b_end):
        stored.state.pop("seconds")
    assert a_end.state == b_end.state
    for group in ("weights", "optimizer", "ema"):
        for name, tensor in a_end.tensors[group].items():
            assert torch.equal(tensor, b_end.tensors[group][name]), name
    assert (a / "metrics.jsonl").read_text() == (b / "metrics.jsonl").read_text()


def test_ten_steps_equal_five_kill_9_and_five(tmp_path):
    options = {"checkpointing_steps": 5}
    toy.train(tmp_path / "uncut", **OPTIONS, **options)
    process = start(tmp_path / "run", pause=0.3, **options)
    try:
        # checkpoint-5 is there and the run is some way into steps 6 to 10
        wait_for(lambda: (tmp_path / "run" / "checkpoint-5").exists(), process)
        time.sleep(0.35)
        process.kill()
        process.join(LIMIT)
        assert process.exitcode == -signal.SIGKILL
    finally:
        process.kill()
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-5"]
    source = toy.Source((4,))
    toy.train(tmp_path / "run", source=source, **OPTIONS, **options)
    assert source.taken == [5, 6, 7, 8, 9]
    assert_same_end(tmp_path / "uncut", tmp_path / "run", 10)


@pytest.mark.slow
def test_kills_inside_saves_cost_nothing_completed(tmp_path):
    """C1: save at each step, kill at random moments; each restart goes on from the newest whole checkpoint."""
    steps, options = 800, {"checkpointing_steps": 1, "max_train_steps": 800, "checkpoints_total_limit": 2}
    toy.train(tmp_path / "uncut", **{**OPTIONS, **options})
    run, inside = tmp_path / "run", 0
    for kill in range(8):
        process = start(run, pause=0.0, **options)
        before = newest_name(run)
        try:
            wait_for(lambda before=before: newest_name(run) != before, process)
            time.sleep(0.05 + 0.037 * kill)
        finally:
            process.kill()
            process.join(LIMIT)
        inside += bool(list(run.glob(".checkpoint-*")))
    done = int(checkpoints(run)[-1].name.split("-")[1])
    assert 8 <= done < steps and inside  # some kills fell into a save
    source = toy.Source((4,))
    toy.train(run, source=source, **{**OPTIONS, **options})
    assert source.taken[0] == done  # no completed step is done twice
    assert_same_end(tmp_path / "uncut", run, steps)


def test_sigterm_saves_and_exits_75(tmp_path):
    toy.train(tmp_path / "uncut", max_train_steps=10, **OPTIONS)
    process = start(tmp_path / "run", pause=0.2, max_train_steps=10, checkpointing_steps=100)
    try:
        wait_for(lambda: '"step": 4' in _text(tmp_path / "run" / "metrics.jsonl"), process)
        asked = time.monotonic()
        process.terminate()
        process.join(LIMIT)
    finally:
        process.kill()
    assert process.exitcode == 75 and time.monotonic() - asked < 5
    said = (tmp_path / "run.err").read_text()
    assert "resume by running the same command again" in said and "Traceback" not in said
    saved = checkpoints(tmp_path / "run")
    assert len(saved) == 1 and 4 <= int(saved[0].name.split("-")[1]) < 10
    toy.train(tmp_path / "run", max_train_steps=10, **OPTIONS)
    assert_same_end(tmp_path / "uncut", tmp_path / "run", 10)


def test_a_second_signal_ends_at_once(tmp_path):
    process = start(tmp_path / "run", pause=3.0, max_train_steps=10)
    try:
        wait_for(lambda: (tmp_path / "run").exists() and not list((tmp_path / "run").glob(".writable*")), process)
        time.sleep(2.5)  # inside a source that takes 3 seconds a step
        process.terminate()
        time.sleep(0.2)
        process.terminate()
        process.join(2)
        assert process.exitcode == -signal.SIGTERM
    finally:
        process.kill()


def _text(path):
    return path.read_text() if path.exists() else ""
