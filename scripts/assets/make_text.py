"""Build and train the embedded masked language model, and its preference data: sentences rewritten as they are told to be.

    OMP_NUM_THREADS=1 python scripts/assets/make_text.py --model assets/tiny-text --data assets/text

A prompt is an instruction and a caption of the embedded scenes; one answer is right, so comparing strings checks it exactly:

    swap colours : a red ring left of a blue square on a white background -> a blue ring left of a red square on a ...

In training a share of the answers has one attribute wrong, on purpose: sampled at temperature 1 the base makes such mistakes,
and leaves something to align. Preferences are its own samples for training prompts, a right one against a wrong one. Held-out
prompts show a fixed part of the scenes (``is_held_out``), which no preference pair shows. Layout, names and options of the
model are LLaDA's. Everything is a function of the seed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from diffalign import _compat, rng  # noqa: F401  (before transformers: it mends a torchvision that does not fit torch)
from diffalign.data import DataSpec, Offline, read_texts
from diffalign.likelihood import MaskedELBO
from diffalign.methods import Context
from diffalign.models.masked_lm import LLaDA, Tokens, load_denoiser, load_tokens, new_folder
from diffalign.models.spec import ModelSpec
from diffalign.rewards.scenes import COLOURS, Object, Scene, alter, caption, every_scene, is_held_out
from diffalign.sampling.text import TextSampler
from diffalign.types import Memory

INSTRUCTIONS = ("swap colours", "swap shapes", "swap places", *(f"background {colour}" for colour in COLOURS))
END, MASK = "<|endoftext|>", "<|mdm_mask|>"
SIZES = {"d_model": 64, "n_layers": 4, "n_heads": 4, "mlp_hidden_size": 128, "max_sequence_length": 64, "rope_theta": 10000.0}
LENGTH = 13  # tokens of the longest answer, its end included
ELBO = MaskedELBO(draws=1)


# The task.


def obey(instruction: str, scene: Scene) -> Scene:
    """The scene that the right answer describes."""
    (one, two), (word, what) = scene.objects, instruction.split()
    if word == "background":
        return replace(scene, background=what)
    if what == "places":
        return replace(scene, objects=(two, one))
    if what == "colours":
        return replace(scene, objects=(Object(two.colour, one.shape), Object(one.colour, two.shape)))
    return replace(scene, objects=(Object(one.colour, two.shape), Object(two.colour, one.shape)))


def tasks(held_out: bool | None = None) -> list[tuple[str, Scene]]:
    """Prompts and the scenes of their answers, all that can be drawn, in a fixed order."""
    drawable = set(every_scene("pair"))
    return [(f"{instruction} : {caption(scene)}", answer) for instruction in INSTRUCTIONS for scene in every_scene("pair")
            if (answer := obey(instruction, scene)) in drawable and held_out in (None, is_held_out(scene))]


def drawn(pool: Sequence, count: int, seed: int, purpose: str) -> list:
    return [pool[i] for i in rng.permutation(len(pool), seed, purpose)[:count]]


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


# The model.


def words() -> list[str]:
    return sorted({word for prompt, answer in tasks() for word in f"{prompt} {caption(answer)}".split()})


def make_tokenizer() -> Tokenizer:
    """One token a word."""
    vocabulary = ["[UNK]", END, MASK, *words()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([END, MASK])
    return tokenizer


def noisy_rows(count: int, wrong: float, seed: int) -> list[dict]:
    """Prompts with answers of which a share has one attribute changed."""
    pool, random, rows = tasks(), rng.generator(seed, "base"), []
    for i in random.integers(len(pool), size=count):
        prompt, answer = pool[i]
        rows.append({"prompt": prompt, "label": 1,
                     "completion": caption(alter(answer, random) if random.random() < wrong else answer)})
    return rows


def context(denoiser: LLaDA, seed: int) -> Context:
    return Context(predict=lambda name, *args: denoiser(*args), process=denoiser.process, param=None, seed=seed, step=0,
                   memory=Memory())


def train(denoiser: LLaDA, data: Offline, steps: int, rate: float, seed: int) -> None:
    """LLaDA's SFT loss: the bound per answer token."""
    denoiser.module.train()
    optimizer = torch.optim.AdamW(denoiser.module.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.05)
    ctx, started, mean = context(denoiser, seed), time.monotonic(), 0.0
    for step in range(steps):
        loss = ELBO(data.take(step)[0], ctx, None).error.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(denoiser.module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        mean += (loss.item() - mean) / min(step + 1, 100)
        if (step + 1) % 250 == 0:
            print(f"step {step + 1}: loss {mean:.4f} nats per token, {time.monotonic() - started:.0f} s", flush=True)
    denoiser.module.eval()


def answers(denoiser: LLaDA, tokens: Tokens, prompts: Sequence[str], seed: int, samples: int = 1) -> list[list[str]]:
    """Samples of the model's own distribution, one token a step."""
    sampler, found = TextSampler(length=LENGTH, steps=LENGTH, temperature=1.0, remasking="random"), []
    for start in range(0, len(prompts), 64):
        part = range(start, min(start + 64, len(prompts)))
        keys = torch.tensor([[i, s] for i in part for s in range(samples)])
        asked = [tokens.prompt(prompts[i]) for i in part for _ in range(samples)]
        texts = [tokens.text(row) for row in sampler(context(denoiser, seed), "policy", asked, keys)]
        found += [texts[i:i + samples] for i in range(0, len(texts), samples)]
    return found


def preferences(denoiser: LLaDA, tokens: Tokens, pool: list[tuple[str, Scene]], seed: int) -> list[dict]:
    """The first right sample of four against the first wrong one; prompts without both are left out."""
    rows = []
    for (prompt, answer), texts in zip(pool, answers(denoiser, tokens, [p for p, _ in pool], seed, 4), strict=True):
        right, wrong = ([text for text in texts if (text == caption(answer)) == truth] for truth in (True, False))
        wrong = [text for text in wrong if text]
        if right and wrong:
            rows.append({"prompt": prompt, "chosen": right[0], "rejected": wrong[0]})
    return rows


def make_base(args: argparse.Namespace) -> None:
    start, sentences = args.work / "start", args.work / "base.jsonl"
    new_folder(start, make_tokenizer(), SIZES, mask=MASK, end=END, seed=args.seed)
    spec = ModelSpec(pretrained_model_name_or_path=str(start), lora=None)
    denoiser = load_denoiser(spec)
    write_rows(sentences, noisy_rows(30_000, args.wrong, args.seed))
    texts = read_texts(DataSpec(path=str(sentences)), load_tokens(spec))
    print(f"{sum(p.numel() for p in denoiser.module.parameters()):,} parameters, {len(texts):,} sentences")
    train(denoiser, Offline(texts, seed=args.seed, train_batch_size=64), args.steps, 3e-3, args.seed)
    denoiser.module.save_pretrained(args.model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("assets/tiny-text"), help="a model that is there is kept")
    parser.add_argument("--data", type=Path, default=Path("assets/text"))
    parser.add_argument("--work", type=Path, default=Path("outputs/tiny-text"))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--wrong", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not (args.model / "model.safetensors").is_file():
        make_base(args)
    spec = ModelSpec(pretrained_model_name_or_path=str(args.model), lora=None)
    denoiser, tokens = load_denoiser(spec), load_tokens(spec)
    held_out = drawn(tasks(held_out=True), 400, args.seed, "heldout")
    write_rows(args.data / "heldout.jsonl", [{"prompt": prompt, "answer": caption(answer)} for prompt, answer in held_out])
    found = answers(denoiser, tokens, [prompt for prompt, _ in held_out], args.seed)
    right = sum(texts[0] == caption(answer) for texts, (_, answer) in zip(found, held_out, strict=True))
    print(f"base, held-out prompts: {right} of {len(held_out)} right")
    pairs = preferences(denoiser, tokens, drawn(tasks(held_out=False), 2400, args.seed, "train"), args.seed + 1)
    write_rows(args.data / "train.jsonl", pairs[:1200])
    others = [task for task in tasks(held_out=True) if task not in set(held_out)]
    write_rows(args.data / "validation.jsonl",
               preferences(denoiser, tokens, drawn(others, 400, args.seed, "validation"), args.seed + 2)[:192])
    print(f"{len(pairs)} pairs, {min(len(pairs), 1200)} kept")


if __name__ == "__main__":
    main()
