"""One path of the benchmark, a process of its own: it trains when it is its turn, and says how long that took."""

from __future__ import annotations

import copy
import io
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from .work import AGAIN, WARM


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
    """The worker's side of the pipe: a line in ("go", "stages", "profile", "end"), a line of JSON out."""

    def __init__(self, clock: Clock, steps: int, out):
        self.clock, self.steps, self.out, self.left, self.started, self.order = clock, steps, out, WARM, None, None
        self.note: str | None = None  # why a lever did not take hold
        self.profiler = None

    def step(self) -> None:
        """After every step: at the end of a turn report, then wait for the next."""
        self.left -= 1
        if self.left == self.steps and self.started is None and self.order:
            self.begin()
        if self.left:
            return
        self.clock.wait()
        if self.order:
            taken = {"seconds": time.perf_counter() - self.started, "stages": self.clock.seconds}
            self.say(taken | ({"profile": self.ended()} if self.order == "profile" else {}))
        else:
            reset_peak(self.clock.device)
            self.say({"ready": True, "note": self.note})
        self.next()

    def next(self, again: int = AGAIN) -> None:
        """Wait for a turn, holding no more than weights meanwhile. again: steps before its clock runs."""
        self.clock.on = False
        release(self.clock.device)
        self.order = sys.stdin.readline().strip()
        if self.order not in ("go", "stages", "profile"):
            self.say({"peak": peak(self.clock.device)})
            os._exit(0)
        self.left, self.started = again + self.steps, None
        if not again:
            self.begin()

    def begin(self) -> None:
        self.clock.wait()
        if self.order == "profile":
            import torch
            self.profiler = torch.profiler.profile()
            self.profiler.start()
        self.clock.on, self.clock.seconds, self.started = self.order == "stages", {}, time.perf_counter()

    def ended(self) -> str:
        """The profiler's table."""
        self.profiler.stop()
        by = "self_cuda_time_total" if self.clock.device.type == "cuda" else "self_cpu_time_total"
        return self.profiler.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=60)

    def after_step(self, state, report) -> None:  # a hook of the training loop
        self.step()

    def say(self, what: dict) -> None:
        print(json.dumps(what), file=self.out, flush=True)


def release(device) -> None:
    """Freed blocks back to the device, where the other paths need them."""
    if device.type == "cuda":
        import torch
        torch.cuda.empty_cache()


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
    size, device = recipe.train.train_batch_size, accelerator.device
    dtype, stored = parts.precision_of(recipe)
    denoiser, encoders = load_denoiser(recipe.model, dtype=stored, device=device), load_encoders(recipe.model, device)
    encoders.pipe.vae.to(memory_format=torch.contiguous_format)  # as it is loaded; ours has it in channels-last on a CPU
    encoders.pipe.text_encoder.to(dtype)
    encoders.pipe.text_encoder_2.to(dtype)
    unet, frozen = denoiser.module.train(), None
    if recipe.model.lora:
        attach(denoiser, recipe.model.lora, seed=0)
        parameters = list(trained(unet).values())
    else:
        frozen = copy.deepcopy(unet).to(dtype).requires_grad_(False)
        parameters = list(unet.requires_grad_(True).parameters())
    if recipe.train.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    schedule = DDPMScheduler.from_pretrained(recipe.model.pretrained_model_name_or_path, subfolder="scheduler")
    optimizer = torch.optim.AdamW(parameters, lr=recipe.train.learning_rate)
    rows = pictures(recipe.data.path)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    generator = torch.Generator().manual_seed(0)

    def predict(module, *args):
        return module(args[0].to(dtype), args[1], args[2].to(dtype), added_cond_kwargs=args[3]).sample

    def plain(*args):
        if frozen is not None:
            return predict(frozen, *args)
        bare = accelerator.unwrap_model(unet)
        bare.disable_adapters()
        try:
            return predict(unet, *args)
        finally:
            bare.enable_adapters()

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
            error = F.mse_loss(predict(unet, *given).float(), noise, reduction="none").mean(dim=(1, 2, 3))
        with clock.stage("reference"), torch.no_grad():
            base = F.mse_loss(plain(*given).float(), noise, reduction="none").mean(dim=(1, 2, 3))
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
    if recipe.train.compile != "off":
        turns.note = parts.compiled(recipe, bank, stored, accelerator)
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
            turns.next(again=0)
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


# --- levers: what is changed in the live path, and nothing else ---------------------------------------------------------

def channels_last():
    """The denoiser's weights, and with them its activations, in channels-last."""
    import torch

    from diffalign.run import parts
    base_of = parts.base_of

    def arranged(*args):
        denoiser = base_of(*args)
        denoiser.module.to(memory_format=torch.channels_last)
        return denoiser
    parts.base_of = arranged
    return nullcontext()


def attention(kind: str):
    """torch's own attention by one backend alone."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    return sdpa_kernel(getattr(SDPBackend, kind))


def search_kernels():
    """cuDNN times its algorithms for every shape, and takes the fastest."""
    import torch
    torch.backends.cudnn.benchmark = True
    return nullcontext()


def one_by_one():
    """AdamW's plain loop over tensors, neither fused nor in lists."""
    import torch
    adamw = torch.optim.AdamW
    torch.optim.AdamW = lambda params, fused=None, **options: adamw(params, fused=False, foreach=False, **options)
    return nullcontext()


LEVERS = {  # name: options of the recipe, or a function that arranges it and gives a context
    "checkpointing": ("train.gradient_checkpointing=true",),
    "selective": ("train.gradient_checkpointing=selective",),
    "compile": ("train.compile=on",),
    "xformers": ("train.enable_xformers_memory_efficient_attention=true",),
    "adamw_8bit": ("train.optimizer=adamw_8bit",),
    "no_tf32": ("train.allow_tf32=false",),
    "feed_ahead": ("train.dataloader_num_workers=1",),
    "channels_last": channels_last,
    "cudnn_search": search_kernels,
    "plain_adamw": one_by_one,
    "math_attention": lambda: attention("MATH"),
    "flash_attention": lambda: attention("FLASH_ATTENTION"),
    "efficient_attention": lambda: attention("EFFICIENT_ATTENTION"),
    "cudnn_attention": lambda: attention("CUDNN_ATTENTION"),
}


def work(path: str, file: Path, steps: int) -> None:
    """A worker. path: "usual", "live", "measured", "encode", or "live+" and a lever. What libraries print goes nowhere:
    standard output is the pipe."""
    out, sys.stdout = sys.stdout, open(os.devnull, "w")  # noqa: SIM115  (lives as long as the process)
    from diffalign.cli import _quiet_libraries
    _quiet_libraries()
    import torch

    from diffalign.config import load_recipe
    if not torch.cuda.is_available():
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    name, _, lever = path.partition("+")
    folder, change = file.parent / path, LEVERS.get(lever, ())
    folder.mkdir(exist_ok=True)
    options = change if isinstance(change, tuple) else ()
    recipe = load_recipe(file, [f"output_dir={folder}", f"data.cache_dir={file.parent / name / 'cache'}", *options])
    turns = Turns(Clock(torch.device("cuda" if torch.cuda.is_available() else "cpu")), steps, out)
    with nullcontext() if isinstance(change, tuple) else change():
        {"usual": usual, "live": ours, "measured": ours, "encode": encode}[name](recipe, turns)
