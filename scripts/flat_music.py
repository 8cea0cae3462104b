"""TRL on the embedded single-stream music model: DPO on pairs of its own clips, or GRPO, both by the exact checker.

    python scripts/flat_music.py dpo [--out runs/flat-music-dpo]      # pip install "diffalign[text]"
    python scripts/flat_music.py grpo [--out runs/flat-music-grpo]

Both learn from training captions and are measured on held-out ones (`assets/music`): the share of a caption's three
attributes that signal analysis hears (`rewards/clips.py`), both models drawn with the same seeds. What is no whole clip is 0.
Writes OUT/model, stage.json and music.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from diffalign.cli import _quiet_libraries
from diffalign.data.prompts import read_prompts
from diffalign.errors import ConfigError, DataError, UserError
from diffalign.evaluate.files import write_json
from diffalign.evaluate.statistics import paired
from diffalign.language import tuning
from diffalign.language.codes import FlatCodes
from diffalign.language.rewriter import Rewriter, Writer
from diffalign.language.spec import DpoSpec, GrpoSpec
from diffalign.models.musicgen import Inputs, load_inputs
from diffalign.models.spec import ModelSpec
from diffalign.rewards.clips import FRAME, SAMPLES, Clips, every_clip, part_of

FRAMES, ROWS = SAMPLES // FRAME, 96  # ROWS: clips that are drawn at once
QUICK = {"gradient_accumulation_steps": 1, "max_length": 512, "checkpointing_steps": 1000}
DPO = DpoSpec(epochs=1, learning_rate=5e-4, batch_size=16, beta=0.1, **QUICK)
GRPO = GrpoSpec(epochs=1, learning_rate=5e-4, batch_size=32, generations=8, **QUICK)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heard:
    """The exact reward of clips that are told as words."""

    inputs: Inputs
    flat: FlatCodes

    def __call__(self, captions: Sequence[str], texts: Sequence[str]) -> list[float]:
        scores, whole = [0.0] * len(texts), {i: codes for i, codes in enumerate(map(self._codes, texts)) if codes is not None}
        if whole:
            waves = self.inputs.decode(torch.from_numpy(np.stack(list(whole.values())))).numpy()
            for i, score in zip(whole, Clips()(waves, [captions[i] for i in whole]).tolist(), strict=True):
                scores[i] = score
        return scores

    def _codes(self, text: str) -> np.ndarray | None:
        try:
            codes = self.flat.read(text)
        except DataError:
            return None
        return codes if codes.shape[1] == FRAMES else None


def clips_of(source: Rewriter, flat: FlatCodes, captions: Sequence[str], each: int, seed: int) -> list[list[str]]:
    """``each`` samples of every caption, as text."""
    writer = Writer(source, allowed=flat.allowed(source.tokenizer()))
    asked = [caption for caption in captions for _ in range(each)]
    texts = [text for at in range(0, len(asked), ROWS) for text in writer.sample(asked[at:at + ROWS], seed + at)]
    return [texts[at:at + each] for at in range(0, len(texts), each)]


def pairs(captions: Sequence[str], found: list[list[str]], heard: Heard) -> list[dict[str, str]]:
    """A caption's best sample against its worst, the second best against the second worst, while they differ."""
    rows = []
    for caption, texts in zip(captions, found, strict=True):
        ranked = sorted(zip(heard([caption] * len(texts), texts), texts, strict=True), key=lambda sample: -sample[0])
        rows += [{"prompt": caption, "chosen": better, "rejected": worse}
                 for (high, better), (low, worse) in zip(ranked[:len(ranked) // 2], ranked[::-1]) if high > low]
    return rows


def tuned(args: argparse.Namespace, source: Rewriter, heard: Heard) -> dict:
    captions = [clip.caption for clip in every_clip() if part_of(clip) == "train"]
    if args.trainer == "grpo":
        return tuning.grpo(source, captions * args.visits, heard, GRPO, args.out, seed=args.seed, cpu=True)
    rows = pairs(captions, clips_of(source, heard.flat, captions, args.samples, args.seed), heard)
    if not rows:
        raise DataError(f"{args.model}: no sample is better than another of its caption; draw more (--samples)")
    return tuning.dpo(source, rows, DPO, args.out, seed=args.seed, cpu=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trainer", choices=("dpo", "grpo"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--model", type=Path, default=Path("assets/tiny-flat-music"))
    parser.add_argument("--music", type=Path, default=Path("assets/tiny-music"), help="the codec")
    parser.add_argument("--prompts", type=Path, default=Path("assets/music/heldout_prompts.txt"))
    parser.add_argument("--samples", type=int, default=128, help="clips of a training caption that make pairs")
    parser.add_argument("--visits", type=int, default=4, help="times that GRPO meets each training caption")
    parser.add_argument("--each", type=int, default=16, help="clips for each held-out caption and model")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.out = args.out or Path(f"runs/flat-music-{args.trainer}")
    try:
        _quiet_libraries()
        if args.out.exists():
            raise ConfigError(f"{args.out}: is there; remove it or name another folder with --out")
        inputs = load_inputs(ModelSpec(pretrained_model_name_or_path=str(args.music)))
        heard = Heard(inputs=inputs, flat=FlatCodes(codebooks=inputs.codebooks, words=inputs.words))
        source = Rewriter(pretrained_model_name_or_path=str(args.model), instruction="", top_k=0,
                          max_new_tokens=inputs.codebooks * FRAMES)
        prompts = read_prompts(str(args.prompts)).texts
        write_json(args.out / "stage.json", tuned(args, source, heard))
        scores = [np.array([heard([prompt] * args.each, texts) for prompt, texts in
                            zip(prompts, clips_of(model, heard.flat, prompts, args.each, args.seed + 10_000), strict=True)])
                  for model in (source, dataclasses.replace(source, pretrained_model_name_or_path=str(args.out / "model")))]
        result = paired(*scores, seed=args.seed)
        write_json(args.out / "music.json", dataclasses.asdict(result))
        print(f"{result.base_score:.3f} -> {result.aligned_score:.3f} on {result.prompts} prompts, difference "
              f"{result.difference:+.3f} [{result.difference_low:+.3f}, {result.difference_high:+.3f}]")
        return 0
    except UserError as error:
        print(f"flat_music: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    raise SystemExit(main())
