"""Small random CLIPs in the layouts in which the true ones are published. No download, well under a second each."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffalign import _compat  # noqa: F401

WIDTH = 12        # numbers in a feature
SIZE = 28         # side of the picture that the tiny towers read: 2 x 2 patches of 14
LENGTH = 77
CONFIG = {
    "text_config": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                    "vocab_size": 54, "max_position_embeddings": LENGTH, "bos_token_id": 52, "eos_token_id": 53,
                    "pad_token_id": 53},
    "vision_config": {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
                      "image_size": SIZE, "patch_size": 14},
    "projection_dim": WIDTH, "logit_scale_init_value": 4.6,
}
OPEN_CLIP = {"embed_dim": WIDTH,
             "vision_cfg": {"image_size": SIZE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 14},
             "text_cfg": {"context_length": LENGTH, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}}


def spread(module: torch.nn.Module) -> torch.nn.Module:
    """Larger weights than the usual start, so that a wrong input shows in the output."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name != "logit_scale":
                p.add_(0.1 * torch.randn(p.shape))
    return module.eval().requires_grad_(False)


def tokenizer_files(folder: Path) -> None:
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")


def clip_folder(folder: Path, seed: int = 0):
    """A transformers CLIPModel, saved with its tokenizer; returns the model."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    model = spread(CLIPModel(CLIPConfig(**CONFIG)))
    model.save_pretrained(folder)
    tokenizer_files(folder)
    return model


def the_open_clip():
    """open_clip, or a skipped test where it is not installed; setup.sh installs it."""
    return pytest.importorskip("open_clip", reason="open_clip is not installed: pip install diffalign[clip]")


def open_clip_file(file: Path, prefix: str = "", seed: int = 0):
    """An open_clip CLIP of the architecture "tiny", its tensors in a safetensors file; returns the model."""
    open_clip = the_open_clip()
    config = file.parent / "tiny.json"
    config.write_text(json.dumps(OPEN_CLIP))
    open_clip.add_model_config(config)
    torch.manual_seed(seed)
    model = spread(open_clip.CLIP(**OPEN_CLIP))
    save_file({prefix + key: value.clone() for key, value in model.state_dict().items()}, file)
    return model


def mps_file(file: Path, folder: Path) -> dict[str, torch.Tensor]:
    """A CLIP folder (configuration and tokenizer) and the tensors of a whole MPS model over it, 2 layers of 2 heads of 6."""
    layers, heads, head = 2, 2, 6
    clip = clip_folder(folder)
    g = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(shape, generator=g) * 0.3  # noqa: E731
    wide, inner, state = 4 * WIDTH, heads * head, {f"model.{k}": v.clone() for k, v in clip.state_dict().items()}
    state["model.text_model.embeddings.position_ids"] = torch.arange(LENGTH)[None]   # a buffer that older releases saved
    for i in range(layers):
        cross, own = f"cross_model.layers.{i}.0.fn.", f"cross_model.layers.{i}.1.fn."
        for start in (cross, own):
            state |= {start + "norm.weight": 1 + draw(WIDTH), start + "norm.bias": torch.zeros(WIDTH)}
        state |= {cross + "to_q.weight": draw(inner, WIDTH), cross + "to_kv.weight": draw(2 * head, WIDTH),
                  cross + "to_out.weight": draw(WIDTH, inner), cross + "ff.0.weight": draw(2 * wide, WIDTH),
                  cross + "ff.2.weight": draw(WIDTH, wide)}
        state |= {own + "rotary_emb.inv_freq": 1.0 / 10000 ** (torch.arange(0, head, 2) / head),
                  own + "fused_attn_ff_proj.weight": draw(inner + 2 * head + 2 * wide, WIDTH),
                  own + "attn_out.weight": draw(WIDTH, inner), own + "ff_out.1.weight": draw(WIDTH, wide)}
    save_file(state, file)
    return state


def picture(seed: int, width: int = 40, height: int = 33) -> Image.Image:
    """A smooth random picture with hard edges, RGB."""
    rng = np.random.default_rng(seed)
    rough = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    array = np.asarray(rough).copy()
    array[: height // 3, : width // 3] = rng.integers(0, 256, 3)
    return Image.fromarray(array)


def broken() -> Image.Image:
    """A PNG that ends too early: PIL opens it, and fails when its pixels are read."""
    import io

    target = io.BytesIO()
    picture(9, 200, 200).save(target, "PNG")
    return Image.open(io.BytesIO(target.getvalue()[:2000]))
