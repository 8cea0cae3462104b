"""Pairs per second of Diffusion-DPO: the usual recipe beside diffalign with a live and with a measured reference.

    python scripts/bench_train.py [--model sdxl] [--rounds 5] [--steps 4] [--json FILE]

Call it from the repository root. Each path is a process of its own that waits for its turn: a round lets one after another
train so many steps, so that a busy machine slows all of them alike, and ratios are medians over rounds. "usual" is what public
scripts do (diffusers' train_diffusion_dpo_sdxl.py, written anew): VAE and text encoders in the loop, policy and reference one
after the other, eager. Encoding is timed on as many pairs a round and counted once over --epochs. A measured reference costs a
pass a pair and visit, which a sweep pays once; the table of sweeps says what that makes.
--model tiny is the embedded model; sdxl has random weights in the published shapes (written to --work, 7 GB) and random
pictures; narrow has SDXL's layers, all of them thin, on small pictures: what is left is the host's time a layer.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

PATHS = ("usual", "live", "measured", "encode")
SHOWN = ("usual", "live", "measured", "encode", "reference")
SWEEPS = (1, 2, 4, 8, 16)
WARM = 2  # steps before the clock runs


# --- the clock of a worker --------------------------------------------------------------------------------------------

class Clock:
    """Seconds by stage while it is on; calls pass through otherwise. The device is waited for at both ends of a stage."""

    def __init__(self, device):
        self.device, self.on, self.seconds = device, False, {}

    def wait(self) -> None:
        if self.device.type == "cuda":
            import torch
            torch.cuda.synchronize(self.device)

    @contextmanager
    def stage(self, name: str):
        if not self.on:
            yield
            return
        self.wait()
        start = time.perf_counter()
        yield
        self.wait()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def watch(self, owner, attribute: str, name: str | Callable[..., str]) -> None:
        """Replace a method by itself under the clock."""
        method = getattr(owner, attribute)

        def timed(*args, **kwargs):
            with self.stage(name if isinstance(name, str) else name(*args)):
                return method(*args, **kwargs)
        setattr(owner, attribute, timed)


class Turns:
    """The worker's side of the pipe: a line in ("go", "stages", "end"), a line of JSON out."""

    def __init__(self, clock: Clock, steps: int, out):
        self.clock, self.steps, self.out, self.done, self.left, self.started = clock, steps, out, 0, WARM, None

    def step(self) -> None:
        """After every step: at the end of a turn report, then wait for the next."""
        self.left -= 1
        if self.left:
            return
        self.clock.wait()
        if self.started is not None:
            self.say({"seconds": time.perf_counter() - self.started, "stages": self.clock.seconds})
        else:
            reset_peak(self.clock.device)
            self.say({"ready": True})
        self.next()

    def next(self) -> None:
        order = sys.stdin.readline().strip()
        if order not in ("go", "stages"):
            self.say({"peak": peak(self.clock.device)})
            os._exit(0)
        self.clock.on, self.clock.seconds, self.left = order == "stages", {}, self.steps
        self.started = time.perf_counter()

    def after_step(self, state, report) -> None:  # a hook of the training loop
        self.step()

    def say(self, what: dict) -> None:
        print(json.dumps(what), file=self.out, flush=True)


def reset_peak(device) -> None:
    if device.type == "cuda":
        import torch
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's own high-water mark of resident memory


def peak(device) -> int:
    """Bytes since ``reset_peak``: allocated on CUDA, resident on the CPU."""
    if device.type == "cuda":
        import torch
        return torch.cuda.max_memory_allocated(device)
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


# --- the paths ------------------------------------------------------------------------------------------------------

def usual(recipe, turns: Turns) -> None:
    """The public scripts' loop: one pair batch at a time through VAE, text encoders, policy, reference, backward."""
    import torch
    import torch.nn.functional as F
    from diffusers import DDPMScheduler

    from diffalign.models import attach, load_denoiser, load_encoders
    from diffalign.models.lora import trained
    from diffalign.run import parts
    from diffalign.train import make_accelerator

    accelerator, clock = make_accelerator(recipe.train, Path(recipe.output_dir)), turns.clock
    size = recipe.train.train_batch_size
    device, dtype = accelerator.device, parts.precision_of(recipe)[1]
    denoiser, encoders = load_denoiser(recipe.model, dtype=dtype, device=device), load_encoders(recipe.model, device)
    encoders.pipe.vae.to(memory_format=torch.contiguous_format)  # as it is loaded; ours has it in channels-last on a CPU
    encoders.pipe.text_encoder.to(dtype)
    encoders.pipe.text_encoder_2.to(dtype)
    attach(denoiser, recipe.model.lora, seed=0)
    unet = denoiser.module.train()
    if recipe.train.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    parameters = list(trained(unet).values())
    schedule = DDPMScheduler.from_pretrained(recipe.model.pretrained_model_name_or_path, subfolder="scheduler")
    optimizer = torch.optim.AdamW(parameters, lr=recipe.train.learning_rate)
    rows = pictures(recipe.data.path)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    generator = torch.Generator().manual_seed(0)

    def predict(*args):
        return unet(args[0].to(dtype), args[1], args[2].to(dtype), added_cond_kwargs=args[3]).sample

    while True:
        with clock.stage("data"):
            picked = [next(rows) for _ in range(size)]
            pixels = torch.cat([torch.stack([pair[side] for pair, _ in picked]) for side in (0, 1)]).to(device)
        with clock.stage("vae"), torch.no_grad():
            latents = torch.cat([encoders.pipe.vae.encode(part).latent_dist.sample() for part in pixels.split(8)])
            latents = latents * encoders.scaling_factor
        with clock.stage("text"):
            embedded = encoders.encode_prompts([text for _, text in picked])
            tokens, pooled = (x.repeat(2, *[1] * (x.dim() - 1)) for x in embedded)
        noise = torch.randn(latents[:size].shape, generator=generator).to(device).repeat(2, 1, 1, 1)
        t = torch.randint(0, schedule.config.num_train_timesteps, (size,), generator=generator).to(device).repeat(2)
        side = pixels.shape[-1]
        ids = torch.tensor([[side, side, 0, 0, side, side]], device=device, dtype=dtype).repeat(2 * size, 1)
        given = schedule.add_noise(latents, noise, t), t, tokens, {"text_embeds": pooled.to(dtype), "time_ids": ids}
        with clock.stage("policy"):
            error = F.mse_loss(predict(*given).float(), noise, reduction="none").mean(dim=(1, 2, 3))
        with clock.stage("reference"):
            plain = accelerator.unwrap_model(unet)
            plain.disable_adapters()
            with torch.no_grad():
                base = F.mse_loss(predict(*given).float(), noise, reduction="none").mean(dim=(1, 2, 3))
            plain.enable_adapters()
        (winner, loser), (base_winner, base_loser) = error.chunk(2), base.chunk(2)
        inside = -0.5 * recipe.objective.beta * ((winner - loser) - (base_winner - base_loser))
        loss = -F.logsigmoid(inside).mean()
        with clock.stage("backward"):
            accelerator.backward(loss)
        with clock.stage("optimizer"):
            accelerator.clip_grad_norm_(parameters, recipe.train.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        _ = {"loss": loss.item(), "implicit_acc": (inside > 0).float().mean().item()}
        turns.step()


def pictures(path: str) -> Iterator:
    """(winner, loser as [3, H, W] in [-1, 1], prompt), shuffled, decoded when asked for, for ever."""
    import numpy as np
    import pyarrow.parquet as pq
    import torch
    from PIL import Image

    def tensor(content: bytes):
        return torch.from_numpy(np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))).permute(2, 0, 1) / 127.5 - 1

    rows, order = [row for row in pq.read_table(path).to_pylist() if row["label_0"] != 0.5], np.random.default_rng(0)
    while True:
        for i in order.permutation(len(rows)):
            pair = [tensor(rows[i][name]) for name in ("jpg_0", "jpg_1")]
            yield pair if rows[i]["label_0"] == 1 else pair[::-1], rows[i]["caption"]


def ours(recipe, turns: Turns) -> None:
    """``diffalign train`` without its reports; with the reference's errors where they were measured."""
    from diffalign.run import parts, reference
    from diffalign.train import fit, make_accelerator
    from diffalign.world import Single

    accelerator, clock = make_accelerator(recipe.train, Path(recipe.output_dir)), turns.clock
    cache, _ = parts.caches(recipe, accelerator, lambda line: None)
    stored, method = parts.stored_of(recipe, cache, Single()), parts.method_of(recipe)
    stored.reference = reference.find(recipe, cache, stored, accelerator.device, lambda line: None)
    bank = parts.bank_of(recipe, method, accelerator, cache, measured=stored.reference is not None)
    clock.watch(stored, "take", "data")
    clock.watch(bank, "predict", lambda name, *_: name)
    clock.watch(accelerator, "backward", "backward")
    clock.watch(accelerator, "clip_grad_norm_", "optimizer")
    prepare = accelerator.prepare_optimizer

    def prepared(optimizer):
        optimizer = prepare(optimizer)
        clock.watch(optimizer, "step", "optimizer")
        return optimizer
    accelerator.prepare_optimizer = prepared
    fit(method=method, bank=bank, source=stored, spec=recipe.train, seed=recipe.seed, output_dir=Path(recipe.output_dir),
        config={}, hooks=[turns], accelerator=accelerator, progress=False)


def encode(recipe, turns: Turns) -> None:
    """A turn encodes the data set and measures the reference's errors of as many steps as the others train: seconds a pair."""
    from diffalign import data
    from diffalign.models import load_encoders
    from diffalign.models.load import encoder_facts
    from diffalign.run import parts, reference
    from diffalign.train import make_accelerator
    from diffalign.world import Single

    accelerator, spec = make_accelerator(recipe.train, Path(recipe.output_dir)), recipe.train
    encoders, facts = load_encoders(recipe.model, accelerator.device), encoder_facts(recipe.model)
    context = reference.base_passes(recipe, accelerator)
    for number in itertools.count():
        if number == 1:  # the first turn is the warm-up
            turns.say({"ready": True})
        if number:
            turns.next()
        folder, start = Path(tempfile.mkdtemp(dir=recipe.output_dir)), time.perf_counter()
        report = data.encode(recipe.data, lambda: encoders, cache_dir=folder, resolution=recipe.data.resolution,
                             seed=recipe.seed, facts=facts, progress=False)
        encoded = time.perf_counter()
        stored = parts.stored_of(recipe, data.Cache(report.manifest), Single())
        for step in range(turns.steps):
            for batch in stored.take(step):
                reference.errors_of(recipe.likelihood, batch, context, accelerator.device)
        if number:
            turns.say({"encode": (encoded - start) / report.groups,
                       "reference": (time.perf_counter() - encoded) / (turns.steps * spec.train_batch_size),
                       "matrix_flop_per_s": matrix_rate(spec.mixed_precision)})
        shutil.rmtree(folder)


def work(path: str, file: Path, steps: int) -> None:
    """A worker. What libraries print goes nowhere: standard output is the pipe."""
    out, sys.stdout = sys.stdout, open(os.devnull, "w")  # noqa: SIM115  (lives as long as the process)
    from diffalign.cli import _quiet_libraries
    _quiet_libraries()
    import torch

    from diffalign.config import load_recipe
    if not torch.cuda.is_available():
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    folder = file.parent / path
    folder.mkdir(exist_ok=True)
    recipe = load_recipe(file, [f"output_dir={folder}", f"data.cache_dir={folder / 'cache'}"])
    turns = Turns(Clock(torch.device("cuda" if torch.cuda.is_available() else "cpu")), steps, out)
    {"usual": usual, "live": ours, "measured": ours, "encode": encode}[path](recipe, turns)


# --- what the work is --------------------------------------------------------------------------------------------------

NARROW = {"unet": {"block_out_channels": [32, 64, 64], "attention_head_dim": [1, 2, 2], "cross_attention_dim": 64,
                   "addition_time_embed_dim": 16, "projection_class_embeddings_input_dim": 6 * 16 + 32, "sample_size": 8},
          "vae": {"block_out_channels": [32, 32, 32, 32], "sample_size": 64},
          "texts": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "projection_dim": 32}}
SIDES = {"tiny": 64, "narrow": 64, "sdxl": 1024}


def sdxl(folder: Path, device: str = "cpu", narrow: bool = False) -> dict:
    """The parts of an SDXL pipeline in the published shapes, random weights; a stand-in tokenizer of single letters."""
    import torch
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from diffalign.models.published import SDXL_SCHEDULER, SDXL_TEXTS, SDXL_UNET, SDXL_VAE

    letters = [letter + end for letter in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    words = [*letters, "<|startoftext|>", "<|endoftext|>"]
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    (folder / "words").mkdir(parents=True, exist_ok=True)
    (folder / "words" / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "words" / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "words", model_max_length=77)
    thin = NARROW if narrow else {part: {} for part in NARROW}
    small, large = (CLIPTextConfig(**{**config, **thin["texts"], **ends}) for config in SDXL_TEXTS)
    scheduler = EulerDiscreteScheduler.from_config(SDXL_SCHEDULER)
    with torch.device(device):
        return {"vae": AutoencoderKL.from_config({**SDXL_VAE, **thin["vae"]}),
                "text_encoder": CLIPTextModel(small), "text_encoder_2": CLIPTextModelWithProjection(large),
                "tokenizer": tokenizer, "tokenizer_2": tokenizer,
                "unet": UNet2DConditionModel.from_config({**SDXL_UNET, **thin["unet"]}),
                "scheduler": scheduler}


def write_sdxl(folder: Path, model: str, pairs: int, side: int) -> dict:
    """The random pipeline in half precision, and pairs of random pictures: what a recipe points at."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    from diffusers import StableDiffusionXLPipeline
    from PIL import Image

    if not (folder / model / "model_index.json").exists():
        pipe = StableDiffusionXLPipeline(**sdxl(folder, "cuda" if torch.cuda.is_available() else "cpu", model == "narrow"))
        pipe.to(torch.float16 if model == "sdxl" else torch.float32).save_pretrained(folder / model, safe_serialization=True)
    random = np.random.default_rng(0)

    def picture() -> bytes:
        buffer, small = io.BytesIO(), random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC).save(buffer, "PNG")
        return buffer.getvalue()

    prompts = [" ".join(random.choice(list("abcdefgh"), 20)) for _ in range(pairs)]
    pq.write_table(pa.table({"jpg_0": [picture() for _ in prompts], "jpg_1": [picture() for _ in prompts],
                             "label_0": [1.0] * pairs, "caption": prompts}), folder / "pairs.parquet")
    return {"model": str(folder / model), "data": str(folder / "pairs.parquet")}


def write_recipe(options, work: Path) -> Path:
    import yaml

    turns, pairs = WARM + options.steps * (options.rounds + 1), max(64, options.steps * options.batch)
    if options.model != "tiny":
        places = write_sdxl(work, options.model, pairs, options.resolution)
    else:
        places = {"model": "assets/tiny-sdxl", "data": "assets/preferences/train.parquet"}
    tree = {"output_dir": str(work / "run"), "seed": 0,
            "model": {"pretrained_model_name_or_path": places["model"], "lora": {"rank": options.rank}},
            "data": {"path": places["data"], "resolution": options.resolution, "max_train_samples": pairs},
            "objective": {"kind": "dpo", "beta": 2000},
            "train": {"max_train_steps": turns, "train_batch_size": options.batch, "mixed_precision": options.precision,
                      "learning_rate": 1e-4, "checkpointing_steps": turns + 1, "resume": "never",
                      "gradient_checkpointing": options.checkpointing}}
    file = work / "recipe.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


# --- the other end of the pipes -----------------------------------------------------------------------------------------

class Worker:
    def __init__(self, path: str, file: Path, options):
        command = [sys.executable, __file__, "--worker", path, "--recipe", str(file), "--steps", str(options.steps)]
        self.path, self.log = path, file.parent / f"{path}.log"
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log.open("w"),
                                        text=True)

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"bench_train: the path '{self.path}' stopped; its output:\n{self.log.read_text()[-3000:]}")
        return json.loads(line)

    def turn(self, order: str = "go") -> dict:
        self.process.stdin.write(order + "\n")
        self.process.stdin.flush()
        return self.answer()


def prepare(file: Path) -> None:
    """Latents and text for both of diffalign's paths, the reference's errors for one: their caches lie apart."""
    folder = file.parent / "measured"
    command = [sys.executable, "-m", "diffalign", "encode", str(file), "--reference", f"output_dir={folder}"]
    done = subprocess.run([*command, f"data.cache_dir={folder / 'cache'}"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"bench_train: {done.stderr[-3000:]}")
    shutil.copytree(folder / "cache", file.parent / "live" / "cache", ignore=shutil.ignore_patterns("reference-*"))


def matrix_rate(precision: str) -> float:
    """FLOP/s of a square matrix product here, in the precision of training: the best of five."""
    import torch
    device = "cuda" if torch.cuda.is_available() else "cpu"
    n, dtype = (8192 if device == "cuda" else 1024), torch.bfloat16 if precision == "bf16" else torch.float32
    a, clock, best = torch.randn(n, n, device=device, dtype=dtype), Clock(torch.device(device)), float("inf")
    for _ in range(6):
        clock.wait()
        start = time.perf_counter()
        a @ a
        clock.wait()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def needed(model: str, rank: int, latent: int) -> tuple[int, int]:
    """FLOP a pair: of the policy's forward and backward, and of the reference's forward. Nothing recomputed."""
    import torch

    from diffalign.models import LoRA, attach
    from diffalign.models.counts import flops
    from diffalign.models.published import SDXL_SCHEDULER, SDXL_UNET, on_meta

    tiny = json.loads(Path("assets/tiny-sdxl/unet/config.json").read_text())
    config = {**SDXL_UNET, **{"sdxl": {}, "narrow": NARROW["unet"], "tiny": tiny}[model]}
    denoiser = on_meta("sdxl", config, SDXL_SCHEDULER)
    base, _ = flops(denoiser, 2, latent, latent)
    with torch.device("meta"):
        attach(denoiser, LoRA(rank=rank), seed=0)
    return flops(denoiser, 2, latent, latent)[1], base


def bench(options) -> dict:
    from diffalign.cli import _quiet_libraries
    _quiet_libraries()
    work = Path(options.work or tempfile.mkdtemp(prefix="bench_train-"))
    work.mkdir(parents=True, exist_ok=True)
    try:
        file = write_recipe(options, work)
        prepare(file)
        rounds, stages, peaks = run_rounds(file, options)
    finally:
        if not options.work:
            shutil.rmtree(work, ignore_errors=True)
    policy, reference = needed(options.model, options.rank, options.resolution // (4 if options.model == "tiny" else 8))
    return summary(options, rounds, stages, peaks, policy, reference)


def run_rounds(file: Path, options) -> tuple[list[dict], dict, dict]:
    workers = {path: Worker(path, file, options) for path in PATHS}
    for worker in workers.values():
        worker.answer()
    rounds = []
    for number in range(options.rounds):
        answers = {path: worker.turn() for path, worker in workers.items()}
        pairs = options.steps * options.batch
        rounds.append({**{path: answers[path]["seconds"] / pairs for path in PATHS[:3]},
                       **answers["encode"]})
        print(f"round {number + 1}/{options.rounds}: " + ", ".join(f"{name} {1 / rounds[-1][name]:.3g}" for name in SHOWN)
              + " pairs/s", file=sys.stderr, flush=True)
    stages = {path: workers[path].turn("stages") for path in PATHS[:3]}
    return rounds, stages, {path: worker.turn("end")["peak"] for path, worker in workers.items()}


# --- figures ------------------------------------------------------------------------------------------------------------

def spread(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "low": min(values), "high": max(values)}


def summary(options, rounds, stages, peaks, policy: int, reference: int) -> dict:
    """Ratios are taken inside a round, then their median. Seconds a pair: training, plus encoding over the epochs."""
    import torch

    epochs, paths, sweeps = options.epochs, {}, {}
    for path in PATHS[:3]:
        once = 0.0 if path == "usual" else 1 / epochs
        whole = [r[path] + once * r["encode"] for r in rounds]
        work = policy + (0 if path == "measured" else reference)
        share, total = stages[path]["stages"], stages[path]["seconds"]
        paths[path] = {
            "pairs_per_s": spread([1 / s for s in whole]), "without_encoding": spread([1 / r[path] for r in rounds]),
            "ratio": spread([r["usual"] / s for r, s in zip(rounds, whole)]), "peak_bytes": peaks[path],
            "mfu": median([work / r[path] / r["matrix_flop_per_s"] for r in rounds]),
            "stages": {**{name: s / total for name, s in share.items()}, "rest": 1 - sum(share.values()) / total}}
    for runs in SWEEPS:  # the usual recipe encodes in every run; the measured one encodes and measures once for all of them
        live = median([r["usual"] / (r["live"] + r["encode"] / epochs / runs) for r in rounds])
        measured = median([r["usual"] / (r["measured"] + (r["encode"] / epochs + r["reference"]) / runs) for r in rounds])
        sweeps[str(runs)] = {"live": live, "measured": measured}
    best = max(("live", "measured"), key=lambda path: paths[path]["ratio"]["median"])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} thread"
    return {"usual_pairs_per_s": paths["usual"]["pairs_per_s"]["median"], "best": best,
            "diffalign_pairs_per_s": paths[best]["pairs_per_s"]["median"], "ratio": paths[best]["ratio"]["median"],
            "paths": paths, "sweeps": sweeps, "encode_pairs_per_s": spread([1 / r["encode"] for r in rounds]),
            "reference_pairs_per_s": spread([1 / r["reference"] for r in rounds]),
            "flop_per_pair": {"policy": policy, "reference": reference},
            "matrix_flop_per_s": spread([r["matrix_flop_per_s"] for r in rounds]),
            "options": vars(options), "device": device, "date": time.strftime("%Y-%m-%d"),
            "versions": {"python": platform.python_version(), "torch": torch.__version__}, "rounds": rounds}


def table(found: dict) -> str:
    lines = ["| path | pairs/s, encoding included | ratio to usual (min-max) | MFU | peak memory | share of time |",
             "|---|---:|---:|---:|---:|---|"]
    for path, one in found["paths"].items():
        ratio = one["ratio"]
        stages = ", ".join(f"{name} {share:.0%}" for name, share in sorted(one["stages"].items(), key=lambda x: -x[1]))
        lines.append(f"| {path} | {one['pairs_per_s']['median']:.3g} | {ratio['median']:.2f} "
                     f"({ratio['low']:.2f}-{ratio['high']:.2f}) | {one['mfu']:.1%} | "
                     f"{one['peak_bytes'] / 2**30:.2f} GiB | {stages} |")
    lines += ["", "| runs of a sweep | live | measured, its pass included |", "|---:|---:|---:|"]
    lines += [f"| {runs} | {one['live']:.2f} | {one['measured']:.2f} |" for runs, one in found["sweeps"].items()]
    return "\n".join(lines)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=tuple(SIDES), default="tiny")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="training steps of a round")
    parser.add_argument("--batch", type=int, help="pairs of a step (16; sdxl: 4)")
    parser.add_argument("--rank", type=int, help="of the LoRA (16; sdxl: 64)")
    parser.add_argument("--precision", choices=("no", "bf16"), help="mixed precision (no; sdxl: bf16)")
    parser.add_argument("--resolution", type=int, help="pixels of a side (64; sdxl: 1024)")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, for all paths")
    parser.add_argument("--epochs", type=int, default=3, help="epochs that encoding is counted over")
    parser.add_argument("--work", help="folder for models and caches, kept; else a temporary one")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument("--worker", choices=PATHS, help=argparse.SUPPRESS)
    parser.add_argument("--recipe", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    large = options.model == "sdxl"
    options.batch = options.batch or (4 if large else 16)
    options.rank = options.rank or (64 if large else 16)
    options.resolution = options.resolution or SIDES[options.model]
    options.precision = options.precision or ("bf16" if large else "no")
    return options


def main() -> int:
    options = arguments()
    if options.worker:
        work(options.worker, options.recipe, options.steps)
        return 0
    found = bench(options)
    print(table(found))
    print(f"\nratio {found['ratio']:.2f} ({found['best']}; {found['device']})")
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1, default=str))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
