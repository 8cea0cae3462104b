"""One step's sums and counts, kept on the device and read by the host once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..types import Loss, carried
from ..world import World
from .state import Report


@dataclass(frozen=True)
class Totals:
    """A step over all processes. report: metrics by name; observed: for ``Memory``; stop: some rank was asked to stop."""

    report: Report
    observed: Report
    loss: float
    grad_norm: float
    stop: bool


class Tally:
    """Adds up micro-batches. Every micro-batch and rank brings the same names; lengths may differ, and may be 0."""

    def __init__(self, device):
        self.device, self.names, self.observed = device, None, None
        self.sums = self.counts = self.seen = None
        self.loss = torch.zeros(2, dtype=torch.float64, device=device)  # sum over groups, groups

    def add(self, loss: Loss, groups: Tensor) -> None:
        """loss: of one micro-batch; groups: [] count of its valid groups."""
        self._same_names(loss)
        self.loss += torch.stack([loss.per_group.detach().sum().double(), carried(groups, self.device).double()])
        if self.names:
            rows = pad_sequence([loss.metrics[name].detach().flatten().double() for name in self.names],
                                batch_first=True, padding_value=torch.nan)  # [names, longest]
            self.sums = _plus(self.sums, rows.nansum(1))
            self.counts = _plus(self.counts, (~rows.isnan()).sum(1).double())
        if self.observed:
            pairs = [torch.as_tensor(x, dtype=torch.float64, device=self.device).detach()
                     for name in self.observed for x in loss.observed[name]]
            self.seen = _plus(self.seen, torch.stack(pairs))

    def _same_names(self, loss: Loss) -> None:
        names, observed = sorted(loss.metrics), sorted(loss.observed)
        if self.names is None:
            self.names, self.observed = names, observed
        if (names, observed) != (self.names, self.observed):
            raise ValueError(f"a method must name the same metrics for every micro-batch: {self.names} {self.observed}, "
                             f"then {names} {observed}")

    def reduce(self, world: World, grad_norm: Tensor, stop: bool) -> Totals:
        """One sum over processes, one read by the host: the step's only wait for the device."""
        parts = [self.loss, self.sums, self.counts, self.seen, self.loss.new_full((1,), float(stop))]
        packed = world.sum(torch.cat([part for part in parts if part is not None]))
        *values, norm = torch.cat([packed, grad_norm.detach().double().reshape(1)]).tolist()
        n = len(self.names)
        report = {name: (values[2 + i], values[2 + n + i]) for i, name in enumerate(self.names)}
        seen = values[2 + 2 * n:-1]
        observed = {name: (seen[2 * i], seen[2 * i + 1]) for i, name in enumerate(self.observed)}
        return Totals({"loss": (values[0], values[1]), **report}, observed, values[0], norm, values[-1] > 0)


def _plus(total: Tensor | None, x: Tensor) -> Tensor:
    return x if total is None else total + x
