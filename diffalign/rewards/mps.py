"""MPS, the multi-dimensional preference score (Zhang et al., CVPR 2024): CLIP-H, then attention from picture to prompt words.

The condition is a fixed list of attribute words. Prompt tokens that resemble none of them are masked, picture tokens
attend to the rest through a few transformer layers, and the first picture token is compared with the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.load import loading
from .preprocess import Preprocess, score_batches
from .towers import TOKENIZER, check_tokenizer, clip_tokenizer, distinct_features, empty_clip
from .weights import check_shapes, local_file, model_folder, on_device, prefix_before, sha256, shapes, tensors

CONDITION = ("light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
             "texture, quantity, attributes, position, number, location, word, things.")
ANCHOR = "cross_model.layers.0.0.fn.to_q.weight"


class Words(NamedTuple):
    """One prompt: its tokens [L, D], which of them resemble the condition [L] bool, and the whole of it [D], normalised."""

    tokens: Tensor
    kept: Tensor
    whole: Tensor


@dataclass(frozen=True, kw_only=True)
class MPS:
    """exp(logit_scale) * cosine of the prompt and the picture as seen through it; for comparing pictures of one prompt.

    model: the published checkpoint's tensors as .safetensors (docs/rewards.md). backbone: folder or hub id of the CLIP that
    it was trained from; only its config.json and tokenizer are read. threshold: a token is kept when its similarity to the
    condition, as a share of the largest, exceeds it: 0.3 in the authors' evaluation, 0.01 in their forward pass. They take
    the largest over the batch, so that a score depends on its batch mates; here it is that of the prompt, which is theirs
    for one prompt at a time. float32 instead of their float16.
    """

    model: str | None = None
    backbone: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    revision: str | None = None
    threshold: float = 0.3
    condition: str = CONDITION
    batch_size: int = 16
    device: str | None = None
    name: ClassVar[str] = "mps"
    differentiable: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold must lie in [0, 1), got {self.threshold}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")

    def __call__(self, images: Sequence[Any], prompts: Sequence[str]) -> Tensor:
        """Scores [N] float32, NaN where a picture cannot be decoded; with gradient to float tensors that ask for it."""
        network = self._network
        texts = distinct_features(network.read, prompts, self.batch_size)
        preprocess = Preprocess(size=network.size, middle="floor")
        return score_batches(lambda x, batch: network.score(x, [texts[prompt] for prompt in batch]), preprocess, images,
                             prompts, self.batch_size)

    def check(self) -> None:
        """Raises ModelError or ConfigError unless all weights are there and fit the backbone. Nothing is loaded."""
        found = shapes([self._file])
        prefix = prefix_before(found, ANCHOR, self._file)
        found = {name.removeprefix(prefix): shape for name, shape in found.items()}
        clip = {name: tuple(value.shape) for name, value in empty_clip(self._folder).state_dict().items()}
        check_tokenizer(self._folder)
        check_shapes({name.removeprefix("model."): shape for name, shape in found.items()}, clip, self._file)
        check_shapes(found, _wanted(found, clip["visual_projection.weight"][0]), self._file)

    def identity(self) -> dict[str, Any]:
        return {"model": self.model, "sha256": sha256([self._file]), "backbone": self.backbone, "revision": self.revision,
                "threshold": self.threshold, "condition": self.condition, "scale": "exp(logit_scale) * cosine"}

    @cached_property
    def _file(self) -> Path:
        return local_file(self.model, "mps: model")

    @cached_property
    def _folder(self) -> Path:
        return model_folder(self.backbone, self.revision, ("config.json", *TOKENIZER))

    @cached_property
    def _network(self) -> Network:
        self.check()
        return load_network(self._file, self._folder, self.condition, self.threshold, on_device(self.device))


def load_network(file: Path, folder: Path, condition: str, threshold: float, device: torch.device,
                 dtype: torch.dtype = torch.float32) -> Network:
    """The network of a checked ``file``, eval and frozen, with the ``folder``'s configuration and tokenizer."""
    from transformers import CLIPConfig, CLIPModel

    values = tensors(file, prefix_before(shapes([file]), ANCHOR, file))
    with loading(file):
        config = CLIPConfig.from_pretrained(folder, local_files_only=True)
        clip = CLIPModel(config)
        names = clip.state_dict().keys()
        clip.load_state_dict({n: v for k, v in values.items() if (n := k.removeprefix("model.")) in names})
        tokenize = clip_tokenizer(folder, config.text_config.max_position_embeddings)
    depth = 1 + max(int(key.split(".")[2]) for key in values if key.startswith("cross_model.layers."))
    clip = clip.to(device, dtype).eval().requires_grad_(False)

    def half(start: str) -> dict[str, Tensor]:
        return {key.removeprefix(start): value.to(device, dtype) for key, value in values.items() if key.startswith(start)}

    layers = [{"cross": half(f"cross_model.layers.{i}.0.fn."), "own": half(f"cross_model.layers.{i}.1.fn.")}
              for i in range(depth)]
    return Network(clip=clip, tokenize=tokenize, layers=layers, condition=condition, threshold=threshold)


class Network:
    """The loaded model. clip: transformers' CLIPModel; layers: per layer, the tensors of its "cross" and "own" half."""

    def __init__(self, *, clip: Any, tokenize: Any, layers: list[dict[str, dict[str, Tensor]]], condition: str,
                 threshold: float) -> None:
        self.clip, self.tokenize, self.layers, self.threshold = clip, tokenize, layers, threshold
        self.size, self.scale = clip.config.vision_config.image_size, clip.logit_scale.exp()
        with torch.no_grad():
            self.condition = self._text([condition])[0][0]   # [L, D]

    def read(self, prompts: Sequence[str]) -> Iterator[Words]:
        tokens, whole = self._text(prompts)
        likeness = (tokens @ self.condition.T).amax(-1)   # [B, L]
        kept = likeness / likeness.amax(-1, keepdim=True) > self.threshold
        return map(Words, tokens, kept, F.normalize(whole, dim=-1))

    def score(self, pictures: Tensor, words: Sequence[Words]) -> Tensor:
        """Normalised pictures [B, 3, size, size] and the words of each one's prompt -> [B]."""
        pictures = pictures.to(self.scale.device, self.scale.dtype)
        # the tower's last states, without the norm that its pooled output gets
        x = self.clip.visual_projection(self.clip.vision_model(pictures).last_hidden_state)   # [B, 1 + patches, D]
        tokens, kept, whole = map(torch.stack, zip(*words, strict=True))
        for layer in self.layers:
            x = attend_to_words(x, tokens, kept, layer["cross"])
            x = attend_to_picture(x, layer["own"])
        return self.scale * (F.normalize(x[:, 0], dim=-1) * whole).sum(-1)

    def _text(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Projected states of all tokens [B, L, D], padding included, and of the last one [B, D]."""
        states = self.clip.text_model(self.tokenize(texts).to(self.scale.device))
        return self.clip.text_projection(states.last_hidden_state), self.clip.text_projection(states.pooler_output)


def attend_to_words(x: Tensor, context: Tensor, kept: Tensor, w: Mapping[str, Tensor]) -> Tensor:
    """x [B, N, D] plus its attention to the kept tokens [B, M] of context [B, M, D], plus a SwiGLU of the same input.

    Many query heads share one key and value head (arXiv 1911.02150).
    """
    y = _norm(x, w)
    keys, values = F.linear(context, w["to_kv.weight"]).chunk(2, dim=-1)
    queries = _heads(F.linear(y, w["to_q.weight"]), keys.shape[-1])
    seen = _attention(queries, keys, values, kept[:, None, None])
    return x + F.linear(seen, w["to_out.weight"]) + _swiglu(F.linear(y, w["ff.0.weight"]), w["ff.2.weight"])


def attend_to_picture(x: Tensor, w: Mapping[str, Tensor]) -> Tensor:
    """x [B, N, D] plus self-attention with rotary positions, plus a SwiGLU of the same input, all from one projection."""
    fused, inner, wide = w["fused_attn_ff_proj.weight"], w["attn_out.weight"].shape[1], w["ff_out.1.weight"].shape[1]
    head = (fused.shape[0] - inner - 2 * wide) // 2
    queries, keys, values, gated = F.linear(_norm(x, w), fused).split([inner, head, head, 2 * wide], dim=-1)
    turn = _angles(x.shape[1], head, x)
    seen = _attention(_rotate(_heads(queries, head), turn), _rotate(keys, turn), values, None)
    return x + F.linear(seen, w["attn_out.weight"]) + _swiglu(gated, w["ff_out.1.weight"])


def _norm(x: Tensor, w: Mapping[str, Tensor]) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w["norm.weight"], w.get("norm.bias"))


def _heads(x: Tensor, width: int) -> Tensor:
    """[B, N, H * width] -> [B, H, N, width]."""
    return x.unflatten(-1, (-1, width)).transpose(1, 2)


def _attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """queries [B, H, N, d], one head of keys and values [B, M, d] -> [B, N, H * d]."""
    keys, values = (t[:, None].expand(-1, queries.shape[1], -1, -1) for t in (keys, values))
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask).transpose(1, 2).flatten(2)


def _swiglu(x: Tensor, out: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return F.linear(F.silu(gate) * value, out)


def _angles(length: int, width: int, like: Tensor) -> Tensor:
    """Rotary angles [length, width], the same for both halves (arXiv 2104.09864)."""
    speed = 10000.0 ** (-torch.arange(0, width, 2, device=like.device, dtype=like.dtype) / width)
    angles = torch.arange(length, device=like.device, dtype=like.dtype)[:, None] * speed
    return torch.cat([angles, angles], dim=-1)


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()


def _wanted(found: Mapping[str, tuple], width: int) -> dict[str, tuple]:
    """Names and shapes of the attention layers. Heads, head width and feed-forward width are read off the first layer."""
    first = "cross_model.layers.0.0.fn."
    inner = found[ANCHOR][0]
    head = found.get(first + "to_kv.weight", (2,))[0] // 2
    wide = found.get(first + "ff.2.weight", (1, 1))[1]
    layers = {key.split(".")[2] for key in found if key.startswith("cross_model.layers.")}
    cross = {"norm.weight": (width,), "to_q.weight": (inner, width), "to_kv.weight": (2 * head, width),
             "to_out.weight": (width, inner), "ff.0.weight": (2 * wide, width), "ff.2.weight": (width, wide)}
    own = {"norm.weight": (width,), "fused_attn_ff_proj.weight": (inner + 2 * head + 2 * wide, width),
           "attn_out.weight": (width, inner), "ff_out.1.weight": (width, wide)}
    return {f"cross_model.layers.{i}.{part}.fn.{name}": shape for i in range(len(layers))
            for part, shapes in enumerate((cross, own)) for name, shape in shapes.items()}
