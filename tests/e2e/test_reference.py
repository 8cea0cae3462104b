"""The reference's errors, measured beforehand: the same run to the bit, without its pass."""

import json
import os
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from diffalign.cli import main
from diffalign.config import load_recipe
from diffalign.data.reference import ReferenceErrors
from diffalign.models.weights import WeightBank
from diffalign.run import parts, reference
from diffalign.train import make_accelerator
from diffalign.world import Single

from .. import ranks

EVERYTHING = ("likelihood={draws: 2, sequence: {kind: stratified, strata: 8}}", "data.caption_dropout=0.5",
              "data.random_flip=true", "data.ties=soft")


@pytest.fixture
def file(small, tmp_path):
    """A recipe without held-out data, over a cache of its own."""
    return small(tmp_path, data={"validation": None, "cache_dir": str(tmp_path / "cache")}, evaluate=None)


@pytest.fixture
def forbidden(monkeypatch):
    """A function after which a pass of the reference is a fault."""
    real = WeightBank.predict

    def predict(self, name, *args):
        assert name != "reference", "the reference ran"
        return real(self, name, *args)
    return lambda: monkeypatch.setattr(WeightBank, "predict", predict)


def run(file, command, folder, *options):
    return main([command, str(file), f"output_dir={folder}", *options])


def outcome(folder):
    weights = load_file(folder / "pytorch_lora_weights.safetensors")
    return (folder / "metrics.jsonl").read_text(), {name: tensor.numpy().tobytes() for name, tensor in weights.items()}


def measured(file, *options):
    """(recipe, source, folder) of the recipe's errors."""
    recipe = load_recipe(file, options)
    accelerator = make_accelerator(recipe.train, file.parent)
    cache, _ = parts.caches(recipe, accelerator, lambda line: None)
    stored = parts.stored_of(recipe, cache, Single())
    return recipe, stored, reference.folder_of(recipe, cache, stored, accelerator.device)


@pytest.mark.parametrize("options", [(), EVERYTHING], ids=["plain", "everything"])
def test_the_same_run_without_the_reference(file, tmp_path, forbidden, options):
    """Losses, metrics and weights, byte for byte; also where a live run is continued with errors measured meanwhile."""
    assert run(file, "train", tmp_path / "live", *options) == 0
    assert run(file, "train", tmp_path / "cut", *options, "train.max_train_steps=2") == 0
    assert main(["encode", str(file), "--reference", *options]) == 0
    forbidden()
    for name in ("measured", "cut"):
        assert run(file, "train", tmp_path / name, *options) == 0
        assert outcome(tmp_path / name) == outcome(tmp_path / "live"), name


def test_a_full_fine_tune_keeps_no_second_copy(file, tmp_path, forbidden, monkeypatch):
    options = ("model.lora=null", "train.learning_rate=1e-4", "train.max_train_steps=3")
    banks, build = [], WeightBank.build

    def watched(*args, **kwargs):
        banks.append(build(*args, **kwargs))
        return banks[-1]
    monkeypatch.setattr(WeightBank, "build", watched)
    assert run(file, "train", tmp_path / "live", *options) == 0
    assert main(["encode", str(file), "--reference", *options]) == 0
    forbidden()
    assert run(file, "train", tmp_path / "measured", *options) == 0
    assert [bank._frozen is None for bank in banks] == [False, True] and banks[0].identity == banks[1].identity
    a, b = (load_file(tmp_path / name / "pipeline/unet/diffusion_pytorch_model.safetensors") for name in ("live", "measured"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_sweep_reads_the_same_numbers(file, tmp_path, forbidden, capsys):
    """Another beta, link, rate, rank, micro-batch: nothing is measured again. The numbers belong to rows, not to batches."""
    assert main(["encode", str(file), "--reference"]) == 0
    assert "16 groups (16 measured now)" in capsys.readouterr().out
    for option in ("objective.beta=900", "objective.link=ipo", "train.learning_rate=1e-4", "model.lora.rank=2",
                   "likelihood.weighting=min_snr", "train.max_train_steps=2"):
        assert main(["encode", str(file), "--reference", option]) == 0
        assert "(0 measured now)" in capsys.readouterr().out, option
    recipe, whole, folder = measured(file)
    _, split, same = measured(file, "train.train_batch_size=1", "train.gradient_accumulation_steps=4")
    assert same == folder
    numbers = {}
    for stored in (whole, split):
        stored.reference = ReferenceErrors(folder)
        for batch in stored.take(1):
            for key, error in zip(batch.key.tolist(), batch.reference_error.tolist()):
                numbers.setdefault(tuple(key), []).append(error)
    assert len(numbers) == 4 and all(len(found) == 2 and found[0] == found[1] for found in numbers.values())
    forbidden()
    assert run(file, "train", tmp_path / "a", "train.train_batch_size=1", "train.gradient_accumulation_steps=4") == 0
    assert run(file, "train", tmp_path / "b") == 0
    a, b = ([json.loads(line)["loss"] for line in outcome(tmp_path / name)[0].splitlines()] for name in "ab")
    assert a == pytest.approx(b, abs=1e-4)


@pytest.mark.parametrize("option", [
    "seed=1", "likelihood.times={kind: uniform, high: 0.5}", "likelihood.draws=2", "likelihood.noise=independent",
    "likelihood.sequence=antithetic", "train.mixed_precision=bf16", "data.caption_dropout=0.1", "data.max_train_samples=20",
    "data.cache_dtype=float16"])
def test_what_changes_a_number_has_another_name(file, option):
    assert measured(file)[2] != measured(file, option)[2]


def test_a_longer_run_measures_the_rest_and_until_then_runs_it(file, tmp_path, capsys):
    assert main(["encode", str(file), "--reference", "train.max_train_steps=3"]) == 0
    assert run(file, "train", tmp_path / "live") == 0
    assert "12 of the run's 16 groups were measured beforehand, so it runs" in capsys.readouterr().out
    assert main(["encode", str(file), "--reference"]) == 0
    assert "(4 measured now)" in capsys.readouterr().out
    assert run(file, "train", tmp_path / "measured") == 0
    assert outcome(tmp_path / "measured") == outcome(tmp_path / "live")


@pytest.mark.parametrize("options, words", [
    (("reference={kind: moving, every: 2}",), "reference.kind: the errors of a reference that moves"),
    (("source={kind: online, reward: {kind: scenes}}",), "source.kind: with candidates that the model draws"),
    (("objective={kind: mapo}",), "compares with no reference"),
    (("likelihood.noise=inverted",), "likelihood.noise: noise that inverts with the policy"),
    (("objective={kind: regularized, origin: 0.1, objective: {kind: dpo, beta: 500}}",), "reads the base model's predictions"),
])
def test_what_cannot_be_measured_is_refused(file, capsys, options, words):
    assert main(["encode", str(file), "--reference", *options]) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) == 1


def in_blocks_of_four(words):
    reference.BLOCK = 4
    return main(words)


def test_kill_and_the_same_command_again(file, tmp_path, capsys):
    """SIGKILL after the second file: what is there is kept, and the end is the same bytes as without a kill."""
    options = ("train.max_train_steps=40",)
    recipe, stored, folder = measured(file, *options)
    process = ranks.start(in_blocks_of_four, ["encode", str(file), "--reference", *options], said=tmp_path / "said.txt")
    deadline = time.monotonic() + 120
    while len(list(folder.glob("*.arrow"))) < 2 and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.join()
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.arrow")}
    assert 2 <= len(before) < 40
    assert main(["encode", str(file), "--reference", *options]) == 0
    assert f"({160 - 4 * len(before)} measured now)" in capsys.readouterr().out
    assert all((folder / name).stat().st_mtime_ns == changed for name, changed in before.items())
    after = numbers(stored, folder)
    for path in folder.glob("*.arrow"):
        path.unlink()
    assert main(["encode", str(file), "--reference", *options]) == 0
    assert torch.equal(numbers(stored, folder), after)


def numbers(stored, folder):
    stored.reference = ReferenceErrors(folder)
    return torch.cat([batch.reference_error for step in range(4) for batch in stored.take(step)])


def test_two_processes_share_the_blocks(file, monkeypatch):
    """Each measures the blocks that are its own; together they have the numbers of one process."""
    monkeypatch.setattr(reference, "BLOCK", 4)
    assert main(["encode", str(file), "--reference"]) == 0
    recipe, stored, folder = measured(file)
    one = numbers(stored, folder)
    for path in folder.glob("*.arrow"):
        path.unlink()
    recipe = replace(recipe, train=replace(recipe.train, train_batch_size=2))
    accelerator = make_accelerator(recipe.train, file.parent)
    for rank, share in ((0, 8), (1, 8)):
        monkeypatch.setattr(reference, "world_of", lambda _, rank=rank: Single(rank=rank, size=2))
        assert reference.measure(recipe, stored.cache, accelerator, lambda line: None) == {"groups": 16, "measured": share}
    assert torch.allclose(numbers(stored, folder), one, rtol=1e-5, atol=0)


def test_a_damaged_file_is_measured_again(file, tmp_path, capsys):
    assert main(["encode", str(file), "--reference"]) == 0
    recipe, stored, folder = measured(file)
    (path,) = folder.glob("*.arrow")
    good = numbers(stored, folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))
    capsys.readouterr()
    said = []
    assert reference.find(recipe, stored.cache, stored, torch.device("cpu"), said.append) is None
    assert "1 damaged files" in said[0] and "measures their groups again" in said[0], "or training runs it without a word"
    assert main(["encode", str(file), "--reference"]) == 0
    assert "(16 measured now)" in capsys.readouterr().out and list(folder.glob("*.corrupt"))
    assert torch.equal(numbers(stored, folder), good)


def test_numbers_of_another_model_or_row_are_refused(file, tmp_path, capsys):
    """A tampered table: the start of the run compares it with the model, and every batch with its rows."""
    from diffalign.data.reference import write
    _, stored, folder = measured(file)
    keys = torch.cat([batch.key for step in range(4) for batch in stored.take(step)])
    folder.mkdir()
    write(folder, 0, keys, torch.full((16, 2, 1), 0.5))
    assert run(file, "train", tmp_path / "run") == 2
    assert "differ from this model's by" in capsys.readouterr().err
    next(folder.glob("*.arrow")).unlink()
    write(folder, 0, keys.flip(0), torch.full((16, 2, 1), 0.5))
    assert run(file, "train", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert "errors of other rows than this run reads" in error and "Traceback" not in error
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_error_that_is_not_finite_names_its_row(tmp_path):
    from diffalign.data.reference import write
    from diffalign.errors import DataError
    errors = torch.ones(3, 2, 1)
    errors[1, 0] = float("nan")
    with pytest.raises(DataError, match="row 7 visit 2: the reference's error is not finite"):
        write(tmp_path, 0, torch.tensor([[5, 0], [7, 2], [9, 0]]), errors)


def test_overlapping_parts_are_read_once(tmp_path):
    """Two builds with unlike steps: places 0..3 and 2..7; the gap at 8 is known."""
    from diffalign.data.reference import write
    keys = torch.stack([torch.arange(8), torch.zeros(8).long()], dim=1)
    errors = torch.arange(8).float().view(8, 1, 1)
    write(tmp_path, 0, keys[:4], errors[:4])
    write(tmp_path, 2, keys[2:], errors[2:])
    found = ReferenceErrors(tmp_path)
    assert found.holds(0, 8) == 8 and found.holds(0, 9) == 8 and found.holds(3, 6) == 3
    places = torch.tensor([7, 0, 3, 4])
    assert found.read(places.numpy(), keys[places]).flatten().tolist() == [7, 0, 3, 4]
