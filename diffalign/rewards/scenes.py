"""Coloured shapes on a plain background: a caption grammar, a renderer, and a checker that reads pixels.

The embedded tiny SDXL learns these scenes, so its reward can be exact: the checker looks at a picture
and says which share of the caption it shows. No learned model stands between the policy and its score.

    rng = np.random.default_rng(0)
    scene = random_scene(rng, "pair")              # two objects and a relation
    picture = render(scene, rng)                   # uint8 [64, 64, 3]
    SceneChecker()([picture], [caption(scene)])    # tensor([1.])
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy  # its parts load on first use
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from torch import Tensor

SIZE = 64
PALETTE = {
    "red": (220, 40, 40),
    "green": (40, 170, 70),
    "blue": (40, 80, 220),
    "yellow": (245, 210, 50),
    "purple": (150, 60, 190),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
}
COLOURS = tuple(PALETTE)
SHAPES = ("circle", "square", "triangle", "ring")
NUMBERS = {"two": 2, "three": 3}
REGIONS = ("top left", "top right", "bottom left", "bottom right")
RELATIONS = ("left of", "above")
HOLE = 0.55  # a ring's inner radius, as a share of its outer one
KINDS = ("single", "position", "pair", "count")

_OBJECT = rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_GROUND = rf" on a ({'|'.join(COLOURS)}) background"
_COUNT = re.compile(rf"({'|'.join(NUMBERS)}) {_OBJECT}s{_GROUND}")
_PAIR = re.compile(rf"a {_OBJECT} ({'|'.join(RELATIONS)}) a {_OBJECT}{_GROUND}")
_SINGLE = re.compile(rf"a {_OBJECT}(?: in the ({'|'.join(REGIONS)}))?{_GROUND}")


@dataclass(frozen=True, slots=True)
class Object:
    """One shape of one colour."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What a caption says. `region` belongs to one object, `relation` to two; equal objects without one are counted."""

    objects: tuple[Object, ...]
    background: str
    region: str | None = None
    relation: str | None = None

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        if self.relation:
            return "pair"
        if len(self.objects) > 1:
            return "count"
        return "position" if self.region else "single"


def caption(scene: Scene) -> str:
    """The one sentence that describes the scene; `parse` is its inverse."""
    first, *rest = scene.objects
    ground = f"on a {scene.background} background"
    if scene.relation:
        return f"a {first} {scene.relation} a {rest[0]} {ground}"
    if rest:
        number = next(word for word, n in NUMBERS.items() if n == len(scene.objects))
        return f"{number} {first}s {ground}"
    return f"a {first} in the {scene.region} {ground}" if scene.region else f"a {first} {ground}"


@cache
def parse(text: str) -> Scene | None:
    """The scene a caption describes, or None where it is not a sentence of the grammar."""
    text = " ".join(text.lower().split()).rstrip(".")
    if m := _COUNT.fullmatch(text):
        scene = Scene(objects=(Object(m[2], m[3]),) * NUMBERS[m[1]], background=m[4])
    elif m := _PAIR.fullmatch(text):
        scene = Scene(objects=(Object(m[1], m[2]), Object(m[4], m[5])), background=m[6], relation=m[3])
    elif m := _SINGLE.fullmatch(text):
        scene = Scene(objects=(Object(m[1], m[2]),), background=m[4], region=m[3])
    else:
        return None
    return scene if _is_drawable(scene) else None


def _is_drawable(scene: Scene) -> bool:
    """No object has the background's colour, and a pair is of two different objects."""
    distinct = not scene.relation or scene.objects[0] != scene.objects[1]
    return distinct and all(thing.colour != scene.background for thing in scene.objects)


@cache
def every_scene(kind: str) -> tuple[Scene, ...]:
    """All scenes of one kind, in a fixed order: 168 single, 672 position, 336 count, 7728 pair."""
    return tuple(scene for scene in _combinations(kind) if _is_drawable(scene))


def _combinations(kind: str) -> Iterator[Scene]:
    things = [Object(*pair) for pair in itertools.product(COLOURS, SHAPES)]
    for ground, thing in itertools.product(COLOURS, things):
        if kind == "single":
            yield Scene(objects=(thing,), background=ground)
        elif kind == "position":
            yield from (Scene(objects=(thing,), background=ground, region=region) for region in REGIONS)
        elif kind == "count":
            yield from (Scene(objects=(thing,) * n, background=ground) for n in NUMBERS.values())
        elif kind == "pair":
            for relation, other in itertools.product(RELATIONS, things):
                yield Scene(objects=(thing, other), background=ground, relation=relation)
        else:
            raise ValueError(f"unknown kind of scene {kind!r}; choose one of {', '.join(KINDS)}")


def random_scene(rng: np.random.Generator, kind: str | None = None) -> Scene:
    """One scene, uniform within its kind; a kind is drawn first where none is named."""
    scenes = every_scene(kind or KINDS[rng.integers(len(KINDS))])
    return scenes[rng.integers(len(scenes))]


def alter(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with exactly one attribute changed, so that its caption no longer fits the old picture."""
    while True:
        changed = _change(scene, rng)
        if changed != scene and _is_drawable(changed):
            return changed


def _change(scene: Scene, rng: np.random.Generator) -> Scene:
    attribute = rng.choice(["background", "colour", "shape", "layout"])
    if attribute == "background":
        return replace(scene, background=str(rng.choice(COLOURS)))
    if attribute == "layout":
        return _change_layout(scene, rng)
    spot = int(rng.integers(len(scene.objects)))
    thing = replace(scene.objects[spot], **{attribute: str(rng.choice(COLOURS if attribute == "colour" else SHAPES))})
    if scene.kind == "count":
        return replace(scene, objects=(thing,) * len(scene.objects))
    return replace(scene, objects=scene.objects[:spot] + (thing,) + scene.objects[spot + 1 :])


def _change_layout(scene: Scene, rng: np.random.Generator) -> Scene:
    if scene.kind == "pair":
        return replace(scene, objects=scene.objects[::-1])
    if scene.kind == "position":
        return replace(scene, region=str(rng.choice(REGIONS)))
    number = int(rng.choice([n for n in NUMBERS.values() if n != len(scene.objects)]))
    return replace(scene, objects=scene.objects[:1] * number)


def is_held_out(scene: Scene) -> bool:
    """Whether the scene belongs to the held-out prompts: a fixed third of all (colour, shape, background)
    combinations and, among pairs, a fifth of all (shape, relation, shape) combinations. No preference pair shows one.
    """
    ground = COLOURS.index(scene.background)
    triples = [(COLOURS.index(o.colour) + SHAPES.index(o.shape) - ground) % 3 for o in scene.objects]
    if scene.relation:
        one, two = (SHAPES.index(thing.shape) for thing in scene.objects)
        triples.append((one + 2 * two + RELATIONS.index(scene.relation)) % 5)
    return 0 in triples


# Drawing: coordinates are pixels of the 64x64 picture, x to the right and y downwards.


def outline(shape: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    """Corners of the shape around (x, y), inside the box of half-width `r`; a ring's outline is its outer edge."""
    if shape == "square":
        s = 0.9 * r
        return [(x - s, y - s), (x + s, y - s), (x + s, y + s), (x - s, y + s)]
    if shape == "triangle":
        return [(x, y - 0.9 * r), (x + r, y + 0.9 * r), (x - r, y + 0.9 * r)]
    angles = np.linspace(0, 2 * math.pi, 72, endpoint=False)
    return [(x + r * math.cos(a), y + r * math.sin(a)) for a in angles]


def coverage(shape: str, x: float, y: float, r: float, size: int = SIZE, fine: int = 4) -> np.ndarray:
    """Share of each pixel the shape covers, float [size, size] in [0, 1]: drawn `fine` times larger, then averaged."""
    canvas = Image.new("L", (size * fine, size * fine))
    draw = ImageDraw.Draw(canvas)
    scaled = (x * fine, y * fine, r * fine)
    draw.polygon(outline(shape, *scaled), fill=255)
    if shape == "ring":
        draw.polygon(outline("circle", scaled[0], scaled[1], HOLE * scaled[2]), fill=0)
    return np.asarray(canvas, dtype=np.float32).reshape(size, fine, size, fine).mean((1, 3)) / 255


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """One antialiased picture of the scene, uint8 [64, 64, 3], with random sizes and places that fit its caption."""
    picture = np.empty((SIZE, SIZE, 3), np.float32)
    picture[:] = PALETTE[scene.background]
    for thing, place in zip(scene.objects, _layout(scene, rng), strict=True):
        cover = coverage(thing.shape, *place)[..., None]
        picture += cover * (np.asarray(PALETTE[thing.colour], np.float32) - picture)
    return picture.round().astype(np.uint8)


def _layout(scene: Scene, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """(x, y, r) of each object. Objects keep to their own half or quarter, so they never touch."""
    if scene.kind == "single":
        r = rng.uniform(12, 19)
        return [(*rng.uniform(32 - 0.6 * (30 - r), 32 + 0.6 * (30 - r), 2), r)]
    if scene.kind == "position":
        return [_in_quarter(REGIONS.index(scene.region), rng.uniform(9, 13), rng)]
    if scene.kind == "count":
        return [_in_quarter(q, rng.uniform(9, 12), rng) for q in rng.permutation(4)[: len(scene.objects)]]
    along = [_in_quarter(q, rng.uniform(9, 13), rng) for q in (0, 3)]
    across = rng.uniform(27, 37, 2)
    if scene.relation == "left of":
        return [(x, float(a), r) for (x, _, r), a in zip(along, across, strict=True)]
    return [(float(a), y, r) for (_, y, r), a in zip(along, across, strict=True)]


def _in_quarter(quarter: int, r: float, rng: np.random.Generator) -> tuple[float, float, float]:
    """A place within quarter 0 (top left) to 3 (bottom right), at least 1.5 px from its borders."""
    slack = max(0.0, 14.5 - r)
    x, y = 16 + rng.uniform(-slack, slack, 2)
    return x + 32 * (quarter % 2), y + 32 * (quarter // 2), r


# Reading: the checker knows nothing but pixels and the palette.


@dataclass(frozen=True, slots=True)
class Blob:
    """A connected region that differs from the background: what the checker saw of one object."""

    colour: str
    shape: str | None
    x: float
    y: float
    area: int


def see(picture: np.ndarray, smallest: int = 40) -> tuple[str, list[Blob]]:
    """Background colour and blobs of at least `smallest` pixels, in a uint8 [64, 64, 3] picture."""
    labels = _nearest_colour(picture)
    border = np.concatenate([labels[:2].ravel(), labels[-2:].ravel(), labels[:, :2].ravel(), labels[:, -2:].ravel()])
    ground = int(np.bincount(border).argmax())
    regions, _ = scipy.ndimage.label(labels != ground, structure=np.ones((3, 3)))
    masks = [regions == number for number in range(1, regions.max() + 1)]
    return COLOURS[ground], [_blob(mask, labels) for mask in masks if mask.sum() >= smallest]


def _nearest_colour(picture: np.ndarray) -> np.ndarray:
    """Index into `COLOURS` of each pixel's nearest palette colour, int [64, 64]."""
    palette = np.asarray(list(PALETTE.values()), np.float32)
    return np.square(picture[..., None, :].astype(np.float32) - palette).sum(-1).argmin(-1)


def _blob(mask: np.ndarray, labels: np.ndarray) -> Blob:
    """What the mask [64, 64] shows; a soft edge between two colours may look like a third, so the majority decides."""
    ys, xs = np.nonzero(mask)
    x, y = float(xs.mean() + 0.5), float(ys.mean() + 0.5)
    return Blob(COLOURS[np.bincount(labels[mask]).argmax()], _shape_of(mask, x, y), x, y, len(xs))


def _shape_of(mask: np.ndarray, x: float, y: float, least: float = 0.75) -> str | None:
    """The shape whose template overlaps the mask [64, 64] best (IoU), or None where even that is below `least`.
    Templates have the mask's area and centroid (x, y), so that a soft corner does not shift them.
    """
    grid = np.arange(SIZE) + 0.5
    overlaps = {}
    for shape, area in AREAS.items():
        r = math.sqrt(mask.sum() / area)
        template = _inside(shape, (grid - x) / r, (grid[:, None] - y) / r)
        overlaps[shape] = (mask & template).sum() / (mask | template).sum()
    best = max(overlaps, key=overlaps.__getitem__)
    return best if overlaps[best] >= least else None


AREAS = {"circle": math.pi, "square": 1.8**2, "triangle": 1.8, "ring": math.pi * (1 - HOLE**2)}  # at r = 1


def _inside(shape: str, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Which offsets from the centroid, dx [W] and dy [H, 1] in units of r, lie inside the shape: bool [H, W]."""
    if shape == "square":
        return np.maximum(abs(dx), abs(dy)) <= 0.9
    if shape == "triangle":  # the centroid lies two thirds down from the tip
        return (dy <= 0.6) & (abs(dx) * 1.8 <= dy + 1.2)
    distance = np.hypot(dx, dy)
    return (distance <= 1) & (distance >= (HOLE if shape == "ring" else 0))


@dataclass(frozen=True, slots=True)
class SceneChecker:
    """Reward: the share of a caption's requirements that a picture meets, in [0, 1].

    Requirements, each worth the same: background colour, number of objects, their colours, their shapes and,
    where the caption names one, the position or relation. Colours and shapes are shares of the objects asked for.
    """

    differentiable = False
    name = "scenes"

    def __call__(self, images: Any, prompts: Sequence[str]) -> Tensor:
        """Scores, float32 [N]. `images`: N pictures as a list, or as one array or tensor [N, 3, H, W]: uint8, or
        float tensors in [0, 1]. NaN where a prompt is not a scene caption.
        """
        import torch

        pictures = [as_picture(image) for image in images]
        if len(pictures) != len(prompts):
            raise ValueError(f"{len(pictures)} pictures for {len(prompts)} prompts: pass one prompt per picture")
        return torch.tensor([score(p, text) for p, text in zip(pictures, prompts, strict=True)], dtype=torch.float32)


def is_perfect(scores: Any) -> Any:
    """Which scores say that every requirement is met (elementwise; NaN is not perfect)."""
    return scores >= 0.999


def as_picture(image: Any) -> np.ndarray:
    """One picture as uint8 [64, 64, 3], from anything that `rewards.base.as_pil` accepts, of any size."""
    from .base import as_pil

    image = as_pil(image)
    return np.asarray(image if image.size == (SIZE, SIZE) else image.resize((SIZE, SIZE), Image.Resampling.BOX))


def score(picture: np.ndarray, text: str) -> float:
    """Share of the caption's requirements the uint8 [64, 64, 3] picture meets; NaN for a foreign caption."""
    scene = parse(text)
    if scene is None:
        return math.nan
    ground, blobs = see(picture)
    met = [float(ground == scene.background), float(len(blobs) == len(scene.objects))]
    return float(np.mean(met + _best_match(scene, blobs)))


def _best_match(scene: Scene, blobs: list[Blob]) -> list[float]:
    """Shares of right colours, right shapes and right layout, under the assignment of blobs to objects that
    meets most. A missing object meets nothing.
    """
    wanted = len(scene.objects)
    largest = sorted(blobs, key=lambda blob: -blob.area)[:4]
    seats: list[Blob | None] = [*largest, *[None] * max(0, wanted - len(largest))]
    return max((_met(scene, seating) for seating in itertools.permutations(seats, wanted)), key=sum)


def _met(scene: Scene, blobs: Sequence[Blob | None]) -> list[float]:
    seen = list(zip(scene.objects, blobs, strict=True))
    colours = np.mean([blob is not None and blob.colour == thing.colour for thing, blob in seen])
    shapes = np.mean([blob is not None and blob.shape == thing.shape for thing, blob in seen])
    if scene.region or scene.relation:
        return [colours, shapes, 0.0 if None in blobs else _layout_met(scene, blobs)]
    return [colours, shapes]


def _layout_met(scene: Scene, blobs: Sequence[Blob]) -> float:
    """Position: half for each right axis. Relation: the first centroid lies at least 4 px before the second."""
    first, *rest = blobs
    if scene.relation:
        return float(first.x + 4 < rest[0].x) if scene.relation == "left of" else float(first.y + 4 < rest[0].y)
    quarter = REGIONS.index(scene.region)
    return 0.5 * ((first.x > SIZE / 2) == quarter % 2) + 0.5 * ((first.y > SIZE / 2) == quarter // 2)
