"""A CLIP small enough to train on in a second, in transformers' layout, with random weights."""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

TOKENIZER = Path(__file__).parents[2] / "assets" / "tiny-sdxl" / "tokenizer"


def make_clip(folder: Path, seed: int = 0) -> Path:
    """32 x 32 pictures, features of 16 numbers."""
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    text = CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                          num_attention_heads=2, max_position_embeddings=20, bos_token_id=tokenizer.bos_token_id,
                          eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=32,
                              patch_size=16)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16,
                                     logit_scale_init_value=1.0))
        for parameter in model.vision_model.parameters():  # the usual start is so small that all pictures look alike
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def flat(level: int) -> Image.Image:
    """From blue (0) over purple to red (255)."""
    return Image.new("RGB", (32, 32), (level, 40, 255 - level))


def write_pairs(path: Path, rows: list[dict]) -> Path:
    """JSONL of Pick-a-Pic rows, whose jpg_0 and jpg_1 are levels, beside a folder of the pictures."""
    (path.parent / "pictures").mkdir(parents=True, exist_ok=True)
    lines = []
    for row in rows:
        names = {}
        for side in ("jpg_0", "jpg_1"):
            file = path.parent / "pictures" / f"{row[side]}.png"
            if not file.exists():
                target = io.BytesIO()
                flat(row[side]).save(target, "PNG")
                file.write_bytes(target.getvalue())
            names[side] = f"pictures/{row[side]}.png"
        lines.append(json.dumps({"caption": "a red circle", **row, **names}))
    path.write_text("\n".join(lines) + "\n")
    return path
