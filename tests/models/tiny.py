"""Tiny random pipelines of every family, as folders that stock diffusers loads. No download, a second or two each."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from torch import Tensor

from diffalign import _compat  # noqa: F401
from diffalign.models import ModelSpec, load_denoiser, load_encoders, load_pipeline
from diffalign.types import Cond

LENGTH = 12
PROMPT = "a red ring"


def make(family: str, folder: Path, *, prediction: str = "epsilon", t5: bool = True) -> Path:
    torch.manual_seed(0)
    pipe = {"sd": _sd, "sdxl": _sdxl, "sd3": _sd3}[family](folder, prediction, t5)
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            _spread(module)
    pipe.save_pretrained(folder / "pipeline", safe_serialization=True)
    return folder / "pipeline"


def _spread(module: torch.nn.Module) -> None:
    """Text encoders and position embeddings start near zero; larger weights make a wrong input visible in the output."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.05 * torch.randn(p.shape))


def _tokenizer(folder: Path, kind: str):
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    folder = folder / kind
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=LENGTH)


def _t5_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "red": 4, "ring": 5}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
                                   model_max_length=LENGTH)


def _clip(hidden: int, projection: bool):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(vocab_size=54, hidden_size=hidden, intermediate_size=16, num_hidden_layers=3,
                            num_attention_heads=2, max_position_embeddings=LENGTH, projection_dim=hidden, bos_token_id=52,
                            eos_token_id=53, pad_token_id=53)
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def _vae(channels: int = 4, shift: float | None = None):
    from diffusers import AutoencoderKL

    return AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
                         up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=channels, shift_factor=shift,
                         sample_size=16, scaling_factor=0.3).eval()


def _unet(cross: int, **extra):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(block_out_channels=(8, 16), layers_per_block=1, sample_size=8, norm_num_groups=4,
                                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=4,
                                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=cross,
                                **extra).eval()


def _betas(prediction: str) -> dict:
    return {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": prediction,
            "steps_offset": 1}


def _sd(folder: Path, prediction: str, t5: bool):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **_betas(prediction))
    return StableDiffusionPipeline(vae=_vae(), text_encoder=_clip(8, False), tokenizer=_tokenizer(folder, "one"),
                                   unet=_unet(8), scheduler=scheduler, safety_checker=None, feature_extractor=None,
                                   requires_safety_checker=False)


def _sdxl(folder: Path, prediction: str, t5: bool):
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    unet = _unet(20, addition_embed_type="text_time", addition_time_embed_dim=32,
                 projection_class_embeddings_input_dim=6 * 32 + 12, transformer_layers_per_block=1)
    return StableDiffusionXLPipeline(
        vae=_vae(), text_encoder=_clip(8, False), text_encoder_2=_clip(12, True), tokenizer=_tokenizer(folder, "one"),
        tokenizer_2=_tokenizer(folder, "two"), unet=unet, add_watermarker=False,
        scheduler=EulerDiscreteScheduler(timestep_spacing="leading", **_betas(prediction)))


def _sd3(folder: Path, prediction: str, t5: bool):
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import T5Config, T5EncoderModel

    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=8, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=24, out_channels=8,
        pos_embed_max_size=16, dual_attention_layers=(0,), qk_norm="rms_norm").eval()
    config = T5Config(vocab_size=8, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=_vae(8, shift=0.1),
        text_encoder=_clip(12, True), text_encoder_2=_clip(12, True), tokenizer=_tokenizer(folder, "one"),
        tokenizer_2=_tokenizer(folder, "two"), text_encoder_3=T5EncoderModel(config).eval() if t5 else None,
        tokenizer_3=_t5_tokenizer() if t5 else None)


# what the tests do with a folder


def spec(folder: Path, **fields) -> ModelSpec:
    return ModelSpec(pretrained_model_name_or_path=str(folder), **fields)


def cond_of(encoders, prompt: str, pixels: int = 16) -> Cond:
    """Unconditional row first, then the prompt's: the order of the pipelines' guidance."""
    tokens, pooled = encoders.encode_prompts([prompt])
    nothing, nothing_pooled = encoders.unconditional()
    extra = {}
    if encoders.family == "sdxl":
        extra["time_ids"] = torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]] * 2, dtype=torch.float32)
    return Cond(tokens=torch.cat([nothing, tokens]), extra=extra,
                pooled=None if pooled is None else torch.cat([nothing_pooled, pooled]))


def time_of(denoiser, timestep: Tensor) -> Tensor:
    """diffusers' timestep -> our time in (0, 1]."""
    if denoiser.family == "sd3":
        return timestep / 1000
    return (timestep.double() + 1) / 1000


@torch.no_grad()
def sample(denoiser, cond: Cond, scheduler, latents: Tensor, *, steps: int = 4, guidance: float = 5.0) -> Tensor:
    """Latents drawn by our adapter and the pipeline's own scheduler, with guidance."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    x = latents * getattr(scheduler, "init_noise_sigma", 1.0)
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        raw = denoiser(torch.cat([scaled] * 2), time_of(denoiser, timestep).float().expand(2), cond)
        nothing, prompted = raw.chunk(2)
        x = scheduler.step(nothing + guidance * (prompted - nothing), timestep, x, return_dict=False)[0]
    return x


def noise(encoders, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, encoders.latent_channels, 8, 8, generator=generator)


def random_input(denoiser, n: int = 2, seed: int = 2) -> tuple[Tensor, Tensor, Cond]:
    """xt, t and cond of n rows, for tests that need no text encoder."""
    g = torch.Generator().manual_seed(seed)
    channels, width, pooled = {"sd": (4, 8, None), "sdxl": (4, 20, 12), "sd3": (8, 32, 24)}[denoiser.family]
    ids = torch.tensor([[1023.0, 768, 0, 13, 1024, 1024]]).expand(n, 6)
    cond = Cond(tokens=torch.randn(n, 7, width, generator=g), extra={"time_ids": ids} if denoiser.family == "sdxl" else {},
                pooled=None if pooled is None else torch.randn(n, pooled, generator=g))
    return torch.randn(n, channels, 8, 8, generator=g), torch.linspace(0.2, 0.9, n), cond


def perturb(parameters, seed: int = 3, scale: float = 0.1) -> None:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.add_(scale * torch.randn(p.shape, generator=g))


__all__ = ["PROMPT", "cond_of", "load_denoiser", "load_encoders", "load_pipeline", "make", "noise", "perturb",
           "random_input", "sample", "spec", "time_of"]
