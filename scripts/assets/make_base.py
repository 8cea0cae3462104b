"""Build and train the embedded tiny SDXL: a real SDXL pipeline of 2.3 M parameters that draws coloured shapes.

    OMP_NUM_THREADS=1 python scripts/assets/make_base.py --out assets/tiny-sdxl --steps 2600

About 35 minutes on one CPU core. A share of the captions is wrong on purpose (one attribute changed), so
the base draws clean scenes but follows its prompt imperfectly, as base models do, and leaves something to align.
Stages: tokenizers, autoencoder, cached latents, then UNet and text encoders together. Every stage is a function
of the seed, and a run that stopped continues from `--work`.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch

from diffalign import _compat  # noqa: F401  (before diffusers: it mends a torchvision that does not fit torch)

# isort: split
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffalign.rewards.scenes import (
    KINDS,
    PALETTE,
    SHAPES,
    SIZE,
    alter,
    caption,
    coverage,
    every_scene,
    random_scene,
    render,
)

LENGTH = 20  # tokens per caption, markers included; the longest caption has 14
HIDDEN = 48
TIME_IDS = (SIZE, SIZE, 0, 0, SIZE, SIZE)  # original size, crop, target size: what the SDXL pipeline passes
KIND_SHARES = {"single": 0.15, "position": 0.2, "pair": 0.4, "count": 0.25}
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.02, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


# Tokenizers: byte-level BPE whose merges make every word of the grammar one token; other text falls back to bytes.


def grammar_words() -> list[str]:
    captions = (caption(scene) for kind in KINDS for scene in every_scene(kind))
    return sorted({word for text in captions for word in text.split()})


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent first, until every word is one symbol."""
    split = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while pairs := [pair for symbols in split for pair in zip(symbols, symbols[1:], strict=False)]:
        best = max(sorted(set(pairs)), key=pairs.count)
        merges.append(best)
        split = [merge(symbols, best) for symbols in split]
    return merges


def merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def make_tokenizers() -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """As in SDXL: one vocabulary, the first pads with the end marker and the second with "!". END has the highest id."""
    letters = sorted(ByteLevel.alphabet())
    letters.insert(0, letters.pop(letters.index("!")))
    merges = learn_merges(grammar_words())
    symbols = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges), BEGIN, END]
    vocab = {symbol: i for i, symbol in enumerate(dict.fromkeys(symbols))}
    return tuple(CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad, model_max_length=LENGTH) for pad in (END, "!"))


# Models


def make_text_encoder(kind: type[nn.Module], tokenizer: CLIPTokenizer) -> nn.Module:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        projection_dim=HIDDEN,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = kind(config)
    # CLIP's 0.02 would hand the UNet a context near zero (hidden_states[-2] is not normalised), which learns slowly.
    for name, weight in model.named_parameters():
        if "token_embedding" in name or "position_embedding" in name:
            nn.init.normal_(weight, std=0.7 if "token" in name else 0.3)
    return model


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=2,
        norm_num_groups=8,
        use_linear_projection=True,
        cross_attention_dim=2 * HIDDEN,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=HIDDEN + 16 * len(TIME_IDS),
    )


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=SIZE,
        latent_channels=4,
        block_out_channels=(16, 24, 48),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=8,
        mid_block_add_attention=False,
        force_upcast=False,
    )


# Autoencoder


def pictures(rng: np.random.Generator, n: int) -> tuple[Tensor, list[str], list[str]]:
    """`n` rendered scenes, float [n, 3, 64, 64] in [-1, 1], with their true captions and a wrong one for each."""
    kinds = rng.choice(list(KIND_SHARES), size=n, p=list(KIND_SHARES.values()))
    scenes = [random_scene(rng, kind) for kind in kinds]
    pixels = torch.from_numpy(np.stack([render(scene, rng) for scene in scenes]))
    wrong = [caption(alter(scene, rng)) for scene in scenes]
    return pixels.permute(0, 3, 1, 2) / 127.5 - 1, [caption(scene) for scene in scenes], wrong


def clutter(rng: np.random.Generator, n: int) -> Tensor:
    """`n` pictures of overlapping shapes, as `pictures` returns them. Scenes alone teach an autoencoder to guess
    colours from the background; in clutter only the pixels themselves tell, and it learns faster.
    """
    palette = np.asarray(list(PALETTE.values()), np.float32)
    canvas = palette[rng.integers(len(palette), size=n)][:, None, None].repeat(SIZE, 1).repeat(SIZE, 2)
    for picture in canvas:
        for colour in palette[rng.integers(len(palette), size=rng.integers(5, 10))]:
            cover = coverage(str(rng.choice(SHAPES)), *rng.uniform(0, SIZE, 2), rng.uniform(6, 16), fine=2)
            picture += cover[..., None] * (colour - picture)
    return torch.from_numpy(canvas).permute(0, 3, 1, 2) / 127.5 - 1


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train_vae(seed: int, steps: int, batch: int = 16) -> AutoencoderKL:
    """Reconstruct clutter, later half scenes, under a light KL; the scaling factor is one over the latents' deviation."""
    vae = make_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    began = time.time()
    for step in range(steps):
        rng = np.random.default_rng([seed, 1, step])
        scenes = 0 if step < steps // 2 else batch // 2
        x = torch.cat([clutter(rng, batch - scenes), *([pictures(rng, scenes)[0]] if scenes else [])])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            decoded = vae.decode(posterior.sample(torch.Generator().manual_seed(step))).sample.float()
        error = decoded - x
        loss = error.abs().mean() + error.square().mean() + 1e-3 * posterior.kl().float().mean() / posterior.mean[0].numel()
        update(optimizer, vae.parameters(), loss, learning_rate(step, steps, 2e-3, 50))
        if step % 100 == 0:
            print(f"vae {step}/{steps} L1 {error.abs().mean():.4f} {time.time() - began:.0f}s", flush=True)
    x, *_ = pictures(np.random.default_rng([seed, 2]), 256)
    with torch.no_grad():
        vae.register_to_config(scaling_factor=float(1 / vae.encode(x).latent_dist.sample().std()))
    return vae


def polish_decoder(vae: AutoencoderKL, seed: int, steps: int, batch: int = 16) -> None:
    """Sharpen the decoder on scenes, in full precision. The encoder stays, so latents and their scale do too."""
    parameters = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    for step in range(steps):
        x, *_ = pictures(np.random.default_rng([seed, 4, step]), batch)
        with torch.no_grad():
            latents = vae.encode(x).latent_dist.sample(torch.Generator().manual_seed(step))
        error = vae.decode(latents).sample - x
        loss = error.abs().mean() + error.square().mean()
        update(optimizer, parameters, loss, learning_rate(step, steps, 1e-3, 20))
        if step % 50 == 0:
            print(f"decoder {step}/{steps} L1 {error.abs().mean():.4f}", flush=True)


def update(optimizer: torch.optim.Optimizer, parameters: object, loss: Tensor, lr: float) -> None:
    optimizer.param_groups[0]["lr"] = lr
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, seed: int, n: int, wrong_share: float) -> tuple[Tensor, list[str]]:
    """Posterior mean and deviation of `n` scenes, [n, 2, 4, 16, 16] in scaled units, and their captions."""
    rows, captions = [], []
    for start in range(0, n, 64):
        rng = np.random.default_rng([seed, 3, start])
        x, right, wrong = pictures(rng, 64)
        posterior = vae.encode(x).latent_dist
        rows.append(torch.stack([posterior.mean, posterior.std], dim=1) * vae.config.scaling_factor)
        lied = rng.random(64) < wrong_share
        captions += [w if lie else r for r, w, lie in zip(right, wrong, lied, strict=True)]
    return torch.cat(rows), captions


# UNet and text encoders


class Base(nn.Module):
    """What trains together: the UNet and both text encoders, conditioned exactly as the SDXL pipeline does it."""

    def __init__(self, tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]) -> None:
        super().__init__()
        self.text_encoder = make_text_encoder(CLIPTextModel, tokenizers[0])
        self.text_encoder_2 = make_text_encoder(CLIPTextModelWithProjection, tokenizers[1])
        self.unet = make_unet()

    def forward(self, xt: Tensor, t: Tensor, ids: Tensor, kept: Tensor) -> Tensor:
        """Predicted noise [N, 4, 16, 16]; `ids` [N, 2, 20] tokens; where not `kept` [N], all embeddings are zero."""
        one = self.text_encoder(ids[:, 0], output_hidden_states=True)
        two = self.text_encoder_2(ids[:, 1], output_hidden_states=True)
        words = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1) * kept[:, None, None]
        times = torch.tensor([TIME_IDS], dtype=xt.dtype).expand(len(xt), -1)
        added = {"text_embeds": two.text_embeds * kept[:, None], "time_ids": times}
        return self.unet(xt, t, words, added_cond_kwargs=added).sample


def draw_loss(
    base: Base, latents: Tensor, ids: Tensor, process: DDPMScheduler, options: argparse.Namespace, step: int
) -> Tensor:
    """Noise error of one batch, every draw a function of (seed, step)."""
    batch, seed = options.batch, options.seed
    draw = torch.Generator().manual_seed(seed * 1_000_003 + step)
    rows = torch.randint(len(latents), (batch,), generator=draw)
    t = torch.randint(1000, (batch,), generator=draw)
    mean, std = latents[rows].unbind(1)
    x0 = mean + std * torch.randn(mean.shape, generator=draw)
    noise = torch.randn(mean.shape, generator=draw)
    kept = (torch.rand(batch, generator=draw) >= 0.1).float()
    error = base(process.add_noise(x0, noise, t), t, ids[rows], kept) - noise
    snr = process.alphas_cumprod[t] / (1 - process.alphas_cumprod[t])
    return (error.square().mean((1, 2, 3)) * loss_weight(snr, late=step >= options.late)).mean()


def loss_weight(snr: Tensor, *, late: bool) -> Tensor:
    """Min-SNR weights with gamma 5. Late in training, up to 15 times more where the picture is nearly noise: colours
    and counts are decided there, and a small error in the noise is a large one (by 1/sqrt(snr)) in the picture.
    """
    weight = (5 / snr).clamp(max=1)
    return weight * snr.rsqrt().clamp(1, 15) if late else weight


def train(base: Base, latents: Tensor, ids: Tensor, options: argparse.Namespace, export: object) -> None:
    """AdamW with an average of the weights; `export(ema)` runs at each checkpoint and at the end."""
    process = DDPMScheduler(**SCHEDULE)
    parameters = list(base.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    ema = [p.detach().clone() for p in parameters]
    first = resume(options.work / "state.safetensors", parameters, ema, optimizer)
    began, losses = time.time(), []
    for step in range(first, options.steps):
        loss = draw_loss(base, latents, ids, process, options, step)
        update(optimizer, parameters, loss, learning_rate(step, options.steps, options.lr, 200))
        torch._foreach_lerp_(ema, [p.detach() for p in parameters], 1 - min(0.998, (1 + step) / (10 + step)))
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            pace = (time.time() - began) / (step + 1 - first)
            print(f"step {step + 1}/{options.steps} loss {np.mean(losses[-50:]):.4f} {pace:.3f} s/step", flush=True)
        if (step + 1) % 500 == 0 or step + 1 == options.steps:
            checkpoint(options.work / "state.safetensors", step + 1, parameters, ema, optimizer)
            export(ema)


def checkpoint(path: Path, step: int, parameters: list, ema: list, optimizer: torch.optim.Optimizer) -> None:
    # The first text encoder's last layer never learns (SDXL reads hidden_states[-2]), so it has no moments.
    moments = {k: [optimizer.state[p].get(k, torch.zeros(())) for p in parameters] for k in ("exp_avg", "exp_avg_sq")}
    kinds = {"weight": parameters, "ema": ema, **moments}
    tensors = {f"{kind}.{i}": v.detach().contiguous() for kind, values in kinds.items() for i, v in enumerate(values)}
    save_file({**tensors, "step": torch.tensor(step)}, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def resume(path: Path, parameters: list, ema: list, optimizer: torch.optim.Optimizer) -> int:
    """Fill weights, average and moments from the checkpoint, where there is one; the step to go on with."""
    if not path.exists():
        return 0
    saved = load_file(path)
    for i, p in enumerate(parameters):
        p.data.copy_(saved[f"weight.{i}"])
        ema[i].copy_(saved[f"ema.{i}"])
        moments = {k: saved[f"{k}.{i}"] for k in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": torch.tensor(float(saved["step"])), **moments}
    return int(saved["step"])


# Pipeline


def save_pipeline(base: Base, ema: list[Tensor], vae: AutoencoderKL, tokenizers: tuple, out: Path) -> None:
    """Write the averaged weights as a stock pipeline. UNet and VAE are stored in half precision: diffusers loads
    them in float32 unless told otherwise. transformers keeps the stored precision, so text encoders stay float32.
    """
    averaged = Base(tokenizers)
    for p, mean in zip(averaged.parameters(), ema, strict=True):
        p.data.copy_(mean)
    half_vae = make_vae().half()
    half_vae.load_state_dict(vae.state_dict())
    half_vae.register_to_config(scaling_factor=vae.config.scaling_factor)
    StableDiffusionXLPipeline(
        vae=half_vae,
        text_encoder=averaged.text_encoder,
        text_encoder_2=averaged.text_encoder_2,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=averaged.unet.half(),
        scheduler=EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="leading", steps_offset=1),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    ).save_pretrained(out, safe_serialization=True)


def tokenize(tokenizers: tuple, captions: list[str]) -> Tensor:
    """Token ids of both tokenizers, [N, 2, 20]."""
    padded = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    return torch.stack([tokenizer(captions, **padded).input_ids for tokenizer in tokenizers], dim=1)


def load_or_train_vae(options: argparse.Namespace) -> AutoencoderKL:
    folder = options.work / "vae"
    if not folder.exists():
        torch.manual_seed(options.seed)
        vae = train_vae(options.seed, options.vae_steps)
        polish_decoder(vae, options.seed, options.decoder_steps)
        vae.save_pretrained(folder)
    return AutoencoderKL.from_pretrained(folder).eval().requires_grad_(False)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("assets/tiny-sdxl"))
    parser.add_argument("--work", type=Path, default=Path("outputs/tiny-sdxl"), help="checkpoints, to resume from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--late", type=int, default=1500, help="step from which noisy pictures weigh more")
    parser.add_argument("--vae-steps", type=int, default=800)
    parser.add_argument("--decoder-steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--scenes", type=int, default=24576, help="pictures encoded once and kept")
    parser.add_argument("--wrong-share", type=float, default=0.28, help="captions with one attribute changed")
    return parser.parse_args()


def main() -> None:
    options = read_options()
    options.work.mkdir(parents=True, exist_ok=True)
    tokenizers = make_tokenizers()
    vae = load_or_train_vae(options)
    latents, captions = encode_pictures(vae, options.seed, options.scenes, options.wrong_share)
    print(f"{len(latents)} scenes encoded, deviation {latents[:, 0].std():.3f}", flush=True)
    torch.manual_seed(options.seed)
    base = Base(tokenizers)
    print({name: sum(p.numel() for p in part.parameters()) for name, part in base.named_children()}, flush=True)
    export = lambda ema: save_pipeline(base, ema, vae, tokenizers, options.out)  # noqa: E731
    train(base, latents, tokenize(tokenizers, captions), options, export)


if __name__ == "__main__":
    main()
