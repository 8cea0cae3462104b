"""The page of ``diffalign check``: what a preference data set looks like, and pairs of it to look at. Complete in itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from .labels import Example
from .report import render

WIDTH, HEIGHT = 680, 160

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
    size = f"{_number(found['groups'], 'group')} of {_number(found['prompts'], 'prompt')}"
    count = len(found["problems"])
    trouble = {0: "no problem was found", 1: "one problem was found"}.get(count, f"{count} problems were found")
    if told is None or told["share"] is None:
        return f"{size}; {trouble}."
    return (f"The labels agree with {told['reward']} on {100 * told['share']:.1f}% of {told['prompts']:,} prompts (95% "
            f"interval {100 * told['low']:.1f}% to {100 * told['high']:.1f}%); {size}; {trouble}.")


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def histogram(gaps: Mapping[str, Any]) -> Markup:
    """Counts of gaps as bars; those below 0, where the label is contradicted, in another colour."""
    edges, counts = gaps["edges"], gaps["counts"]
    low, high, most = edges[0], edges[-1], max(counts)

    def x(value: float) -> float:
        return (value - low) / ((high - low) or 1) * WIDTH

    bars = []
    for left, right, count in zip(edges, edges[1:], counts):
        tall = count / most * (HEIGHT - 8)
        kind = "against" if (left + right) / 2 < 0 else "with"
        wide = max(1, x(right) - x(left) - 2)
        bars.append(f'<rect class="{kind}" x="{x(left) + 1:.1f}" y="{HEIGHT - tall:.1f}" width="{wide:.1f}" '
                    f'height="{tall:.1f}">'
                    f"<title>{left:.4g} to {right:.4g}: {count:,}</title></rect>")
    zero = f'<line class="level" x1="{x(0):.1f}" x2="{x(0):.1f}" y1="0" y2="{HEIGHT}"/>' if low < 0 < high else ""
    return Markup(f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" '
                  f'aria-label="Histogram of gaps by {escape(gaps["of"])}, {low:.3g} to {high:.3g}">'
                  f'<line class="rule" x1="0" x2="{WIDTH}" y1="{HEIGHT}" y2="{HEIGHT}"/>{"".join(bars)}{zero}</svg>')
