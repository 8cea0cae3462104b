"""The page of ``diffalign check``: what a preference data set looks like, and pairs of it to look at. Complete in itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from .labels import Example
from .report import render

WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM = 680, 190, 8, 8, 24

KINDS = {
    "disagreements": ("The reward disagrees with the label", "The labelled loser scores higher, by most first. Noise of the "
                      "labels, or a blind spot of the reward: look before you trust either."),
    "widest": ("Widest gaps", "If one side is merely broken, little is learned from such a pair."),
    "narrowest": ("Narrowest gaps", "Can you tell which is better?"),
    "random": ("Drawn at random", "What training sees most of the time."),
}


def page(title: str, found: Mapping[str, Any], examples: Mapping[str, Sequence[Example]]) -> str:
    """found: what ``data.check`` and ``labels`` say; examples: pairs by kind. Returns HTML without any outside resource."""
    shown = [(*KINDS[name], examples[name]) for name in KINDS if examples.get(name)]
    return render("check.html.j2", title=title, found=found, shown=shown, headline=headline(found),
                  histogram=histogram(found["gaps"]) if found.get("gaps") else "")


def headline(found: Mapping[str, Any]) -> str:
    """The one sentence on top."""
    told = found.get("agreement")
    size = f"{found['groups']:,} groups of {found['prompts']:,} prompts"
    count = len(found["problems"])
    trouble = "no problem was found" if not count else "one problem was found" if count == 1 else f"{count} problems were found"
    if told is None or told["share"] is None:
        return f"{size}; {trouble}."
    return (f"The labels agree with {told['reward']} on {100 * told['share']:.1f}% of {told['prompts']:,} prompts (95% interval "
            f"{100 * told['low']:.1f}% to {100 * told['high']:.1f}%); {size}; {trouble}.")


def histogram(gaps: Mapping[str, Any]) -> Markup:
    """Counts of gaps as bars; those below 0, where the label is contradicted, in another colour."""
    edges, counts = gaps["edges"], gaps["counts"]
    low, high, most = edges[0], edges[-1], max(counts)

    def x(value: float) -> float:
        return LEFT + (value - low) / ((high - low) or 1) * (WIDTH - LEFT - RIGHT)

    floor = HEIGHT - BOTTOM
    bars = []
    for left, right, count in zip(edges, edges[1:], counts):
        tall = count / most * (floor - 8)
        kind = "against" if (left + right) / 2 < 0 else "with"
        bars.append(f'<rect class="{kind}" x="{x(left) + 1:.1f}" y="{floor - tall:.1f}" width="{max(1, x(right) - x(left) - 2):.1f}" '
                    f'height="{tall:.1f}"><title>{left:.4g} to {right:.4g}: {count:,}</title></rect>')
    zero = f'<line class="level" x1="{x(0):.1f}" x2="{x(0):.1f}" y1="0" y2="{floor}"/>' if low < 0 < high else ""
    marks = [(low, "start"), *([(0.0, "middle")] if low < 0 < high else []), (high, "end")]
    labels = "".join(f'<text x="{x(value):.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{value:.3g}</text>'
                     for value, anchor in marks)
    return Markup(f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Histogram of gaps by {escape(gaps["of"])}">'
                  f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>{"".join(bars)}{zero}{labels}</svg>')
