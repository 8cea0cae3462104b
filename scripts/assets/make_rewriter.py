"""Make users' prompts of the tiny scenes, and the tiny language model that can paraphrase them.

    OMP_NUM_THREADS=1 python scripts/assets/make_rewriter.py --out assets/tiny-rewriter --prompts assets/prompts

A prompt says a scene in one of several ways: the caption that the tiny SDXL was trained on is one, the others are terse,
turned round, or use words that it has never read ("disc", "backdrop", "upper left"). The language model is a transformers
Llama; it learns to say a prompt in another way, any of them, and now and then gets an attribute wrong. So it stands for a
general model that knows what people mean, and not which wording a generator follows: that is for `diffalign prompts` to
find out.

Held-out scenes (`diffalign.rewards.scenes.is_held_out`) appear in nothing but user_heldout.jsonl. Columns: prompt, and
meaning, the caption that the checker can read. All is a function of --seed.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor

from diffalign import _compat  # noqa: F401  (before transformers: it mends a torchvision that does not fit torch)
from diffalign.rewards.scenes import (
    COLOURS,
    KINDS,
    NUMBERS,
    REGIONS,
    SHAPES,
    Object,
    Scene,
    alter,
    caption,
    is_held_out,
    random_scene,
)

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # isort: skip

OTHER_SHAPES = {"circle": ("disc", "dot"), "square": ("box", "block"), "triangle": ("wedge",), "ring": ("donut", "hoop")}
OTHER_GROUNDS = ("backdrop", "bg")
OTHER_REGIONS = {region: (region.replace("top", "upper").replace("bottom", "lower"), f"{region} corner") for region in REGIONS}
OTHER_NUMBERS = {2: ("2", "a pair of"), 3: ("3", "a trio of")}
TURNED = {"left of": ("right of", "to the right of"), "above": ("below", "under")}
SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<prompt>")
WRONG = 0.1  # share of the paraphrases with one attribute changed
CAPTIONS = 0.025  # share that are the caption: more would make it the likeliest paraphrase, and leave nothing to learn

# The system message, if any, is left out: there is one task.
TEMPLATE = ("<bos>{% for m in messages %}{% if m['role'] == 'user' %} <user> {{ m['content'] }}"
            "{% elif m['role'] == 'assistant' %} <prompt>{% generation %} {{ m['content'] }} <eos>{% endgeneration %}"
            "{% endif %}{% endfor %}{% if add_generation_prompt %} <prompt>{% endif %}")


def odd(scene: Scene, rng: np.random.Generator) -> str:
    """The scene as a user may say it; never its caption."""
    while True:
        text = WAYS[scene.kind][rng.integers(len(WAYS[scene.kind]))](scene, _Words(rng))
        if text != caption(scene):
            return text


class _Words:
    """A word for each thing, usual or not."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng

    def pick(self, usual: str, others: tuple[str, ...]) -> str:
        return str(self.rng.choice([usual, *others])) if self.rng.random() < 0.7 else usual

    def shape(self, thing: Object, many: bool = False) -> str:
        word = self.pick(thing.shape, OTHER_SHAPES[thing.shape])
        return word + ("es" if word.endswith("x") else "s") * many

    def thing(self, thing: Object, many: bool = False) -> str:
        return f"{thing.colour} {self.shape(thing, many)}"

    def ground(self) -> str:
        return self.pick("background", OTHER_GROUNDS)

    def region(self, scene: Scene) -> str:
        return self.pick(scene.region, OTHER_REGIONS[scene.region])

    def number(self, scene: Scene) -> str:
        n = len(scene.objects)
        return self.pick(next(word for word, value in NUMBERS.items() if value == n), OTHER_NUMBERS[n])

    def turned(self, scene: Scene) -> str:
        return str(self.rng.choice(TURNED[scene.relation]))


WAYS = {
    "single": (
        lambda s, w: f"{w.thing(s.objects[0])} , {s.background} {w.ground()}",
        lambda s, w: f"{w.shape(s.objects[0])} {s.objects[0].colour} on {s.background}",
        lambda s, w: f"{s.background} {w.ground()} with a {w.thing(s.objects[0])}",
        lambda s, w: f"draw me a {w.thing(s.objects[0])} on {s.background} please",
        lambda s, w: f"a {w.thing(s.objects[0])} on a {s.background} {w.ground()}",
    ),
    "position": (
        lambda s, w: f"{w.thing(s.objects[0])} {w.region(s)} , {s.background} {w.ground()}",
        lambda s, w: f"{w.region(s)} : {w.thing(s.objects[0])} , {w.ground()} {s.background}",
        lambda s, w: f"{s.background} {w.ground()} with a {w.thing(s.objects[0])} {w.region(s)}",
        lambda s, w: f"put a {w.thing(s.objects[0])} in the {w.region(s)} of a {s.background} {w.ground()}",
        lambda s, w: f"a {w.thing(s.objects[0])} in the {w.region(s)} on a {s.background} {w.ground()}",
    ),
    "pair": (
        lambda s, w: f"a {w.thing(s.objects[1])} {w.turned(s)} a {w.thing(s.objects[0])} on a {s.background} {w.ground()}",
        lambda s, w: f"{w.thing(s.objects[0])} {s.relation} {w.thing(s.objects[1])} , {s.background} {w.ground()}",
        lambda s, w: f"{s.background} {w.ground()} , {w.thing(s.objects[1])} {w.turned(s)} {w.thing(s.objects[0])}",
        lambda s, w: f"{w.thing(s.objects[0])} {s.relation} {w.thing(s.objects[1])} on {s.background} please",
        lambda s, w: f"a {w.thing(s.objects[0])} {s.relation} a {w.thing(s.objects[1])} on a {s.background} {w.ground()}",
    ),
    "count": (
        lambda s, w: f"{w.number(s)} {w.thing(s.objects[0], True)} , {s.background} {w.ground()}",
        lambda s, w: f"{w.shape(s.objects[0], True)} {s.objects[0].colour} {w.number(s)} on {s.background}",
        lambda s, w: f"{s.background} {w.ground()} with {w.number(s)} {w.thing(s.objects[0], True)}",
        lambda s, w: f"draw me {w.number(s)} {w.thing(s.objects[0], True)} on {s.background} please",
        lambda s, w: f"{w.number(s)} {w.thing(s.objects[0], True)} on a {s.background} {w.ground()}",
    ),
}


def vocabulary() -> list[str]:
    """Every word of every way, sorted."""
    rng = np.random.default_rng(0)
    said = {word for kind in KINDS for _ in range(4000) for s in [random_scene(rng, kind)] for word in odd(s, rng).split()}
    every = {*COLOURS, *SHAPES, *(f"{shape}s" for shape in SHAPES), *NUMBERS, *"a in the on background left of above".split()}
    return sorted(said | every)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Words between spaces, in lower case; a comma or colon is a word of its own."""
    words = {word: number for number, word in enumerate((*SPECIALS, *vocabulary()))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)  # words with spaces between
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
                                   unk_token="<unk>", additional_special_tokens=["<user>", "<prompt>"],
                                   chat_template=TEMPLATE, model_max_length=64, padding_side="right",
                                   clean_up_tokenization_spaces=False)


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))


def seen_scene(rng: np.random.Generator) -> Scene:
    """A scene that is not held out; pairs more often, since they say more."""
    kind = str(rng.choice(KINDS, p=[0.15, 0.25, 0.4, 0.2]))
    while is_held_out(scene := random_scene(rng, kind)):
        pass
    return scene


def paraphrase(rng: np.random.Generator) -> tuple[str, str]:
    """What is said, and another way to say it, now and then of a scene that is a little wrong."""
    scene = seen_scene(rng)
    said = caption(scene) if rng.random() < 0.1 else odd(scene, rng)
    other = scene
    if rng.random() < WRONG:
        while is_held_out(other := alter(scene, rng)):
            pass
    return said, caption(other) if rng.random() < CAPTIONS else odd(other, rng)


def batch(tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator, size: int) -> tuple[Tensor, Tensor]:
    """Token ids [size, L] and labels, -100 outside the answer."""
    pairs = [paraphrase(rng) for _ in range(size)]
    told = [f"<bos> <user> {said} <prompt>" for said, _ in pairs]
    whole = [f"{start} {other} <eos>" for start, (_, other) in zip(told, pairs)]
    lengths = [len(ids) for ids in tokenizer(told, add_special_tokens=False).input_ids]
    ids = tokenizer(whole, add_special_tokens=False, padding=True, return_tensors="pt").input_ids
    labels = ids.masked_fill(ids == tokenizer.pad_token_id, -100)
    for row, length in enumerate(lengths):
        labels[row, :length] = -100
    return ids, labels


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, size: int, seed: int) -> None:
    rng, started = np.random.default_rng(seed), time.monotonic()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.05)
    for step in range(1, steps + 1):
        ids, labels = batch(tokenizer, rng, size)
        loss = model(input_ids=ids, attention_mask=(ids != tokenizer.pad_token_id).long(), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step} loss {loss.item():.3f} {time.monotonic() - started:.0f} s", flush=True)


def write_prompts(folder: Path, seed: int, count: int, heldout: int) -> None:
    """user_train.jsonl and user_heldout.jsonl; the kinds in turn, no scene twice."""
    for name, held, number, key in (("user_train", False, count, 1), ("user_heldout", True, heldout, 2)):
        rng, rows, seen = np.random.default_rng([seed, key]), [], set()
        while len(rows) < number:
            scene = random_scene(rng, KINDS[len(rows) % len(KINDS)])
            if is_held_out(scene) == held and scene not in seen:
                seen.add(scene)
                rows.append({"prompt": odd(scene, rng), "meaning": caption(scene)})
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("assets/tiny-rewriter"))
    parser.add_argument("--prompts", type=Path, default=Path("assets/prompts"))
    parser.add_argument("--count", type=int, default=384)
    parser.add_argument("--heldout", type=int, default=192)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    write_prompts(options.prompts, options.seed, options.count, options.heldout)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} words", flush=True)
    train(model, tokenizer, options.steps, options.batch, options.seed)
    model.generation_config.update(max_length=64, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    model.half().save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()
