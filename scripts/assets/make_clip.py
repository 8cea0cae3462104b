"""Build and train the embedded tiny CLIPs: a transformers CLIPModel that tells whether a caption fits a scene.

    OMP_NUM_THREADS=1 python scripts/assets/make_clip.py --plan coarse --out assets/tiny-clip
    OMP_NUM_THREADS=1 python scripts/assets/make_clip.py --plan fine --out assets/tiny-clip-fine

Contrastive training on rendered scenes and their captions, in families: a scene and three that differ from it in one or two
attributes, so that every batch holds near misses on both sides, and ruined copies of some pictures that fit no caption. The
fine plan adds two strange scenes to a family, which no caption describes (an object gone, one of two squares a circle). Inside
a family what is further off must fit less. A linear head that names the scene's attributes learns beside, which
makes the towers learn faster, and is thrown away. Pictures are roughened (bent, blurred, blotched, tinted) as a diffusion
model's samples are; no sample of a model, no preference and no score of the scene checker is read. All is a function of
--seed.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffalign import _compat  # noqa: F401  (before transformers: it mends a torchvision that does not fit torch)

# isort: split
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from diffalign.rewards.preprocess import DEVIATION, MEAN
from diffalign.rewards.scenes import (
    COLOURS,
    PALETTE,
    REGIONS,
    RELATIONS,
    SHAPES,
    SIZE,
    Scene,
    alter,
    caption,
    random_scene,
    render,
)

KIND_SHARES = {"single": 0.15, "position": 0.2, "pair": 0.4, "count": 0.25}
FAMILY = 4  # scenes of a family that have a caption
LAYOUTS = (None, *REGIONS, *RELATIONS)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """vision: the picture tower's options. strange: scenes of a family without a caption, at most 4. batch: captions a step.
    families: how many are rendered.
    """

    vision: dict
    strange: int
    steps: int
    batch: int
    families: int

    @property
    def attributes(self) -> tuple[int, ...]:
        """How many values each of `attributes_of` takes; where objects can be gone, none is one more."""
        gone = int(self.strange > 0)
        return len(COLOURS), 3 + gone, len(LAYOUTS), *(len(COLOURS) + gone, len(SHAPES) + gone) * 2


PLANS = {
    "coarse": Plan(
        vision={"hidden_size": 144, "intermediate_size": 576, "patch_size": 16},
        strange=0,
        steps=1600,
        batch=128,
        families=6000,
    ),
    "fine": Plan(
        vision={"hidden_size": 128, "intermediate_size": 384, "patch_size": 8, "hidden_act": "gelu"},
        strange=2,
        steps=1800,
        batch=64,
        families=4000,
    ),
}


def make_model(tokenizer: CLIPTokenizer, plan: Plan) -> CLIPModel:
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(num_hidden_layers=4, num_attention_heads=4, image_size=SIZE, **plan.vision)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=128))
    # CLIP's 0.02 drowns where a token stands in what it says: after 2,000 steps no layout was told from its mirror image
    for name, weight in model.named_parameters():
        if "position_embedding" in name or "token_embedding" in name:
            nn.init.normal_(weight, std=0.7 if "token" in name else 0.5)
    return model


def families(rng: np.random.Generator, n: int, strange: int) -> list[list[Scene]]:
    """`n` families: any scene, two with one attribute changed, one of those changed again; then the `strange` ones."""
    found = []
    for _ in range(n):
        first = random_scene(rng, str(rng.choice(list(KIND_SHARES), p=list(KIND_SHARES.values()))))
        near = [alter(first, rng), alter(first, rng)]
        family = [first, *near, alter(near[0], rng)]
        found.append([*family, *(estrange(scene, family, rng) for scene in family[:strange])])
    return found


def estrange(scene: Scene, family: list[Scene], rng: np.random.Generator) -> Scene:
    """The scene with its first or last object changed once to three times, whatever the grammar says, until it is none of the
    family. An object of the background's colour is gone.
    """
    known = {attributes_of(member) for member in family}
    while True:
        things = list(scene.objects)
        for _ in range(rng.integers(1, 4)):
            spot = -rng.integers(2)
            change = [{"shape": str(rng.choice(SHAPES))}, {"colour": str(rng.choice(COLOURS))}, {"colour": scene.background}]
            things[spot] = replace(things[spot], **change[rng.integers(3)])
        changed = replace(scene, objects=tuple(things))
        if attributes_of(changed) not in known:
            return changed


def roughen(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Pictures [N, 3, 64, 64] in [0, 1], each bent, tinted, blotched, blurred and made noisy by its own random amounts."""
    n = len(x)

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))

    def amount(most: float) -> Tensor:
        """Half of the pictures none, the others up to `most`."""
        return torch.from_numpy((rng.uniform(-most, most, (n, 1, 1, 1))).astype(np.float32)).clamp(min=0)

    bend = F.interpolate(normal(n, 2, 7, 7) * amount(0.03), size=SIZE, mode="bicubic").permute(0, 2, 3, 1)
    still = F.affine_grid(torch.eye(2, 3).expand(n, 2, 3), list(x.shape), align_corners=False)
    x = F.grid_sample(x, still + bend, padding_mode="border", align_corners=False)
    x = (x - 0.5) * (1 + 0.08 * normal(n, 1, 1, 1)) + 0.5 + 0.03 * normal(n, 3, 1, 1)
    x = x + F.interpolate(normal(n, 3, 10, 10) * amount(0.15), size=SIZE, mode="bicubic")
    soft = F.avg_pool2d(F.avg_pool2d(F.pad(x, (2,) * 4, mode="replicate"), 3, 1), 3, 1)
    x = x.lerp(soft, amount(1.0))
    return (x + normal(*x.shape) * amount(0.05)).clamp(0, 1)


def ruin(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Pictures [N, 3, 64, 64] that no longer show their scene: an object bitten or stained, a stray blob, or all is bent."""
    return torch.stack([_ruined(picture, rng) for picture in x])


def _ruined(picture: Tensor, rng: np.random.Generator) -> Tensor:
    how = str(rng.choice(["bite", "stain", "stray", "squeeze", "bend"]))
    still = F.affine_grid(torch.eye(2, 3)[None], [1, 3, SIZE, SIZE], align_corners=False)
    if how in ("squeeze", "bend"):
        stretch = torch.ones(2)
        stretch[rng.integers(2)] = rng.uniform(1.5, 2.0) if how == "squeeze" else 1
        bend = torch.from_numpy(rng.standard_normal((1, 2, 6, 6), dtype=np.float32)) * (0.2 if how == "bend" else 0)
        grid = still * stretch + F.interpolate(bend, size=SIZE, mode="bicubic").permute(0, 2, 3, 1)
        return F.grid_sample(picture[None], grid, padding_mode="border", align_corners=False)[0]
    ground = picture[:, 0, 0]
    thing = (picture - ground[:, None, None]).abs().sum(0) > 0.2
    places = (thing if how != "stray" else ~thing).nonzero()
    y, x = places[rng.integers(len(places))].tolist()
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    disc = (rows - y) ** 2 + (columns - x) ** 2 < rng.uniform(4, 8) ** 2
    other = [c for c in PALETTE.values() if (torch.tensor(c) / 255 - picture[:, y, x]).abs().sum() > 0.2]
    colour = ground if how == "bite" else torch.tensor(other[rng.integers(len(other))]) / 255
    return torch.where(disc, colour[:, None, None], picture)


def attributes_of(scene: Scene) -> tuple[int, ...]:
    """Background, number of objects, layout, colour and shape of the first and of the last object. An object of the
    background's colour is gone: it has neither colour nor shape, and leaves no layout.
    """
    seen = [thing.colour != scene.background for thing in scene.objects]
    gone = (len(COLOURS), len(SHAPES))
    ends = [part for end in (0, -1) for thing in [scene.objects[end]]
            for part in ((COLOURS.index(thing.colour), SHAPES.index(thing.shape)) if seen[end] else gone)]
    layout = LAYOUTS.index((scene.region or scene.relation) if all(seen) else None)
    return COLOURS.index(scene.background), sum(seen), layout, *ends


class Pool:
    """Families rendered once; each use roughens them anew."""

    def __init__(self, rng: np.random.Generator, plan: Plan):
        self.families = families(rng, plan.families, plan.strange)
        self.pixels = np.stack([[render(scene, rng) for scene in family] for family in self.families])

    def draw(self, tokenizer: CLIPTokenizer, rng: np.random.Generator, n: int) -> tuple[Tensor, dict, Tensor, Tensor]:
        """Pictures as the processor would give them: `n` with a caption, the strange ones of their families, then `n` / 4
        ruined ones; the captions' tokens, [n, n] which caption fits which picture, and the attributes [n + strange, 7].
        """
        chosen = rng.choice(len(self.families), n // FAMILY, replace=False)
        drawn = torch.from_numpy(self.pixels[chosen]).permute(0, 1, 4, 2, 3) / 255
        pixels = torch.cat([drawn[:, :FAMILY].flatten(0, 1), drawn[:, FAMILY:].flatten(0, 1)])
        pixels = roughen(torch.cat([pixels, ruin(pixels[rng.permutation(n)[: n // 4]], rng)]), rng)
        scenes = [scene for row in chosen for scene in self.families[row][:FAMILY]]
        strange = [scene for row in chosen for scene in self.families[row][FAMILY:]]
        texts = np.asarray([caption(scene) for scene in scenes])
        mean, deviation = (torch.tensor(v)[:, None, None] for v in (MEAN, DEVIATION))
        tokens = tokenizer(texts.tolist(), padding=True, return_tensors="pt")
        same = torch.from_numpy(texts[:, None] == texts[None])
        return (pixels - mean) / deviation, tokens, same, torch.tensor([attributes_of(scene) for scene in [*scenes, *strange]])


def run(model: CLIPModel, pixels: Tensor, tokens: dict) -> tuple[Tensor, Tensor]:
    """Scaled cosines [pictures, captions], and what the picture tower says before its projection, [pictures, width]."""
    with torch.autocast("cpu", torch.bfloat16):
        pooled = model.vision_model(pixel_values=pixels).pooler_output
        image = model.visual_projection(pooled)
        text = model.text_projection(model.text_model(**tokens).pooler_output)
    cosines = F.normalize(image.float(), dim=-1) @ F.normalize(text.float(), dim=-1).T
    return model.logit_scale.exp().clamp(max=100) * cosines, pooled.float()


def contrast(logits: Tensor, same: Tensor) -> Tensor:
    """CLIP's loss; a caption that two pictures share is right for both. logits [n + others, n], same [n, n]: a caption chooses
    among the strange and the ruined pictures, too.
    """
    n = len(same)
    rows = -(logits[:n].log_softmax(1).masked_fill(~same, 0).sum(1) / same.sum(1)).mean()
    columns = -(logits.log_softmax(0)[:n].masked_fill(~same, 0).sum(0) / same.sum(0)).mean()
    return (rows + columns) / 2


def ladder(logits: Tensor, attributes: Tensor) -> Tensor:
    """In a family, what lies further off fits less: -log sigmoid of every two captions of a picture, and of every two pictures
    of a caption, whose distances in attributes differ. logits [pictures, n], attributes [n + strange, 7] as `Pool.draw` says.
    """
    n = logits.shape[1]
    count = n // FAMILY
    scenes = torch.cat([x.view(count, len(x) // count, 7) for x in (attributes[:n], attributes[n:])], 1)  # [F, 4 + s, 7]
    own = torch.cat([_within(x, count) for x in (logits[:n], logits[n : len(attributes)])], 1)  # [F, 4 + s, 4]
    far = distance(scenes[:, :, None], scenes[:, None, :FAMILY])
    losses = []
    for fit, off in ((own, far), (own.mT, far.mT)):  # [F, i, j]
        losses.append(F.softplus(fit[..., None, :] - fit[..., None])[off[..., None, :] > off[..., None] + 0.1])
    return torch.cat(losses).mean()


def _within(logits: Tensor, count: int) -> Tensor:
    """[F * pictures, F * 4] -> [F, pictures, 4]: each of the F families' own."""
    blocks = logits.view(count, len(logits) // count, count, FAMILY)
    return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def distance(one: Tensor, other: Tensor) -> Tensor:
    """Attributes [..., 7] each -> how many differ; colours and shapes are shares of the two ends, in the better order."""
    ends = [(one[..., 3:] != other[..., order]).float().sum(-1) / 2 for order in ([3, 4, 5, 6], [5, 6, 3, 4])]
    return (one[..., :3] != other[..., :3]).float().sum(-1) + torch.minimum(ends[0], ends[1] + 1)


def choices(logits: Tensor, same: Tensor) -> float:
    """Share of pictures that prefer a caption of their own among the four of their family."""
    own = torch.arange(len(logits)) // FAMILY
    near = logits.masked_fill(own[:, None] != own[None], -torch.inf)
    return float(same.gather(1, near.argmax(1, keepdim=True)).float().mean())


def train(model: CLIPModel, tokenizer: CLIPTokenizer, plan: Plan, options: argparse.Namespace) -> None:
    namer = nn.Linear(model.config.vision_config.hidden_size, sum(plan.attributes))
    parameters = [*model.parameters(), *namer.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=options.lr, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=plan.steps, pct_start=0.1)
    began, seen = time.process_time(), []
    pool = Pool(np.random.default_rng([options.seed, 0]), plan)
    for step in range(plan.steps):
        pixels, tokens, same, attributes = pool.draw(tokenizer, np.random.default_rng([options.seed, 1, step]), plan.batch)
        if not plan.strange:
            attributes[:, 1] -= 1  # no picture shows no object
        logits, pooled = run(model, pixels, tokens)
        named = zip(namer(pooled[: len(attributes)]).split(plan.attributes, 1), attributes.T, strict=True)
        loss = contrast(logits, same) + ladder(logits, attributes) + sum(F.cross_entropy(*pair) for pair in named) / 7
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        seen.append(choices(logits[: plan.batch].detach(), same))
        if step % 25 == 24:
            recent = np.mean(seen[-25:])
            spent = time.process_time() - began
            print(f"{step + 1}/{plan.steps} loss {loss.item():.3f} family {recent:.3f} {spent:.0f} CPU s", flush=True)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, default=Path("assets/tiny-sdxl/tokenizer"))
    parser.add_argument("--plan", choices=PLANS, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=1e-3)
    return parser.parse_args()


def main() -> None:
    options = read_options()
    torch.manual_seed(options.seed)
    tokenizer = CLIPTokenizer.from_pretrained(options.tokenizer)
    model = make_model(tokenizer, PLANS[options.plan])
    train(model, tokenizer, PLANS[options.plan], options)
    model.half().save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    CLIPImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=list(MEAN),
        image_std=list(DEVIATION),
    ).save_pretrained(options.out)


if __name__ == "__main__":
    main()
