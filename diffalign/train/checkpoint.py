"""Checkpoints: written aside, synced, renamed, and only then is an old one removed. No pickle anywhere.

``checkpoint-N/`` holds ``*.safetensors`` (weights, moments, moving average), ``state.json`` (everything else) and
``manifest.json`` (size and SHA-256 of each file, name and shape of each tensor). A folder has that name only when complete.
Broken ones found on resume are renamed to ``broken-checkpoint-N`` and the one before is used.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import CheckpointError

FORMAT = 1
SLACK = 1 << 20  # bytes for state.json, the manifest and the file system's own records
STATE_KEYS = ("format", "step", "samples", "updates", "seconds", "memory", "window", "validation_start",
              "validation_end", "validated", "optimizer", "ema", "scaler", "config", "identity", "groups_per_step",
              "stopped")
NEWER_KEYS = ("initial_loss", "recent")  # for the summary alone; checkpoints of older versions lack them

Groups = dict[str, dict[str, Tensor]]  # file name without suffix -> tensors by name


@dataclass(frozen=True)
class Stored:
    """A verified checkpoint: its folder, tensors by file on the CPU, and the contents of state.json."""

    folder: Path
    tensors: Groups
    state: dict


def checkpoints(output_dir: Path) -> list[Path]:
    """Folders named checkpoint-N, oldest first."""
    found = [(int(match[1]), path) for path in output_dir.glob("checkpoint-*")
             if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir()]
    return [path for _, path in sorted(found)]


def check_writable(output_dir: Path, option: str = "output_dir") -> None:
    """Create the folder and try a file in it; CheckpointError in one line, before anything is trained."""
    probe = output_dir / f".writable-{os.getpid()}"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"{option}: cannot write in {output_dir} ({error.strerror or error}); choose a folder that "
                              "you may write in") from error


def claim(output_dir: Path) -> int:
    """Lock the folder: two runs in one would clear away each other's checkpoints. Returns the descriptor that holds the lock
    until it is closed or the process ends, however it ends. CheckpointError when another process holds it."""
    descriptor = os.open(output_dir, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise CheckpointError(f"output_dir: another run is at work in {output_dir} now; wait for it, or choose another "
                              "output_dir") from None
    except OSError:
        pass  # a file system without locks
    return descriptor


@contextmanager
def claimed(folder: Path):
    """The folder is this run's until it ends, however it ends."""
    descriptor = claim(folder)
    try:
        yield
    finally:
        os.close(descriptor)


def clean(output_dir: Path) -> None:
    """Remove what a killed process left half-written or half-removed."""
    for leftover in [*output_dir.glob(".checkpoint-*"), *output_dir.glob(".writable-*"), *output_dir.glob(".*.tmp")]:
        _remove(leftover)


def save(output_dir: Path, step: int, tensors: Groups, state: dict, *, keep: int,
         export: Callable[[Path], None] | None = None) -> Path:
    """Write checkpoint-<step>, then rotate to the ``keep`` newest (at least 2). export(folder) adds files for users.

    CheckpointError when the disk is full or broken; then the previous checkpoints are untouched.
    """
    final, aside = output_dir / f"checkpoint-{step}", output_dir / f".checkpoint-{step}.tmp"
    with disk_errors(f"cannot save {final}", output_dir, _bytes(tensors)):
        try:
            _check_space(output_dir, _bytes(tensors))
            _remove(aside)
            aside.mkdir()
            _write_contents(aside, step, tensors, state, export)
            _publish(aside, final)
        except BaseException:
            _remove(aside)
            raise
    _rotate(output_dir, max(2, keep))
    return final


def _write_contents(folder: Path, step: int, tensors: Groups, state: dict, export) -> None:
    for name, group in tensors.items():
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in group.items()}, folder / f"{name}.safetensors")
    if export is not None:
        export(folder)
    _write(folder / "state.json", canonical({"format": FORMAT, "step": step, **state}))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    shapes = {name: {key: [str(t.dtype), list(t.shape)] for key, t in group.items()} for name, group in tensors.items()}
    _write(folder / "manifest.json", manifest({str(path.relative_to(folder)): _fingerprint(path) for path in files}, shapes))
    for path in [*files, folder / "manifest.json"]:
        _fsync(path)
    for path in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        _fsync(path)


def _publish(aside: Path, final: Path) -> None:
    """Rename into place; a folder of the same name steps aside first."""
    old = final.with_name(f".{final.name}.old")
    if final.exists():
        _remove(old)
        os.rename(final, old)
    os.rename(aside, final)
    _fsync(final.parent)
    _remove(old)


def _rotate(output_dir: Path, keep: int) -> None:
    """Remove the oldest. Each is renamed first: a half-removed folder must not look like a checkpoint. A failure costs
    only space, and the next start clears it."""
    with suppress(OSError):
        for path in checkpoints(output_dir)[:-keep]:
            dead = path.with_name(f".{path.name}.old")
            os.rename(path, dead)
            _remove(dead)


def canonical(tree) -> bytes:
    """The one JSON spelling of a tree: any other byte in the file is damage."""
    return json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()


def manifest(files: dict[str, list], tensors: dict[str, dict[str, list]]) -> bytes:
    """manifest.json: files {path: [bytes, sha256]}, tensors {file: {name: [dtype, shape]}}, and a hash of both."""
    body = {"files": files, "tensors": tensors}
    return canonical({**body, "sha256": hashlib.sha256(canonical(body)).hexdigest()})


def verify(folder: Path) -> dict:
    """Check every file of a checkpoint against its manifest, which is returned; CheckpointError naming the bad file."""
    try:
        raw = (folder / "manifest.json").read_bytes()
        parsed = json.loads(raw)
        sound = raw == manifest(parsed["files"], parsed["tensors"])
    except OSError as error:
        raise CheckpointError(f"{folder}/manifest.json is missing or unreadable ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}/manifest.json is damaged") from error
    if not sound:
        raise CheckpointError(f"{folder}/manifest.json is damaged")
    for name, expected in parsed["files"].items():
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}/{name} is missing")
        if _fingerprint(folder / name) != expected:
            raise CheckpointError(f"{folder}/{name} is damaged: its size or SHA-256 is not the one in the manifest")
    return parsed


def load(folder: Path, *, verified: bool = False) -> Stored:
    """Verify (unless ``newest`` has just done so), then read; CheckpointError naming the file, tensor or field missing."""
    listed = json.loads((folder / "manifest.json").read_bytes())["tensors"] if verified else verify(folder)["tensors"]
    _require(folder, ["state.json"])
    state = json.loads((folder / "state.json").read_bytes())
    for key in STATE_KEYS:
        if key not in state:
            raise CheckpointError(f"{folder}/state.json has no field {key!r}")
    if state["format"] != FORMAT or f"checkpoint-{state['step']}" != folder.name:
        raise CheckpointError(f"{folder}/state.json is of format {state['format']} and step {state['step']}; expected "
                              f"format {FORMAT} and the folder's step")
    groups = ["weights", "optimizer"] + (["ema"] if state["ema"] is not None else [])
    _require(folder, [f"{group}.safetensors" for group in groups])
    tensors = {group: _load_group(folder / f"{group}.safetensors", expected) for group, expected in listed.items()}
    return Stored(folder, tensors, state)


def _require(folder: Path, names: list[str]) -> None:
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}/{name} is missing")


def _load_group(path: Path, expected: dict[str, list]) -> dict[str, Tensor]:
    try:
        loaded = load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error
    check_tensors(path, loaded, expected)
    return loaded


def check_tensors(path: Path, loaded: dict[str, Tensor], expected: dict[str, list]) -> None:
    """expected: name -> [dtype, shape]. CheckpointError naming the first missing, surplus or misshapen tensor."""
    for name in [*expected, *loaded]:
        if name not in loaded:
            raise CheckpointError(f"{path} has no tensor {name!r}")
        if name not in expected:
            raise CheckpointError(f"{path} has a tensor {name!r} that this run does not")
        if (found := [str(loaded[name].dtype), list(loaded[name].shape)]) != expected[name]:
            raise CheckpointError(f"{path}: tensor {name!r} is {found}, expected {expected[name]}")


def newest(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest valid checkpoint, and a note for each broken one, which is renamed out of the way.

    CheckpointError when there are checkpoints and none is valid: starting over would be a silent loss.
    """
    notes, broken, found = [], [], None
    for folder in reversed(checkpoints(output_dir)):
        try:
            verify(folder)
            found = folder
            break
        except CheckpointError as error:
            broken.append(folder)
            notes.append(str(error))
    if broken and found is None:
        raise CheckpointError(f"{'; '.join(notes)}. No checkpoint in {output_dir} is whole: move them away to start over")
    for folder in broken:
        _set_aside(folder)
    return found, notes


def _set_aside(folder: Path) -> None:
    target = folder.with_name(f"broken-{folder.name}")
    _remove(target)
    os.rename(folder, target)


@contextmanager
def disk_errors(what: str, folder: Path, need: int):
    """OSError and safetensors' own error become a CheckpointError with needed and free bytes."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        kept, free = [], "an unknown number"
        with suppress(OSError):  # the disk that failed may fail again
            kept, free = [path.name for path in checkpoints(folder)], f"{_free(folder):,}"
        raise CheckpointError(
            f"{what}: {reason}; it needs {need:,} bytes and {free} are free. Make space or choose another output_dir, then "
            f"run the same command again: {f'{kept[-1]} is intact' if kept else 'nothing was saved yet'}") from error


def _check_space(folder: Path, need: int) -> None:
    if _free(folder) < need:
        raise OSError(28, "no space left on the disk")


def _bytes(tensors: Groups) -> int:
    return SLACK + sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values())


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Best effort: what is left is cleared at the next start."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _fingerprint(path: Path) -> list:
    """[bytes, sha256 as hex]."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return [path.stat().st_size, digest.hexdigest()]
