"""What a pipeline folder must look like before anything of it is loaded: plain JSON and safetensors headers, no torch.

Only safetensors are read, and no code that comes with a model is run. Every refusal is one ``ModelError`` line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import ModelError

LIBRARIES = ("diffusers", "transformers", "stable_audio", "audioldm2", "ace_step")  # the last: of diffusers' own pipelines
WEIGHTED = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3", "projection_model",
            "language_model", "condition_encoder", "vocoder", "audio_tokenizer", "audio_token_detokenizer")
TEXT = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3",
        "projection_model", "language_model", "condition_encoder")
# parts of a pipeline that this package never loads
IGNORED = ("safety_checker", "feature_extractor", "image_encoder")
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A pipeline folder whose model_index.json was read. components: name -> (library, class), the absent ones left out."""

    path: Path
    name: str                   # what the user wrote
    pipeline: str               # class name of the pipeline
    components: dict[str, tuple[str, str]]
    variant: str | None
    index: dict[str, Any]

    def config(self, component: str) -> dict[str, Any]:
        """config.json of a model, scheduler_config.json of the scheduler."""
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        return read_json(self.path / component / name, self.name)

    def weights(self, component: str) -> list[Path]:
        """The component's safetensors files of the chosen variant (see ``weight_files``)."""
        return weight_files(self.path / component, self.variant, self.name)


def read_folder(path: Path, name: str, variant: str | None = None) -> Folder:
    """The folder's table of contents. Raises ModelError for what is no pipeline folder, or one with code of its own."""
    index_file = path / "model_index.json"
    if not index_file.is_file():
        raise ModelError(f"{name}: not a diffusers pipeline folder (no model_index.json). {_hint(path)}")
    index = read_json(index_file, name)
    components = {}
    for part, entry in index.items():
        if part.startswith("_") or part in IGNORED or not isinstance(entry, list) or entry == [None, None]:
            continue
        if len(entry) != 2 or entry[0] not in LIBRARIES or not isinstance(entry[1], str):
            raise ModelError(f"{name}: component '{part}' is {entry}, code that comes with the model; diffalign runs only "
                             "classes of diffusers and transformers")
        components[part] = (entry[0], entry[1])
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str):
        raise ModelError(f"{name}: model_index.json names a custom pipeline ({pipeline}); diffalign runs no code that comes "
                         "with a model")
    return Folder(path=path, name=name, pipeline=pipeline, components=components, variant=variant, index=index)


def _hint(path: Path) -> str:
    if not path.is_dir():  # of a hub id, where no file was of the name that was asked for
        return "Name a repository that holds a whole pipeline"
    inside = sorted(p.name for p in path.iterdir())
    if "config.json" in inside and "tokenizer.json" in inside:
        return "A masked diffusion language model (LLaDA) is trained with likelihood.kind=masked"
    if any((path / part).is_dir() for part in WEIGHTED):
        return "Its parts are there, but the file that names them is missing: save it again with pipe.save_pretrained(...)"
    if any(n.endswith((".safetensors", ".ckpt")) for n in inside):
        return ("A single-file checkpoint becomes one with StableDiffusionXLPipeline.from_single_file(FILE)"
                ".save_pretrained(FOLDER)")
    return f"It holds {', '.join(inside[:5]) or 'nothing'}"


def check_components(folder: Folder, components: Iterable[str]) -> None:
    """Refuse missing parts, code, pickles and damaged files in the named components (those the pipeline has)."""
    for part in components:
        if part not in folder.components:
            continue
        if not (folder.path / part).is_dir():
            raise ModelError(f"{folder.name}: the folder {part}/ is missing although model_index.json names it")
        for file in sorted((folder.path / part).glob("*config.json")):
            if "auto_map" in read_json(file, folder.name):
                raise ModelError(f"{folder.name}: {part}/{file.name} has an auto_map, code that comes with the model; "
                                 "diffalign runs only classes of diffusers and transformers")
        if part in WEIGHTED:
            check_weights(folder.weights(part), folder.name)


def weight_files(folder: Path, variant: str | None, name: str) -> list[Path]:
    """Safetensors files of one variant ("fp16", or None for the plain ones), sorted. Raises ModelError if there are none."""
    files = sorted(folder.glob("*.safetensors"))
    chosen = [f for f in files if _variant(f) == variant]
    if chosen:
        return chosen
    if files:
        found = ", ".join(sorted({_variant(f) or "none" for f in files}))
        raise ModelError(f"{name}: {folder.name}/ has no weights of variant {variant or 'none'} (it has: {found}); "
                         "set model.variant")
    pickles = sorted(f.name for f in folder.glob("*") if f.suffix in PICKLES)
    if pickles:
        raise ModelError(
            f"{name}: {folder.name}/ holds only pickle weights ({pickles[0]}), which can run code. Convert it once, where "
            "you trust it: DiffusionPipeline.from_pretrained(OLD).save_pretrained(NEW, safe_serialization=True)")
    raise ModelError(f"{name}: {folder.name}/ holds no weights (no .safetensors file)")


def _variant(file: Path) -> str | None:
    """"diffusion_pytorch_model.fp16-00001-of-00002.safetensors" -> "fp16"; without a middle part -> None."""
    parts = file.name.split(".")
    return parts[1].split("-")[0] if len(parts) == 3 else None


def check_weights(files: Iterable[Path], name: str) -> None:
    """Read each header: a truncated file, or a pickle with a borrowed name, is a ModelError."""
    from safetensors import SafetensorError, safe_open

    for file in files:
        try:
            with safe_open(file, framework="np") as handle:
                handle.keys()
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{name}: {file.parent.name}/{file.name} is not a complete safetensors file ({error}); "
                             "copy or download it again") from error


def read_json(file: Path, name: str) -> dict[str, Any]:
    """A JSON object. Raises ModelError naming the file."""
    where = f"{file.parent.name}/{file.name}"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{name}: {where} is missing") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{name}: {where} is not readable JSON ({error})") from error
    if not isinstance(content, dict):
        raise ModelError(f"{name}: {where} is not a JSON object")
    return content


def digest(files: Iterable[Path], *texts: str) -> str:
    """Hex SHA-256 over folder/file names, contents and extra texts: the same bytes give the same identity anywhere."""
    total = hashlib.sha256()
    for file in sorted(files):
        total.update(f"{file.parent.name}/{file.name} {content(file)}\n".encode())
    for text in texts:
        total.update(f"{text}\n".encode())
    return total.hexdigest()


def content(file: Path) -> str:
    """Hex SHA-256 of a file's bytes, read once as long as its size and time stay."""
    stat = file.stat()
    return _sha256(file, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=256)
def _sha256(file: Path, size: int, mtime: int) -> str:
    total = hashlib.sha256()
    with open(file, "rb") as handle:
        while block := handle.read(1 << 20):
            total.update(block)
    return total.hexdigest()
