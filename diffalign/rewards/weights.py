"""Where a reward's weights lie, and what must be true of them before they are loaded: safetensors only, every tensor there.

A wrong path, a pickle, a truncated file and a tensor of the wrong shape are each one ``ModelError`` line.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ConfigError, ModelError, first_line
from ..models.folder import PICKLES, content
from ..models.load import download

GUIDE = "docs/rewards.md has the line that converts it"
TEXT_PARTS = ("text_", "token_embedding", "positional_embedding", "transformer.", "ln_final")


def on_device(device: str | None) -> torch.device:
    """What an option ``device`` means: None is CUDA where there is one. Raises ConfigError for one that is not here."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).item()  # whatever torch knows, a number can be made there and read
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device: {device!r} cannot be used here ({first_line(error)})") from None
    return torch.device(device)


def local_file(path: str | None, option: str) -> Path:
    """A safetensors file here. Raises ConfigError when the option is empty, ModelError when there is no such file."""
    if not path:
        raise ConfigError(f"{option} is not set; its weights are published as a pickle only: {GUIDE}")
    file = Path(path).expanduser()
    refuse_pickle(file)
    if not file.is_file():
        raise ModelError(f"{option}: there is no file {path}")
    return file


def refuse_pickle(file: Path) -> None:
    """Raises ModelError for a file whose name says that it is a pickle, which can run code."""
    if file.suffix in PICKLES:
        raise ModelError(f"{file}: {file.suffix} is a pickle, which can run code; convert it to safetensors once, where you "
                         f"trust it: {GUIDE}")


def model_folder(name: str, revision: str | None, patterns: Iterable[str]) -> Path:
    """A folder here, or the files of a hub repository that match ``patterns``, at ``revision`` (a commit pins it)."""
    refuse_pickle(Path(name))
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision:
            raise ConfigError(f"revision {revision} is set, but {name} is a folder here; a revision belongs to a hub id")
        return folder
    return download(name, revision, list(patterns))


def folder_weights(folder: Path, name: str) -> list[Path]:
    """The safetensors files of a transformers folder, one or several shards. Raises ModelError where there are none."""
    if files := sorted([*folder.glob("model.safetensors"), *folder.glob("model-*-of-*.safetensors")]):
        return files
    pickles = sorted(file.name for file in folder.glob("*") if file.suffix in PICKLES)
    if pickles:
        raise ModelError(f"{name}: holds only pickle weights ({pickles[0]}), which can run code; convert them once, where you "
                         "trust them: CLIPModel.from_pretrained(OLD).save_pretrained(NEW)")
    raise ModelError(f"{name}: holds no model.safetensors")


def shapes(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the files' headers; no tensor is read. Raises ModelError for what is no complete safetensors."""
    from safetensors import SafetensorError, safe_open

    found = {}
    for file in files:
        try:
            with safe_open(file, framework="np") as handle:
                found |= {key: tuple(handle.get_slice(key).get_shape()) for key in handle.keys()}
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} is not a complete safetensors file ({first_line(error)}); copy or convert it "
                             "again") from error
    return found


def tensors(file: Path, prefix: str = "") -> dict[str, Tensor]:
    """The file's tensors as float32 whose names begin with ``prefix``, without it."""
    from safetensors.torch import load_file

    return {key.removeprefix(prefix): value.float() for key, value in load_file(file).items() if key.startswith(prefix)}


def prefix_before(names: Iterable[str], anchor: str, where: object) -> str:
    """What stands before ``anchor`` in the names: "module." of a distributed run, "state_dict." of a nested checkpoint.

    Raises ModelError where no name ends with the anchor.
    """
    found = sorted((name for name in names if name == anchor or name.endswith("." + anchor)), key=len)
    if not found:
        raise ModelError(f"{where}: has no tensor {anchor}, so it is not in the layout that this reward loads")
    return found[0].removesuffix(anchor)


def check_shapes(found: Mapping[str, tuple], wanted: Mapping[str, tuple], where: object) -> None:
    """Raises ModelError for a tensor that is missing or has another shape. Further tensors do no harm."""
    missing = [name for name in wanted if name not in found]
    if missing and all(name.startswith(TEXT_PARTS) for name in missing):
        raise ModelError(f"{where}: its text tower is missing or incomplete ({missing[0]} and {len(missing) - 1} more)")
    if missing:
        raise ModelError(f"{where}: {len(missing)} of {len(wanted)} tensors are missing, the first is {missing[0]}")
    for name, shape in wanted.items():
        if found[name] != shape:
            raise ModelError(f"{where}: {name} has shape {list(found[name])}, expected {list(shape)}")


def sha256(files: Iterable[Path]) -> str:
    """Hex SHA-256 of one file, or over the digests of several in the order of their names."""
    digests = [content(file) for file in sorted(files)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
