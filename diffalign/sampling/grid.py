"""Comparison grids: a row a prompt, a labelled column a model, the same seed across a row."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO, Literal

from PIL import ExifTags, Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

INK, FAINT, RULE, PAPER, BETTER = "#16181d", "#6b7280", "#e3e5e9", "#ffffff", "#0a7d4f"
FINE = 13  # size of faint small print
SMALLEST, LARGEST = 208, 512  # a tile's longer side on the grid, in pixels
LONGEST = 600  # letters of a prompt that are looked at; seven lines hold fewer
WEBP_LIMIT = 16_383  # pixels a side, by the format
EQUAL = 1e-6  # scores closer than this, absolutely or relatively, are a tie as in the statistics: no side is marked


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Pixels. tile: size of one picture on the grid."""

    tile: tuple[int, int]
    columns: int
    scored: bool
    margin: int = 28
    gap: int = 14
    text: int = 16
    label: int = 17

    @property
    def prompt_width(self) -> int:
        return max(200, min(320, self.tile[0]))

    @property
    def caption_height(self) -> int:
        return 32 if self.scored else 0

    @property
    def width(self) -> int:
        return 2 * self.margin + self.prompt_width + self.columns * (self.tile[0] + self.gap) + self.gap

    def left(self, column: int) -> int:
        return self.margin + self.prompt_width + 2 * self.gap + column * (self.tile[0] + self.gap)


def grid(columns: dict[str, Sequence[Image.Image]], prompts: Sequence[str], *,
         scores: dict[str, Sequence[float | None]] | None = None, title: str | None = None,
         note: str | None = None, details: Sequence[str] | None = None, heads: dict[str, str] | None = None) -> Image.Image:
    """One RGB picture: a row per prompt, a column per model.

    columns: label -> one picture per prompt. scores: label -> one number per prompt (None or NaN: not scored), drawn under
    each tile, the best of a row marked. details: a faint line under each prompt (its seed, say). heads: label -> a faint word
    under the column's label (its mean score, say). Pictures below 208 px are enlarged by a whole factor without smoothing,
    those above 512 px are reduced. The same input gives the same bytes. Raises ValueError where counts do not match.
    """
    _check(columns, prompts, scores)
    layout = _Layout(tile=_tile([image for column in columns.values() for image in column]), columns=len(columns),
                     scored=scores is not None)
    texts = [_wrap(prompt, _font(layout.text), layout.prompt_width) for prompt in prompts]
    details = [_fit(text, _font(FINE), layout.prompt_width) for text in details or [""] * len(prompts)]
    heights = [_row_height(text, layout) for text in texts]
    notes = _wrap(note, _font(FINE), layout.width - 2 * layout.margin, most=3) if note else []
    head, foot = _header_height(title, heads), 26 + _line(FINE) * len(notes) if notes else 12
    canvas = Image.new("RGB", (layout.width, head + sum(heights) + foot), PAPER)
    draw = ImageDraw.Draw(canvas)
    _draw_header(draw, layout, list(columns), title, heads)
    top = head
    for i, height in enumerate(heights):
        draw.line([(layout.margin, top), (layout.width - layout.margin, top)], fill=RULE)
        _draw_row(canvas, draw, layout, top + layout.gap, texts[i], details[i], [column[i] for column in columns.values()],
                  None if scores is None else [scores[label][i] for label in columns])
        top += height
    if notes:
        draw.line([(layout.margin, top), (layout.width - layout.margin, top)], fill=RULE)
        for i, line in enumerate(notes):
            draw.text((layout.margin, top + 12 + i * _line(FINE)), line, FAINT, _font(FINE))
    return canvas


def save_grid(image: Image.Image, path: Path | BinaryIO, facts: dict, kind: Literal["png", "webp"] = "png") -> None:
    """Lossless; ``facts`` (full prompts, seeds, sampler) go along as JSON: in PNG's text chunk "diffalign", in WebP's EXIF
    image description. WebP holds at most 16,383 pixels a side (``WEBP_LIMIT``): ValueError beyond.
    """
    if kind == "webp":
        exif = Image.Exif()
        exif[ExifTags.Base.ImageDescription] = json.dumps(facts, sort_keys=True)
        image.save(path, "WEBP", lossless=True, exif=exif)
        return
    info = PngInfo()
    info.add_itxt("diffalign", json.dumps(facts, ensure_ascii=False, sort_keys=True))
    image.save(path, "PNG", pnginfo=info, optimize=True)


def show_size(size: tuple[int, int], smallest: int = SMALLEST, largest: int = LARGEST) -> tuple[int, int]:
    """The size a picture is shown at: a whole multiple when it is small, reduced when it is large."""
    longer = max(size)
    if longer < smallest:
        factor = math.ceil(smallest / longer)
        return size[0] * factor, size[1] * factor
    factor = min(1.0, largest / longer)
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def shown(image: Image.Image, size: tuple[int, int] | None = None) -> Image.Image:
    """The picture as it is shown: small ones keep hard pixels, large ones are reduced smoothly."""
    image = image.convert("RGB")
    target = show_size(image.size) if size is None else size
    if target == image.size:
        return image
    grows = target[0] >= image.width
    return image.resize(target, Image.Resampling.NEAREST if grows else Image.Resampling.LANCZOS)


def _check(columns: dict, prompts: Sequence[str], scores: dict | None) -> None:
    if not columns or not prompts:
        raise ValueError("a grid needs at least one column and one prompt")
    for kind, table in (("pictures", columns), ("scores", scores or {})):
        for label, column in table.items():
            if len(column) != len(prompts):
                raise ValueError(f'column "{label}" has {len(column)} {kind} for {len(prompts)} prompts')
    if scores is not None and set(scores) != set(columns):
        raise ValueError(f"scores are named {sorted(scores)}, columns {sorted(columns)}")


def _tile(images: Sequence[Image.Image]) -> tuple[int, int]:
    """The smallest box that holds every picture as shown."""
    sizes = [show_size(image.size) for image in images]
    return max(width for width, _ in sizes), max(height for _, height in sizes)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _header_height(title: str | None, heads: dict[str, str] | None = None) -> int:
    return (104 if title else 60) + (_line(FINE) if heads else 0)


def _draw_header(draw: ImageDraw.ImageDraw, layout: _Layout, labels: list[str], title: str | None,
                 heads: dict[str, str] | None) -> None:
    bottom = _header_height(title)
    if title:
        text = _fit(title, _font(24), layout.width - 2 * layout.margin)
        _bold(draw, (layout.margin, 24), text, INK, _font(24))
    draw.text((layout.margin, bottom - 30), "prompt", FAINT, _font(layout.label))
    for i, label in enumerate(labels):
        text = _fit(label, _font(layout.label), layout.tile[0])
        _bold(draw, (layout.left(i), bottom - 30), text, INK, _font(layout.label))
        if heads:
            draw.text((layout.left(i), bottom - 6), _fit(heads[label], _font(FINE), layout.tile[0]), FAINT, _font(FINE))


def _bold(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, colour: str, font) -> None:
    """Pillow's own font has one weight: a second print half a pixel to the right makes a bolder one."""
    draw.text(at, text, colour, font)
    draw.text((at[0] + 0.5, at[1]), text, colour, font)


def _row_height(text: list[str], layout: _Layout) -> int:
    return max(layout.tile[1] + layout.caption_height, len(text) * _line(layout.text) + _line(FINE)) + 2 * layout.gap


def _line(size: int) -> int:
    return round(size * 1.4)


def _draw_row(canvas, draw, layout: _Layout, top: int, text: list[str], detail: str, images, scores) -> None:
    block, line = layout.tile[1], _line(layout.text)
    middle = top + max(0, (block - len(text) * line - (_line(FINE) if detail else 0)) // 2)
    for i, words in enumerate(text):
        draw.text((layout.margin, middle + i * line), words, INK, _font(layout.text))
    if detail:
        draw.text((layout.margin, middle + len(text) * line + 4), detail, FAINT, _font(FINE))
    best = _best(scores)
    for i, image in enumerate(images):
        picture = shown(image)
        left = layout.left(i) + (layout.tile[0] - picture.width) // 2
        canvas.paste(picture, (left, top + (layout.tile[1] - picture.height) // 2))
        draw.rectangle([layout.left(i) - 1, top - 1, layout.left(i) + layout.tile[0], top + layout.tile[1]], outline=RULE)
        if scores is not None:
            word = ("better" if layout.columns == 2 else "best") if i == best else None
            _draw_score(draw, layout.left(i), top + layout.tile[1], layout.tile[0], scores[i], word)


def _draw_score(draw, left: int, top: int, width: int, score: float | None, word: str | None) -> None:
    """The number under a tile; the better side also gets a green edge and a word (colour alone is not for everyone)."""
    known = score is not None and not math.isnan(score)
    text = score_text(score) if known else "not scored"
    if word:
        draw.rectangle([left, top + 1, left + width - 1, top + 4], fill=BETTER)
        _bold(draw, (left, top + 9), f"{text}  {word}", BETTER, _font(15))
    else:
        draw.text((left, top + 9), text, FAINT, _font(15))


def score_text(score: float) -> str:
    """Three significant digits or so, never in exponent form for everyday sizes."""
    if score == 0 or 1e-3 <= abs(score) < 100:
        return f"{score:.3f}" if abs(score) < 10 else f"{score:.2f}"
    return f"{score:,.0f}" if 100 <= abs(score) < 1e6 else f"{score:.2e}"


def _best(scores: Sequence[float | None] | None) -> int | None:
    """Index of the single best score of a row, or None for a tie or when fewer than two are known."""
    known = [(score, i) for i, score in enumerate(scores or ()) if score is not None and not math.isnan(score)]
    if len(known) < 2:
        return None
    ranked = sorted(known, reverse=True)
    return None if math.isclose(ranked[0][0], ranked[1][0], rel_tol=EQUAL, abs_tol=EQUAL) else ranked[0][1]


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, most: int = 7) -> list[str]:
    """Lines no wider than ``width``; words longer than a line are broken; at most ``most`` lines, the rest as "..."."""
    lines, current = [], ""
    for word in " ".join(_printable(text[:LONGEST]).split()).split(" "):
        for piece in _pieces(word, font, width):
            trial = f"{current} {piece}".strip()
            if current and font.getlength(trial) > width:
                lines.append(current)
                current = piece
            else:
                current = trial
    lines.append(current)
    return lines if len(lines) <= most else [*lines[: most - 1], _fit(" ".join(lines[most - 1 :]), font, width)]


def _pieces(word: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    pieces = [""]
    for letter in word:
        if pieces[-1] and font.getlength(pieces[-1] + letter) > width:
            pieces.append("")
        pieces[-1] += letter
    return pieces


def _fit(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text, cut with "..." where it is wider than ``width``."""
    text = " ".join(_printable(text).split())
    if font.getlength(text) <= width:
        return text
    fits, too_long = 0, len(text)
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        fits, too_long = (middle, too_long) if font.getlength(text[:middle] + "...") <= width else (fits, middle)
    return text[:fits].rstrip() + "..."


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() or letter.isspace() else "\N{REPLACEMENT CHARACTER}" for letter in text)
