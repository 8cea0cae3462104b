"""``diffalign arena``: a voting page, or its votes as preference data."""

from __future__ import annotations

from dataclasses import asdict

from ..arena import ArenaSpec, serve
from ..arena import export as export_votes
from .words import Printer, silent


def arena(spec: ArenaSpec, printer: Printer = silent) -> dict:
    """Serve the page until Ctrl-C or SIGTERM, or write the votes to ``spec.export``. Raises UserError children."""
    if spec.export is None:
        serve(spec, printer)
        return {}
    return asdict(export_votes(spec, spec.export, printer))
