"""Train the embedded single-stream music model: a small Llama that reads a caption and writes codec tokens as words.

    OMP_NUM_THREADS=1 python scripts/assets/make_flat_music.py --music assets/tiny-music --out assets/tiny-flat-music

The clips, their deliberate errors and the codec are those of `make_music.py`, which comes first; only the language model is
another: one stream of words (`diffalign.language.codes`) where MusicGen has delayed codebooks. So it is a model that TRL
trains. Everything is a function of the seed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from make_music import codes_of, drawn_clips, fit

from diffalign import rng
from diffalign.language.codes import FlatCodes
from diffalign.models.musicgen import load_inputs
from diffalign.models.spec import ModelSpec
from diffalign.rewards.clips import FRAME, SAMPLES, every_clip

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # isort: skip

WORDS = 5  # of a caption


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, music: Path, flat: FlatCodes, steps: int, wrong: float,
          seed: int, batch: int = 16) -> None:
    """Cross-entropy of the codes and the end."""
    captions, waves = drawn_clips(3000, seed, "music", wrong)
    codes = codes_of(load_inputs(ModelSpec(pretrained_model_name_or_path=str(music))).codec, waves)
    told = [[{"role": "user", "content": caption}, {"role": "assistant", "content": flat.write(clip)}]
            for caption, clip in zip(captions, codes, strict=True)]
    ids = torch.tensor(tokenizer.apply_chat_template(told, return_dict=True)["input_ids"])  # all of one length
    labels = ids.clone()
    labels[:, :WORDS + 2] = -100  # the begin token, the caption and <play>

    def loss_at(step: int) -> torch.Tensor:
        rows = torch.from_numpy(rng.generator(seed, "flat music batch", step).integers(len(ids), size=batch))
        return model(input_ids=ids[rows], labels=labels[rows], use_cache=False).loss

    model.train()
    fit(model.parameters(), loss_at, steps, 3e-3, "flat music")
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--music", type=Path, default=Path("assets/tiny-music"))
    parser.add_argument("--out", type=Path, default=Path("assets/tiny-flat-music"))
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--wrong", type=float, default=0.4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    inputs = load_inputs(ModelSpec(pretrained_model_name_or_path=str(args.music)))
    flat, frames = FlatCodes(codebooks=inputs.codebooks, words=inputs.words), SAMPLES // FRAME
    tokenizer = flat.tokenizer((clip.caption for clip in every_clip()), longest=WORDS + 3 + flat.codebooks * frames)
    model = make_model(tokenizer, args.seed)
    train(model, tokenizer, args.music, flat, args.steps, args.wrong, args.seed)
    model.half().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
