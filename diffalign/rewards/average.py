"""WARM: one reward from several, by averaging their weights (Ramé et al. 2024, arXiv 2401.12187).

phi = (1/M) sum_m phi_m of M reward models fine-tuned from one initialisation with other data orders or hyper-parameters. It
costs one forward pass and is harder to hack than any of them. It works because weights that start from one point stay linearly
connected; weights of different starts averaged are noise, so the start's hash, written by ``train_reward`` into the file's
metadata as "init", must be the same in all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ModelError, ResourceError

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
INIT = "init"  # metadata key: hash of backbone and head before the first step


def average_files(files: Sequence[Path | str], target: Path | str) -> Path:
    """The mean of M >= 2 safetensors files, summed in float64, in the first one's dtypes; integers must be equal in all.

    Raises ModelError in one line for pickles, missing or damaged files, other keys, shapes or init hashes.
    """
    files, target = [Path(file) for file in files], Path(target)
    if len(files) < 2:
        raise ModelError(f"averaging needs at least two rewards, got {len(files)}")
    first, metadata = _read(files[0])
    total = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in first.items()}
    for file in files[1:]:
        other, found = _read(file)
        _same_start(files[0], metadata, file, found)
        _same_layout(files[0], first, file, other)
        for name, tensor in other.items():
            if tensor.is_floating_point():
                total[name] += tensor.double()
            elif not torch.equal(tensor, first[name]):
                raise ModelError(f"{file}: the whole numbers of {name} differ from {files[0]}, so they have no average")
    mean = {name: (tensor / len(files)).to(first[name].dtype) if first[name].is_floating_point() else tensor
            for name, tensor in total.items()}
    save_weights(mean, target, {**metadata, "averaged": str(len(files))})
    return target


def average_rewards(folders: Sequence[Path | str], output: Path | str) -> Path:
    """The same for folders that ``train_reward`` wrote: their config.json must agree, and is written beside the mean."""
    folders, output = [Path(folder) for folder in folders], Path(output)
    configs = [_config(folder) for folder in folders]
    for folder, config in zip(folders[1:], configs[1:], strict=True):
        different = sorted(key for key in configs[0].keys() | config.keys() if configs[0].get(key) != config.get(key))
        if different:
            raise ModelError(f"{folder}: {CONFIG} differs from that of {folders[0]} in {', '.join(different)}; only rewards "
                             "of one architecture can be averaged")
    average_files([folder / WEIGHTS for folder in folders], output / WEIGHTS)
    with whole(output / CONFIG) as aside:
        aside.write_bytes((folders[0] / CONFIG).read_bytes())
    return output


def save_weights(tensors: dict[str, Tensor], target: Path, metadata: dict[str, str]) -> None:
    """Raises ResourceError."""
    from safetensors.torch import save_file

    with whole(target) as aside:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, aside, metadata)


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """What is written to the path that it gives is flushed and renamed: under its name the file is whole or absent. Raises
    ResourceError."""
    from safetensors import SafetensorError

    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, target)
    except (OSError, SafetensorError) as error:  # a full disk comes as the library's own error
        raise ResourceError(f"cannot write {target}: {error}") from None
    finally:
        with suppress(OSError):  # or it would hide the error above, where the folder is a file
            aside.unlink(missing_ok=True)


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    if file.suffix != ".safetensors":
        raise ModelError(f"{file}: only safetensors are read; convert it once, where you trust it, with "
                         "safetensors.torch.save_file")
    try:
        with safe_open(file, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}, handle.metadata() or {}
    except FileNotFoundError:
        raise ModelError(f"{file}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: not a complete safetensors file ({error})") from None


def _same_start(first: Path, metadata: dict[str, str], file: Path, found: dict[str, str]) -> None:
    for path, facts in ((first, metadata), (file, found)):
        if not facts.get(INIT):
            raise ModelError(f'{path}: says nothing of the weights it started from (no "{INIT}" in its metadata), and weights '
                             "of different starts have no meaningful average")
    if metadata[INIT] != found[INIT]:
        raise ModelError(f"{file}: started from other weights than {first} ({found[INIT][:12]} and {metadata[INIT][:12]}); "
                         "only rewards trained from one initialisation can be averaged")


def _same_layout(first: Path, expected: dict[str, Tensor], file: Path, found: dict[str, Tensor]) -> None:
    if expected.keys() != found.keys():
        odd = sorted(expected.keys() ^ found.keys())[0]
        raise ModelError(f"{file}: its tensors are not those of {first}; {odd} is in one of them only")
    for name, tensor in found.items():
        if (tensor.shape, tensor.dtype) != (expected[name].shape, expected[name].dtype):
            raise ModelError(f"{file}: {name} is {list(tensor.shape)} {tensor.dtype}, in {first} it is "
                             f"{list(expected[name].shape)} {expected[name].dtype}")


def _config(folder: Path) -> dict:
    try:
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{folder}: {CONFIG} is missing; is this the folder of a trained reward?") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: {CONFIG} is not readable JSON ({error})") from None
    if not isinstance(found, dict):
        raise ModelError(f"{folder}: {CONFIG} is no JSON object")
    return found
