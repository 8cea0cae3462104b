"""``diffalign rich``: pairs by critique and edit (Rich Preference Optimization)."""

from __future__ import annotations

from pathlib import Path

from ..building.rich import RichSpec, build_rich
from ..train.checkpoint import check_writable, claimed
from .words import Printer, silent


def rich(spec: RichSpec, printer: Printer = silent) -> dict:
    """Criticise, edit, score, write the pairs; a killed run goes on where it was. Returns rich.json. Raises UserError
    children.
    """
    check_writable(Path(spec.output_dir))
    with claimed(Path(spec.output_dir)):
        return build_rich(spec, printer)
