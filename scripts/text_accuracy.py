"""Answers of a trained masked language model beside its base's, checked exactly: share of held-out prompts answered right.

    python scripts/text_accuracy.py configs/text/tiny_vrpo.yaml [key=value ...] [--prompts assets/text/heldout.jsonl]

Reads the newest checkpoint of the recipe's run, a LoRA's or a full fine-tune's. PROMPTS: JSONL with the columns prompt and
answer; an answer is right when it is that string. Both models answer with the same random numbers. Writes answers.jsonl and
accuracy.json into output_dir.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import torch

from diffalign.cli import _quiet_libraries
from diffalign.config import Recipe, load_recipe
from diffalign.errors import ConfigError, DataError, UserError
from diffalign.evaluate.files import write, write_json
from diffalign.evaluate.statistics import Paired, paired, wilson
from diffalign.methods import Context
from diffalign.models.masked_lm import load_denoiser, load_tokens
from diffalign.models.weights import WeightBank
from diffalign.sampling.text import TextSampler
from diffalign.train.checkpoint import load, newest
from diffalign.types import Memory


def read_prompts(path: Path) -> list[tuple[str, str]]:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return [(row["prompt"], row["answer"]) for row in rows]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{path}: JSONL with the columns prompt and answer is needed "
                        f"({type(error).__name__}: {error})") from None


def bank_of(recipe: Recipe) -> WeightBank:
    """The trained weights as "current", the base as "reference"."""
    output_dir = Path(recipe.output_dir)
    folder = newest(output_dir)[0] if output_dir.is_dir() else None
    if folder is None:
        raise ConfigError(f"{output_dir}: no finished training run here; run `diffalign train` first")
    bank = WeightBank.build(load_denoiser(recipe.model), recipe.model.lora, reads=("policy", "origin"), seed=recipe.seed)
    bank.load_state({name: x for name, x in load(folder).tensors["weights"].items() if name.startswith("policy/")})
    return bank


def answers(recipe: Recipe, bank: WeightBank, name: str, prompts: list[str], sampler: TextSampler) -> list[str]:
    tokens = load_tokens(recipe.model, chat=recipe.data.chat_template)
    ctx = Context(predict=bank.predict, process=bank.denoiser.process, param=None, seed=recipe.seed, step=0, memory=Memory())
    found = []
    for start in range(0, len(prompts), 64):
        part = prompts[start:start + 64]
        keys = torch.arange(start, start + len(part))[:, None]
        found += sampler(ctx, name, [tokens.prompt(prompt) for prompt in part], keys)
    return [" ".join(tokens.text(ids).split()) for ids in found]


def said(name: str, right: np.ndarray) -> str:
    low, high = wilson(float(right.mean()), len(right))
    return f"{name} {100 * right.mean():.1f} % right [{100 * low:.1f}, {100 * high:.1f}]"


def compared(recipe: Recipe, bank: WeightBank, rows: list[tuple[str, str]], sampler: TextSampler) -> tuple[Paired, dict, list]:
    prompts, wanted = zip(*rows, strict=True)
    texts = {name: answers(recipe, bank, name, list(prompts), sampler) for name in ("origin", "current")}
    right = {name: np.asarray([text == want for text, want in zip(found, wanted, strict=True)], np.float64)
             for name, found in texts.items()}
    result = paired(right["origin"][:, None], right["current"][:, None], seed=recipe.seed)
    print(f"{sampler.remasking}, temperature {sampler.temperature:g}: {said('base', right['origin'])}, "
          f"{said('trained', right['current'])}; difference {100 * result.difference:+.1f} "
          f"[{100 * result.difference_low:+.1f}, {100 * result.difference_high:+.1f}]")
    shown = [{"prompt": prompt, "answer": want, "base": base, "trained": trained} for prompt, want, base, trained
             in zip(prompts, wanted, texts["origin"], texts["current"], strict=True)]
    return result, {name: float(values.mean()) for name, values in right.items()}, shown


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--prompts", type=Path, default=Path("assets/text/heldout.jsonl"))
    parser.add_argument("--length", type=int, default=13, help="tokens of an answer")
    parser.add_argument("--temperature", type=float, default=1.0)
    args = parser.parse_args(argv)
    try:
        _quiet_libraries()
        recipe, rows = load_recipe(args.config, args.overrides), read_prompts(args.prompts)
        bank, told = bank_of(recipe), {}
        for remasking in ("random", "low_confidence"):
            sampler = TextSampler(length=args.length, steps=args.length, temperature=args.temperature, remasking=remasking)
            result, shares, shown = compared(recipe, bank, rows, sampler)
            told[remasking] = {**shares, **dataclasses.asdict(result)}
            if remasking == "random":
                write(Path(recipe.output_dir) / "answers.jsonl", "".join(f"{json.dumps(row)}\n" for row in shown).encode())
        write_json(Path(recipe.output_dir) / "accuracy.json", told)
        return 0
    except UserError as error:
        print(f"text_accuracy: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    raise SystemExit(main())
