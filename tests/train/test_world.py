"""Two processes equal one; what happens to one rank happens to all. One pair of processes serves all tests."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from diffalign.errors import DataError, UserError
from diffalign.train.checkpoint import checkpoints, load
from diffalign.train.guard import check_same_weights
from diffalign.world import Distributed, Single, left_in_order, on_first, raise_together, together

from . import gloo, toy

ROOT, LIMIT = Path(__file__).parents[2], 280  # seconds, on a machine that others use too
# 12 pairs = 2 ranks x 2 micro-batches x 3
ONE = {"max_train_steps": 20, "train_batch_size": 12, "logging_steps": 5, "learning_rate": 1e-4}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Runs both ranks, with a limit, and kills them whatever happens."""
    folder = tmp_path_factory.mktemp("gloo")
    toy.train(folder / "one", source=toy.Source((12,)), ema_decay=0.9, **ONE)
    toy.train(folder / "one-empty", source=toy.Source((12,), invalid=gloo.empty_rows()), **ONE)
    toy.train(folder / "handed-over", source=toy.Source((12,)), **{**ONE, "max_train_steps": 10})
    command = [sys.executable, "-m", "tests.train.gloo", str(folder)]
    ranks = [subprocess.Popen([*command, str(rank)], cwd=ROOT, stderr=subprocess.PIPE, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"}) for rank in range(2)]
    deadline, ended = time.monotonic() + LIMIT, []
    try:
        said = []
        for process in sorted(ranks, key=lambda p: p is ranks[0]):  # rank 1 fails first
            said.insert(0, process.communicate(timeout=max(1, deadline - time.monotonic()))[1])
            ended.append(time.monotonic())
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert all((folder / f"result-{rank}.json").exists() for rank in range(2)), said
    results = [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(2)]
    return {"folder": folder, "results": results, "said": said, "codes": [p.returncode for p in ranks],
            "apart": ended[1] - ended[0]}


def apart(a, b, group="weights"):
    """Relative difference of two checkpoints' tensors, all taken together."""
    a, b = (load(checkpoints(x)[-1]).tensors[group] for x in (a, b))
    a, b = (torch.cat([x[name].flatten() for name in sorted(b)]) for x in (a, b))
    return ((a - b).norm() / b.norm()).item()


def log(folder):
    """The log lines of training. AdamW hides a wrong scale of the gradient; its norm in the log does not."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def assert_same_log(two, one):
    two, one = log(two), log(one)
    assert [line["step"] for line in two] == [line["step"] for line in one] == [5, 10, 15, 20]
    for a, b in zip(two, one):
        for name in b:
            # a logit is 2000 times a difference of two errors near 1, each with float32's 1e-7; the others follow it
            assert a[name] == pytest.approx(b[name], rel=2e-4, abs=5e-4 if name == "logit" else 1e-6), name


def test_the_world_sums_and_gathers(pair):
    for rank, result in enumerate(pair["results"]):
        assert result["world"] == [rank, 2, ["from 0 é", "from 1 é"], 3.0]


def test_two_processes_equal_one(pair):
    folder = pair["folder"]
    assert apart(folder / "equal", folder / "one") < 1e-6
    assert apart(folder / "equal", folder / "one", "ema") < 1e-6
    assert_same_log(folder / "equal", folder / "one")


def test_one_process_may_hand_over_to_two(pair):
    folder = pair["folder"]
    assert pair["results"][0]["resumed"] == 20
    assert apart(folder / "handed-over", folder / "one") < 1e-6


def test_a_rank_without_pairs_adds_exactly_nothing_and_does_not_hang(pair):
    assert apart(pair["folder"] / "empty", pair["folder"] / "one-empty") < 1e-6
    assert_same_log(pair["folder"] / "empty", pair["folder"] / "one-empty")


def test_validation_may_be_uneven(pair):
    assert [result["validated"] for result in pair["results"]] == [[0, 20], [0, 20]]


def test_non_finite_on_one_rank_stops_both_before_any_weight_moves(pair):
    for result in pair["results"]:
        kind, text, code = result["nan"]
        # step 3 of rank 1: rows 2*12 + 6 ... ; group 1 of each micro-batch of 3 is poisoned
        assert kind == "TrainingError" and code == 2 and text.startswith("step 3: the loss is nan")
        assert "process 1: row 31 visit 0 t=0." in text and "row 34 visit 0" in text and "process 0" not in text
        assert result["nan_untouched"]


def test_a_signal_to_one_rank_stops_both_with_a_checkpoint(pair):
    for result in pair["results"]:
        assert result["term"][0] == "Preempted" and result["term"][2] == 75
    assert [path.name for path in checkpoints(pair["folder"] / "term")] == ["checkpoint-8"]


def test_a_full_disk_on_rank_0_is_everybodys_error(pair):
    for result in pair["results"]:
        assert result["full"][0] == "CheckpointError" and "No space left on device" in result["full"][1]


def test_one_flipped_bit_is_found(pair):
    for result in pair["results"]:
        assert result["same"] is None
        assert result["flip"][0] == "TrainingError" and "leave.weight" in result["flip"][1]
        assert result["together"] == ["TrainingError", "mine", 2]
    assert [result["bug"] for result in pair["results"]] == [["KeyError", "'x'", None], ["TrainingError", "KeyError('x')", 2]]


def test_a_failing_rank_ends_the_other(pair):
    assert all(code != 0 for code in pair["codes"]) and pair["apart"] < 10
    assert "rank 1 fails in step 3" in pair["said"][1] and "broadcast_buffers" not in pair["said"][0]


def test_the_twin_is_alone(tmp_path):
    world = Single()
    assert world.gather("x") == ["x"] and world.sum(torch.tensor(3)) == 3 and (world.rank, world.size) == (0, 1)
    world.barrier()
    check_same_weights(world, toy.Bank().trainable())
    raise_together(world, None)
    with pytest.raises(ZeroDivisionError):
        raise_together(world, ZeroDivisionError())
    shutil.rmtree(tmp_path)


def _gloo_threads() -> int:
    return sum(name.read_text().startswith("pt_gloo") for name in Path("/proc/self/task").glob("*/comm"))


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted where Linux names them")
@pytest.mark.parametrize("error", [None, UserError("mine")])
def test_a_command_leaves_no_thread_of_gloo_behind(error):
    """One that still holds a tensor of Python's while Python ends aborts the process."""
    def command():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        assert Distributed(0, 1, torch.device("cpu")).gather("x") == ["x"] and _gloo_threads()
        if error:
            raise error

    try:
        with left_in_order():
            command()
    except UserError as raised:
        assert raised is error
    assert not dist.is_initialized() and not _gloo_threads()


def test_an_error_of_one_is_everybodys():
    assert together(Single(), lambda: "x") == ["x"] and on_first(Single(), lambda: None) == ""
    with pytest.raises(DataError, match="row 3"):
        on_first(Single(), lambda: (_ for _ in ()).throw(DataError("row 3")))
