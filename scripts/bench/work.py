"""What the benchmark trains: a model, pairs of pictures, a recipe."""

from __future__ import annotations

import gc
import io
import json
from pathlib import Path

from diffalign import _compat  # noqa: F401  (before diffusers: it mends a torchvision that does not fit torch)

WARM = 2   # steps before the first turn
AGAIN = 1  # before the clock of every turn: memory that was given back is taken again, caches are filled

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
        del pipe  # in a ring of references; the workers need the memory
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    random = np.random.default_rng(0)

    def picture() -> bytes:
        buffer, small = io.BytesIO(), random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC).save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()

    prompts = [" ".join(random.choice(list("abcdefgh"), 20)) for _ in range(pairs)]
    pq.write_table(pa.table({"jpg_0": [picture() for _ in prompts], "jpg_1": [picture() for _ in prompts],
                             "label_0": [1.0] * pairs, "caption": prompts}), folder / "pairs.parquet")
    return {"model": str(folder / model), "data": str(folder / "pairs.parquet")}


def write_recipe(options, work: Path) -> Path:
    """The recipe of all paths, with what it points at beside it."""
    import yaml

    turns = options.rounds + 1 + bool(options.profile)  # one under the watch
    steps = WARM + (AGAIN + options.steps) * turns
    pairs = max(16 if options.model == "sdxl" else 64, options.steps * options.batch)
    if options.model != "tiny":
        places = write_sdxl(work, options.model, pairs, options.resolution)
    else:
        places = {"model": "assets/tiny-sdxl", "data": "assets/preferences/train.parquet"}
    lora = {"rank": options.rank} if options.rank else None
    tree = {"output_dir": str(work / "run"), "seed": 0,
            "model": {"pretrained_model_name_or_path": places["model"], "lora": lora},
            "data": {"path": places["data"], "resolution": options.resolution, "max_train_samples": pairs},
            "objective": {"kind": "dpo", "beta": 2000},
            "train": {"max_train_steps": steps, "train_batch_size": options.batch, "mixed_precision": options.precision,
                      "learning_rate": 1e-4, "checkpointing_steps": steps + 1, "resume": "never",
                      "gradient_checkpointing": options.checkpointing, "optimizer": options.optimizer}}
    file = work / "recipe.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file
