"""Distil the embedded SDXL to four steps: a LoRA that draws without guidance at timesteps 999, 749, 499, 249.

    OMP_NUM_THREADS=1 python scripts/assets/make_distilled.py --model assets/tiny-sdxl --out assets/tiny-sdxl-lcm

About 12 minutes on one busy CPU core. The student maps a noisy state straight to the picture at which the guided teacher's ODE
ends, so it can draw by re-noising (diffusers' `LCMScheduler`; Euler's ancestral sampler works, too). The teacher's ODEs are
precomputed: 12 second-order steps with guidance, which pass the four timesteps on their way. A second round on states from the
student's own sampling was tried and gained nothing on held-out prompts.

Only training prompts are used (`scenes.is_held_out`), although the base saw all combinations: so held-out scores also say how
far the distillation carries. Both stages are functions of the seed; a stopped run finds its ODEs in `--work`.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from diffalign import _compat  # noqa: F401  (before diffusers: it mends a torchvision that does not fit torch)

# isort: split
from diffusers import DPMSolverMultistepScheduler, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffalign.models import Denoiser, LoRA, ModelSpec, attach, load_denoiser, lora_state
from diffalign.models.lora import STEM, trained
from diffalign.rewards.scenes import SIZE, caption, is_held_out, random_scene
from diffalign.types import Cond

TIMESTEPS = (999, 749, 499, 249)
ODE_STEPS = 12  # a multiple of four, spaced "trailing": every third is one of TIMESTEPS
BATCH = 64
HUBER = 0.03  # RMS error, in units of the latent, below which the loss is quadratic
TIME_IDS = (SIZE, SIZE, 0, 0, SIZE, SIZE)  # original size, crop, target size: what the SDXL pipeline passes


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What the student learns from. `x`, `target` [N, 4, 16, 16]: a state at TIMESTEPS[level], and the teacher's picture from
    there on; `level` [N] int64; `prompt` [N] int64: its row in `tokens` [P, 20, 96] and `pooled` [P, 48].
    """

    x: Tensor
    target: Tensor
    level: Tensor
    prompt: Tensor
    tokens: Tensor
    pooled: Tensor

    def cond(self, rows: Tensor) -> Cond:
        return make_cond(self.tokens[self.prompt[rows]], self.pooled[self.prompt[rows]])


def join(parts: list[Rows]) -> Rows:
    """All rows, the prompts of each part behind those of the parts before it."""
    starts = np.cumsum([0, *(len(part.tokens) for part in parts)])
    cat = lambda name: torch.cat([getattr(part, name) for part in parts])  # noqa: E731
    prompt = torch.cat([part.prompt + int(start) for part, start in zip(parts, starts, strict=False)])
    return Rows(prompt=prompt, **{name: cat(name) for name in ("x", "target", "level", "tokens", "pooled")})


def make_cond(tokens: Tensor, pooled: Tensor) -> Cond:
    return Cond(tokens=tokens, pooled=pooled, extra={"time_ids": torch.tensor([TIME_IDS] * len(tokens), dtype=torch.float32)})


# Teacher


class Teacher:
    """The base with guidance, and the prompts as the pipeline encodes them."""

    def __init__(self, model: Path, guidance: float) -> None:
        self.pipe = StableDiffusionXLPipeline.from_pretrained(model, unet=None)
        self.guidance = guidance
        self.solver = DPMSolverMultistepScheduler.from_config(
            self.pipe.scheduler.config, timestep_spacing="trailing", final_sigmas_type="zero")

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Tokens [N, 20, 96] and pooled [N, 48] embeddings; those of no prompt are zeros in SDXL."""
        tokens, _, pooled, _ = self.pipe.encode_prompt(texts, device="cpu", do_classifier_free_guidance=False)
        return tokens, pooled

    def follow(self, denoiser: Denoiser, x: Tensor, tokens: Tensor, pooled: Tensor) -> tuple[list[Tensor], Tensor]:
        """The ODE from noise [N, 4, 16, 16] -> the states at TIMESTEPS, and the end."""
        both = make_cond(*(torch.cat([torch.zeros_like(part), part]) for part in (tokens, pooled)))
        stride, passed = ODE_STEPS // len(TIMESTEPS), []
        self.solver.set_timesteps(ODE_STEPS)
        for i, t in enumerate(self.solver.timesteps):
            if i % stride == 0:
                assert t == TIMESTEPS[i // stride]
                passed.append(x)
            empty, full = predict(denoiser, torch.cat([x, x]), t, both).chunk(2)
            x = self.solver.step(empty + self.guidance * (full - empty), t, x).prev_sample
        return passed, x


def predict(denoiser: Denoiser, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """Predicted noise [N, 4, 16, 16] at diffusers timesteps `t` (one for all, or [N]); the package counts time up to 1."""
    return denoiser(x, (t.expand(len(x)) + 1) / denoiser.process.steps, cond)


def training_prompts(seed: int, n: int) -> list[str]:
    rng, texts = np.random.default_rng(seed), []
    while len(texts) < n:
        scene = random_scene(rng)
        if not is_held_out(scene):
            texts.append(caption(scene))
    return texts


@torch.no_grad()
def teacher_rows(denoiser: Denoiser, teacher: Teacher, seed: int, n: int) -> Rows:
    """The four states and the end of `n` ODEs from noise."""
    parts, began = [], time.time()
    for start in range(0, n, BATCH):
        tokens, pooled = teacher.encode(training_prompts([seed, 1, start], min(BATCH, n - start)))
        noise = torch.randn(len(tokens), 4, SIZE // 4, SIZE // 4, generator=draws(seed, 1, start))
        states, end = teacher.follow(denoiser, noise, tokens, pooled)
        level = torch.arange(len(states)).repeat_interleave(len(end))
        prompt, target = torch.arange(len(end)).repeat(len(states)), end.repeat(len(states), 1, 1, 1)
        parts.append(Rows(x=torch.cat(states), target=target, level=level, prompt=prompt, tokens=tokens, pooled=pooled))
        print(f"teacher {start + len(tokens)}/{n} {time.time() - began:.0f}s", flush=True)
    return join(parts)


def draws(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))


# Student


def levels(denoiser: Denoiser, level: Tensor) -> tuple[Tensor, Tensor]:
    """Signal and noise of the levels, each in the shape of `level` with three axes of one behind it."""
    signal, noise = denoiser.process.coefficients((torch.tensor(TIMESTEPS)[level.reshape(-1)] + 1) / denoiser.process.steps)
    return tuple(part.reshape(*level.shape, 1, 1, 1) for part in (signal, noise))


def picture(denoiser: Denoiser, x: Tensor, level: Tensor, cond: Cond) -> Tensor:
    """The clean latent that the denoiser sees in `x` [N, 4, 16, 16] at TIMESTEPS[level], `level` [N]."""
    signal, noise = levels(denoiser, level)
    return (x - noise * predict(denoiser, x, torch.tensor(TIMESTEPS)[level], cond)) / signal


def train(denoiser: Denoiser, rows: Rows, seed: int, steps: int, lr: float) -> None:
    """Regress pictures under a pseudo-Huber loss with AdamW; the average of the weights stays in the denoiser.

    An error of the noise is one of the picture times noise/signal, 66 at the first level and 0.8 at the last. Weights of its
    inverse root stand between equal shares of the loss and equal shares of the gradient.
    """
    parameters = list(trained(denoiser.module).values())
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    average = [p.detach().clone() for p in parameters]
    signal, noise = (part.flatten() for part in levels(denoiser, torch.arange(len(TIMESTEPS))))
    weight = (signal / noise).sqrt()
    weight /= weight.mean()
    began, errors, counts = time.time(), torch.zeros(len(TIMESTEPS)), torch.zeros(len(TIMESTEPS))
    for step in range(steps):
        chosen = torch.randint(len(rows.x), (BATCH,), generator=draws(seed, 3, step))
        level = rows.level[chosen]
        error = (picture(denoiser, rows.x[chosen], level, rows.cond(chosen)) - rows.target[chosen]).square().mean((1, 2, 3))
        loss = (weight[level] * ((error + HUBER**2).sqrt() - HUBER)).mean()
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - min(0.98, (1 + step) / (10 + step)))
        errors.index_add_(0, level, error.detach())
        counts.index_add_(0, level, torch.ones(BATCH))
        if (step + 1) % 50 == 0:
            found = ", ".join(f"{x:.3f}" for x in (errors / counts).sqrt())
            print(f"step {step + 1}/{steps} RMS error {found} {time.time() - began:.0f}s", flush=True)
            errors.zero_(), counts.zero_()
    for p, mean in zip(parameters, average, strict=True):
        p.data.copy_(mean)


# Files


def export(denoiser: Denoiser, folder: Path, options: argparse.Namespace) -> Path:
    """The LoRA in diffusers' layout and half precision; alpha is the rank, so readers need not know it."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{denoiser.component}.{name}": x.half().contiguous() for name, x in lora_state(denoiser).items()}
    said = {"base_model": options.model.name, "rank": options.rank, "alpha": options.rank, "guidance_scale": options.guidance,
            "timesteps": " ".join(map(str, TIMESTEPS)), "seed": options.seed}
    file = folder / f"{STEM}.safetensors"
    save_file(tensors, file, metadata={"format": "pt", **{name: str(value) for name, value in said.items()}})
    file.chmod(0o644)
    return file


def kept(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors in the file, made and written first where it is not there."""
    if not path.exists():
        save_file({name: x.detach().contiguous() for name, x in make().items()}, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    return load_file(path)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("assets/tiny-sdxl"))
    parser.add_argument("--out", type=Path, default=Path("assets/tiny-sdxl-lcm"))
    parser.add_argument("--work", type=Path, default=Path("outputs/tiny-sdxl-lcm"), help="the ODEs, to continue from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance", type=float, default=1.5, help="of the teacher; the student needs none")
    parser.add_argument("--rank", type=int, default=8, help="of the LoRA, on every linear and convolution layer")
    parser.add_argument("--prompts", type=int, default=1536, help="ODEs of the teacher")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--lr", type=float, default=3e-3)
    return parser.parse_args()


def main() -> None:
    options = read_options()
    options.work.mkdir(parents=True, exist_ok=True)
    began = time.time()
    denoiser = load_denoiser(ModelSpec(pretrained_model_name_or_path=str(options.model)))
    teacher = Teacher(options.model, options.guidance)
    rows = Rows(**kept(options.work / "teacher.safetensors",
                       lambda: vars(teacher_rows(denoiser, teacher, options.seed, options.prompts))))
    layers = tuple(name for name, layer in denoiser.module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d))
    attach(denoiser, LoRA(rank=options.rank, target_modules=layers), seed=options.seed)
    train(denoiser, rows, options.seed, options.steps, options.lr)
    file = export(denoiser, options.out, options)
    print(f"{file}: {file.stat().st_size:,} bytes, {time.time() - began:.0f}s", flush=True)


if __name__ == "__main__":
    main()
