"""What a benchmark writes: `benchmarks/results/<name>.json`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, computed_field

from resilin.config import Settings, UserError
from resilin.run import provenance


class Row(Settings):
    """One comparison.

    `ours` and `peer` are medians over turns taken alternately in one run; `ratio` is better when larger.
    """

    name: str
    """What was measured, with its setting: "5M fp32 against the transformers Trainer"."""
    unit: str
    """Of `ours` and `peer`."""
    ours: float
    peer: float | None = None
    peer_name: str = ""
    better: Literal["higher", "lower"] = "higher"
    """Whether a larger value of the unit is better (tokens/s) or a smaller one (seconds, bytes)."""
    target: float | None = None
    """The ratio that was aimed at; None: shown without a verdict."""
    failed: str = ""
    """Why the target counts as missed whatever the ratio is: what was timed did not do what was asked of it."""
    runs: dict[str, list[float]] = Field(default={})
    """Every single measurement, by contender."""
    note: str = ""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def ratio(self) -> float | None:
        """Ours over the peer's, turned so that larger is better."""
        if self.peer is None or not self.peer or not self.ours:
            return None
        return self.ours / self.peer if self.better == "higher" else self.peer / self.ours

    @computed_field  # type: ignore[prop-decorator]
    @property
    def met(self) -> bool | None:
        """Whether the ratio reaches the target, and nothing else was amiss."""
        return None if self.target is None or self.ratio is None else self.ratio >= self.target and not self.failed

    @classmethod
    def from_turns(
        cls, name: str, unit: str, ours: Sequence[float], peer: Sequence[float], peer_name: str, **more: Any
    ) -> Self:
        """A row from alternate measurements."""
        return cls(
            name=name,
            unit=unit,
            ours=statistics.median(ours),
            peer=statistics.median(peer),
            peer_name=peer_name,
            runs={"ours": list(ours), peer_name: list(peer)},
            **more,
        )


class Report(Settings):
    """The results of one benchmark on one machine."""

    benchmark: str
    machine: dict[str, Any]
    versions: dict[str, str]
    commit: str | None
    settings: dict[str, Any]
    rows: list[Row]

    @classmethod
    def of(cls, benchmark: str, settings: dict[str, Any], rows: Sequence[Row]) -> Self:
        """A report of this machine and this source tree."""
        return cls(
            benchmark=benchmark,
            machine=provenance.machine(),
            versions=provenance.versions(),
            commit=provenance.commit(),
            settings=settings,
            rows=list(rows),
        )

    def write(self, folder: Path) -> Path:
        """Write `<folder>/<benchmark>.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.benchmark}.json"
        path.write_text(json.dumps(self.model_dump(mode="json"), indent=1) + "\n", encoding="utf-8")
        return path


def results_name(benchmark: str, device: str) -> str:
    """The name of a benchmark's results on a kind of device: those of a GPU stand beside the CPU's."""
    return benchmark if device == "cpu" else f"{benchmark}-{device}"


def read_report(path: Path) -> Report:
    """A written report; derived fields are computed anew, not believed."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        for row in tree["rows"]:
            row.pop("ratio", None)
            row.pop("met", None)
        return Report.model_validate(tree)
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise UserError(f"{path}: not a benchmark's results: {error}") from None


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def markdown_table(reports: Sequence[Report]) -> str:
    """The rows of several reports as Markdown tables, one for each machine that something was measured on."""
    machines: dict[str, list[Report]] = {}
    for report in reports:
        machines.setdefault(_machine_in_words(report), []).append(report)
    return "\n".join(f"Measured on {words}:\n\n{_table(group)}" for words, group in machines.items())


def _table(reports: Sequence[Report]) -> str:
    lines = ["| benchmark | measured | ours | peer | ratio | target | met |", "|---|---|---|---|---|---|---|"]
    for report in reports:
        for row in report.rows:
            verdict = {True: "yes", False: "no", None: ""}[row.met] + (f": {row.failed}" if row.failed else "")
            peer = f"{_number(row.peer)} ({row.peer_name})" if row.peer is not None else ""
            target = f"{row.target:.2g}x" if row.target is not None else ""
            ratio = f"{row.ratio:.2f}x" if row.ratio is not None else ""
            lines.append(
                f"| {report.benchmark} | {row.name} | {_number(row.ours)} {row.unit} | {peer} | {ratio} | {target} "
                f"| {verdict} |"
            )
    return "\n".join(lines) + "\n"


def _machine_in_words(report: Report) -> str:
    machine, torch = report.machine, report.versions.get("torch", "?")
    cpu = f"{machine.get('cpu')} ({machine.get('cpu_capability')}), {machine.get('cores')} cores"
    gpu = f"{machine['gpu']}, host " if machine.get("gpu") else ""
    return f"{gpu}{cpu}, torch {torch}"
