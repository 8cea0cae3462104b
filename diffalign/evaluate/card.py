"""The model card: README.md beside the weights, with what a reader needs to judge and to use them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..models.spec import LANGUAGE_MODEL, LATENT_REWARD, PEFT
from .files import redact, write

if TYPE_CHECKING:
    from .report import Run

_MADE = {"pictures": ("text-to-image", "image", "images"), "clips": ("text-to-audio", "clip", "audios")}  # tag, words in code
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def write_card(folder: Path | str, run: Run, report: dict[str, Any]) -> Path:
    """README.md in ``folder``, from the run's facts and what ``write_report`` returned."""
    path = Path(folder) / "README.md"
    write(path, redact(card(run, report)).encode())
    return path


def card(run: Run, report: dict[str, Any]) -> str:
    """Markdown with the YAML front matter that the Hugging Face hub reads."""
    blocks = [_front_matter(run), f"# {_text(run.title)}", _text(report["sentence"]), _picture(report), _figures(report),
              _about(run, report), _loading(run), _again(run), _licence(run)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def is_hub_id(name: str) -> bool:
    """Whether the name can be a hub id (owner/name) and is no folder here."""
    return bool(_HUB_ID.fullmatch(name)) and not Path(name).exists()


def loading(run: Run) -> dict[str, str]:
    """How to use the files: {"diffusers": code, "comfyui": words or ""}."""
    if LATENT_REWARD in run.files:
        code = ("from diffalign.config import load_reward", "",
                f'reward = load_reward({{"kind": "latent", "path": "path/to/this/folder/{LATENT_REWARD}"}})',
                "scores = reward(pictures, prompts)", "")
        return {"diffusers": "\n".join(code), "comfyui": ""}
    if LANGUAGE_MODEL in run.files and run.subject == "clips":
        code = ("from transformers import MusicgenForConditionalGeneration", "",
                f'model = MusicgenForConditionalGeneration.from_pretrained("path/to/this/folder/{LANGUAGE_MODEL}")', "")
        return {"diffusers": "\n".join(code), "comfyui": ""}
    if LANGUAGE_MODEL in run.files:
        code = ("from diffalign.models import ModelSpec",
                "from diffalign.models.masked_lm import load_denoiser, load_tokens", "",
                f'spec = ModelSpec(pretrained_model_name_or_path="path/to/this/folder/{LANGUAGE_MODEL}")',
                "denoiser, tokens = load_denoiser(spec), load_tokens(spec)", "")
        return {"diffusers": "\n".join(code), "comfyui": ""}
    if run.subject == "answers" or PEFT in run.files:
        code = ("from peft import PeftModel", "", "# base: the network that training started from, loaded by its own code",
                'model = PeftModel.from_pretrained(base, "path/to/this/folder")', "")
        return {"diffusers": "\n".join(code), "comfyui": ""}
    base = run.base_model if is_hub_id(run.base_model) else f"path/to/{Path(run.base_model).name}"
    scheduler, options = _scheduler(run)
    names = sorted({"DiffusionPipeline", run.sampling.get("scheduler") or "DiffusionPipeline"})
    first = [f"from diffusers import {', '.join(names)}", ""]
    _, one, many = _MADE[run.subject]
    drawn = [*scheduler, f'{one} = pipe("a prompt"{options}).{many}[0]', ""]
    if run.rank is None:
        return {"diffusers": "\n".join([*first, 'pipe = DiffusionPipeline.from_pretrained("path/to/this/folder")', *drawn]),
                "comfyui": ""}
    fused = fused_name(run.fuse_lora) if run.fuse_lora else None
    code = [*first, f'pipe = DiffusionPipeline.from_pretrained("{_quoted(base)}")']
    if fused:
        code += [f'pipe.load_lora_weights("path/to/{_quoted(fused)}")  # it belongs to the base of these weights',
                 "pipe.fuse_lora()", "pipe.unload_lora_weights()"]
    code += ['pipe.load_lora_weights("path/to/this/folder", weight_name="pytorch_lora_weights.safetensors")', *drawn]
    comfy = next((name for name in run.files if name.endswith("_comfy.safetensors")), None)
    beside, strength = (f" and the LoRA {fused}", "strength 1.0 for both") if fused else ("", "strength 1.0")
    words = (f"Copy {comfy} into ComfyUI's models/loras (or A1111's models/Lora) and load it with the base model{beside}; "
             f"{strength} is what the figures were measured at." if comfy else "")
    return {"diffusers": "\n".join(code), "comfyui": words}


def fused_name(fuse_lora: str) -> str:
    """The last part of the path of ``model.fuse_lora``; for a file with the usual name, its folder's."""
    path = Path(fuse_lora)
    return path.parent.name if path.stem == "pytorch_lora_weights" and path.parent.name else path.name


def _scheduler(run: Run) -> tuple[list[str], str]:
    """The line that sets the scheduler of the figures, and the call's options; nothing where the pipeline's own was used."""
    name, spacing = run.sampling.get("scheduler"), run.sampling.get("timestep_spacing")
    if not name and not spacing:
        return [], ""
    extra = f', timestep_spacing="{spacing}"' if spacing else ""
    if spacing and name in ("LCMScheduler", "TCDScheduler"):
        extra = ", original_inference_steps=1000"  # see sampling/scheduler.py
    return ([f"pipe.scheduler = {name or 'type(pipe.scheduler)'}.from_config(pipe.scheduler.config{extra})"],
            f", num_inference_steps={run.sampling['num_inference_steps']}, guidance_scale={run.sampling['guidance_scale']:g}")


def _front_matter(run: Run) -> str:
    task = _MADE[run.subject][0]
    tags = ["diffalign", "preference-alignment", task, "diffusers", _slug(run.method)]
    facts: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": task,
                             "tags": [*tags, "lora"] if run.rank is not None else tags}
    if is_hub_id(run.base_model):
        facts["base_model"] = run.base_model
        facts["base_model_relation"] = "adapter" if run.rank is not None else "finetune"
    else:
        facts["base_model"] = Path(run.base_model).name
    if run.data and is_hub_id(run.data):
        facts["datasets"] = [run.data]
    return f"---\n{yaml.safe_dump(facts, sort_keys=False, allow_unicode=True)}---"


def _picture(report: dict) -> str:
    comparison = report["comparison"]
    return "![One row a prompt, the base model beside the aligned one](grid.png)" if comparison else ""


def _figures(report: dict) -> str:
    rows = []
    result = report["comparison"]["statistics"] if report["comparison"] else None
    if result:
        rows += [("Win rate (ties half)", _share(result, "win_rate")),
                 ("Wins, ties, losses", f"{result['wins']}, {result['ties']}, {result['losses']} pictures"),
                 ("Mean score, base", f"{result['base_score']:.4g}"),
                 ("Mean score, aligned", f"{result['aligned_score']:.4g}"),
                 ("Difference", f"{result['difference']:+.4g} (95% interval {result['difference_low']:+.4g} to "
                                f"{result['difference_high']:+.4g})"),
                 ("Judge", f"`{report['comparison']['judge']}` on {result['prompts']:,} prompts, same seeds for both models")]
    heldout = report["heldout_preference_accuracy"]
    if heldout.get("after") is not None:
        before = "" if heldout["before"] is None else f"{100 * heldout['before']:.1f}% before, "
        rows.append(("Held-out preference accuracy", f"{before}{100 * heldout['after']:.1f}% after"))
    return "## Figures\n\n| | |\n|---|---|\n" + "\n".join(f"| {k} | {v} |" for k, v in rows) if rows else ""


def _share(result: dict, name: str) -> str:
    return (f"**{100 * result[name]:.1f}%** (95% interval {100 * result[name + '_low']:.1f} to "
            f"{100 * result[name + '_high']:.1f}%, bootstrap over prompts)")


def _about(run: Run, report: dict) -> str:
    kind = f"LoRA of rank {run.rank}" if run.rank is not None else "all weights of the denoiser"
    rows = [("Method", _text(run.method)), ("Base model", _text(_public(run.base_model))),
            ("Fused into it", _text(fused_name(run.fuse_lora)) if run.fuse_lora else None), ("Trained", kind),
            ("Preference data", _text(_public(run.data)) if run.data else None),
            ("Pairs", run.pairs and f"{run.pairs:,}"), ("Steps", run.steps and f"{run.steps:,}"),
            ("beta", None if run.beta is None else f"{run.beta:g} (mean-reduced error, factor 1/2)"), ("Seed", str(run.seed)),
            ("Versions", ", ".join(f"{name} {number}" for name, number in report["versions"].items()))]
    return "## How it was made\n\n| | |\n|---|---|\n" + "\n".join(f"| {k} | {v} |" for k, v in rows if v)


def _loading(run: Run) -> str:
    how = loading(run)
    parts = ["## Use", f"With diffusers:\n\n```python\n{how['diffusers']}```"]
    return "\n\n".join([*parts, f"With ComfyUI or A1111: {_text(how['comfyui'])}"] if how["comfyui"] else parts)


def _again(run: Run) -> str:
    return f"## Make it again\n\n```bash\n{run.command.replace('```', '')}\n```" if run.command else ""


def _licence(run: Run) -> str:
    return (f"## Licence\n\nThese weights derive from {_text(_public(run.base_model))}: its licence and its limits of use "
            "apply to them as well, and so do the terms of the preference data.")


def _public(name: str) -> str:
    """A hub id, or the last part of a path: a card is published, the author's folders are not."""
    return name if is_hub_id(name) else Path(name).name


def _text(words: str) -> str:
    """Plain words inside Markdown: no tags, no table breaks, no code."""
    words = " ".join(words.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|])", r"\\\1", words)


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
