"""What all workers computed in a step, told to all of them with one sum over a vector.

Every micro-batch (of every part of a sequence) has a row that one rank fills and all others leave at zero: sums of
such rows are exact, and what is made of them afterwards is made in the rows' order, the same at every rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from resilin.nouns import Log, Loss, Max, Mean
from resilin.parallel.canonical import tree_sum
from resilin.parallel.exchange import add_up
from resilin.parallel.group import Group
from resilin.parallel.messages import tell_all


@dataclass(frozen=True, slots=True)
class Summed:
    """The losses of all rows.

    Attributes:
        loss: their sum.
        units: valid units of all rows.
        logs: merged.
        rows: each row's own, without graphs.
    """

    loss: float
    units: float
    logs: dict[str, float]
    rows: list[Loss]


def merge_logs(rows: list[Loss]) -> dict[str, float]:
    """The logs of several losses as numbers."""
    found: dict[str, Log] = {}
    for loss in rows:
        for name, log in loss.logs.items():
            found[name] = found[name].merge(log) if name in found else log  # type: ignore[arg-type]
    return {name: log.value() for name, log in found.items()}


class Report:
    """Tells losses to all ranks of a group, who call together.

    Args:
        group: all workers.
        device: where sums are computed.
    """

    def __init__(self, group: Group, device: torch.device) -> None:
        self._group, self._device = group, device
        self._names: list[tuple[str, str]] = []

    def exchange(self, mine: Mapping[int, Loss], rows: int, more: Tensor | None = None) -> tuple[Summed, Tensor]:
        """The losses of all rows, and the sum over all ranks of `more`.

        Args:
            mine: the rows that this rank fills.
            rows: how many there are.
            more: float64 numbers of the same count at all ranks.
        """
        more = torch.zeros(0, dtype=torch.float64) if more is None else more.to("cpu", torch.float64)
        names = {
            (name, "mean" if isinstance(log, Mean) else "max")
            for loss in mine.values()
            for name, log in loss.logs.items()
        }
        news = not names <= set(self._names)
        table = torch.zeros(rows, 3, dtype=torch.float64)
        for row, loss in mine.items():
            table[row] = torch.stack([loss.sum.detach().double(), loss.units.double(), torch.ones(()).double()]).cpu()
        logs = self._logs_of(mine, rows)
        vector = torch.cat([torch.tensor([float(news)], dtype=torch.float64), table.view(-1), logs.view(-1), more])
        vector = add_up(vector.to(self._device), self._group).cpu()
        flag, table, logs, more = vector.split([1, table.numel(), logs.numel(), more.numel()])
        if float(flag):  # somebody has a log that was not agreed on: agree anew
            told = [name for each in tell_all(sorted(names), self._group) for name in each]
            self._names = sorted({*self._names, *((name, kind) for name, kind in told)})
            logs = add_up(self._logs_of(mine, rows).to(self._device), self._group).cpu()
        return self._summed(table.view(rows, 3), logs.view(rows, len(self._names), 3)), more

    def _logs_of(self, mine: Mapping[int, Loss], rows: int) -> Tensor:
        """(rows, names, 3): sum and count, or maximum and 0, and whether there is one."""
        table = torch.zeros(rows, len(self._names), 3, dtype=torch.float64)
        for row, loss in mine.items():
            for column, (name, _) in enumerate(self._names):
                log = loss.logs.get(name)
                if isinstance(log, Mean):
                    table[row, column] = torch.tensor([float(log.sum), float(log.count), 1.0], dtype=torch.float64)
                elif log is not None:
                    table[row, column] = torch.tensor([float(log.max), 0.0, 1.0], dtype=torch.float64)
        return table

    def _summed(self, table: Tensor, logs: Tensor) -> Summed:
        rows = []
        for row, (total, units, there) in enumerate(table.unbind(0)[i].unbind() for i in range(len(table))):
            if not float(there):
                continue
            found: dict[str, Log] = {}
            for column, (name, kind) in enumerate(self._names):
                value, count, has = logs[row, column]
                if float(has):
                    found[name] = Mean(value, count) if kind == "mean" else Max(value)
            rows.append(Loss(total, units, found))
        if not rows:
            raise ValueError("no worker computed a loss")
        total, units = (tree_sum(parts) for parts in ([row.sum for row in rows], [row.units for row in rows]))
        return Summed(float(total), float(units), merge_logs(rows), rows)
