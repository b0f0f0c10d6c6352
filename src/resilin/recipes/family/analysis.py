"""The analysis of the recipe `family`: losses of every size of every family, and what training, memory and cuts cost.

Models trained apart are one family of three runs. Between their sizes their loss is read off a line over the logarithm
of operations; sizes outside are not compared with them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from resilin.recipes.findings import Claim, Findings, Line, Plot, Study, Table, Trial
from resilin.recipes.gains import share_claim

APART = ("apart_small", "apart_middle", "apart_large")
TITLES = {
    "plain": "a plain model, cut",
    "apart": "each size trained alone",
    "matformer": "MatFormer",
    "nemotron_elastic": "Nemotron Elastic",
    "ernie5": "ERNIE 5.0",
    "chain_of_model": "Chain-of-Model",
    "loopformer": "LoopFormer",
    "flexolmo": "FlexOlmo",
}
SIX = tuple(TITLES)[2:]
UNIT = "nat/byte"
MORE, WHOLE, NEAR = 1.03, 1.05, 1.05
"""Shares: of the plain model's operations, the most that a family may have; of its loss, the most of a whole model; of
operations, how far beyond the sizes trained alone one is still compared with them."""


@dataclass(frozen=True, slots=True)
class Size:
    """A size as it was measured with one seed."""

    name: str
    flops: float
    parameters: float
    loss: float
    agreement: float


@dataclass(frozen=True, slots=True)
class Family:
    """The sizes of a family with one seed, ascending by operations, and what they cost together."""

    sizes: tuple[Size, ...]
    operations: float
    memory: float
    apart: float
    extraction: tuple[float, float]

    def size(self, name: str) -> Size:
        """One by name."""
        return next(one for one in self.sizes if one.name == name)

    @property
    def whole(self) -> Size:
        """The largest."""
        return self.sizes[-1]


def _sizes(final: dict[str, float | None], rename: str = "") -> list[Size]:
    names = [key.removeprefix("size/").removesuffix("/loss") for key in final if key.startswith("size/")]
    names = [name for name in names if f"size/{name}/loss" in final]
    fields = ("flops", "parameters", "loss", "agreement")
    found = []
    for name in names:
        values = [final.get(f"size/{name}/{field}") for field in fields]
        found.append(Size(rename or name, *(math.nan if one is None else one for one in values)))
    return found


def family_of(trials: Sequence[Trial]) -> Family | None:
    """The family of one run, or of several of which each has a size."""
    several = len(trials) > 1
    sizes, numbers = [], []
    for trial in trials:
        final = {name.removeprefix("family/"): value for name, value in trial.record.final.items()}
        keys = ("operations", "memory/family", "memory/apart", "extraction/seconds", "extraction/copy_seconds")
        found = [final.get(key) for key in keys]
        if any(one is None for one in found):
            return None
        numbers.append([float(one or 0.0) for one in found])
        sizes += _sizes(final, trial.arm.removeprefix("apart_") if several else "")
    total = [sum(column) for column in zip(*numbers, strict=True)]
    ordered = tuple(sorted(sizes, key=lambda one: one.flops))
    return Family(ordered, total[0], total[1], total[2], (numbers[0][3], numbers[0][4]))


def families(study: Study) -> dict[str, dict[int, Family]]:
    """By name and seed; only those that all seeds have trained to the end."""
    found: dict[str, dict[int, Family]] = {}
    for name in TITLES:
        arms = APART if name == "apart" else (name,)
        by_seed = {}
        for seed in study.seeds():
            trials = [t for arm in arms for t in study.select(arm=arm) if t.seed == seed]
            one = family_of(trials) if len(trials) == len(arms) else None
            if one is not None:
                by_seed[seed] = one
        if by_seed and len(by_seed) == len(study.seeds()):
            found[name] = by_seed
    return found


def at_operations(family: Family, flops: float) -> float | None:
    """The loss of a family at so many operations for a token; None outside its sizes."""
    sizes = family.sizes
    if not sizes[0].flops / NEAR <= flops <= sizes[-1].flops * NEAR:
        return None
    if flops <= sizes[0].flops or len(sizes) == 1:
        return sizes[0].loss
    for one, other in pairwise(sizes):
        if flops <= other.flops:
            share = math.log(flops / one.flops) / math.log(other.flops / one.flops)
            return one.loss + share * (other.loss - one.loss)
    return sizes[-1].loss


def best_cut(plain: Family, flops: float) -> Size:
    """The best cut of the plain model with at most so many operations; the cheapest where none has so few."""
    within = [one for one in plain.sizes if one.flops <= flops * 1.001]
    return min(within, key=lambda one: one.loss) if within else plain.sizes[0]


def _claims(found: dict[str, dict[int, Family]]) -> list[Claim]:
    plain, apart = found.get("plain"), found.get("apart")
    if plain is None:
        return []
    nested = [name for name in SIX if name in found]
    compared = [name for name in found if name != "plain"]
    equal = [one.operations / plain[seed].operations for name in compared for seed, one in found[name].items()]
    claims = [share_claim(
        "equal compute", f"no family takes more than {MORE - 1:.0%} more operations to train than the plain model",
        [max(equal, default=math.nan)], MORE, " of them at most",
    )]  # fmt: skip
    memory = [one.memory / one.apart for name in nested for one in found[name].values()]
    claims.append(share_claim(
        "memory", "each of the six takes less memory than its sizes apart",
        [max(memory, default=math.nan)], 1 - 1e-9, " of it at most",
    ))  # fmt: skip
    for name in nested:
        title, mine = TITLES[name], found[name]
        shares = [
            size.loss / best_cut(plain[seed], size.flops).loss for seed, one in mine.items() for size in one.sizes[:-1]
        ]
        claims.append(share_claim(
            f"{name}: cuts", f"every smaller size of {title} is better than cuts of the plain model that are as cheap",
            [max(shares, default=math.nan)], 1 - 1e-9, " of their loss at most",
        ))  # fmt: skip
        whole = [one.whole.loss / plain[seed].whole.loss for seed, one in mine.items()]
        statement = f"the whole of {title} is at most {WHOLE - 1:.0%} above the plain model"
        claims.append(share_claim(f"{name}: whole", statement, whole, WHOLE))
        if apart is not None:
            statement = f"sizes of {title} are on average better than models trained alone that are as cheap"
            claims.append(share_claim(f"{name}: apart", statement, _against(mine, apart), 1 - 1e-9))
    return claims


def _against(mine: dict[int, Family], apart: dict[int, Family]) -> list[float]:
    """Seed by seed, the mean share that sizes have of the loss of models trained alone with their operations."""
    shares = []
    for seed, one in mine.items():
        pairs = [(size.loss, at_operations(apart[seed], size.flops)) for size in one.sizes]
        each = [loss / other for loss, other in pairs if other is not None]
        shares.append(statistics.fmean(each) if each else math.nan)
    return shares


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def _table(found: dict[str, dict[int, Family]]) -> Table:
    rows = []
    for name, by_seed in found.items():
        each = list(by_seed.values())
        for size in each[0].sizes:
            of = [one.size(size.name) for one in each]
            spread = statistics.stdev([one.loss for one in of]) if len(of) > 1 else None
            flops, parameters = _mean([one.flops for one in of]) / 1e3, round(_mean([one.parameters for one in of]))
            loss, agreement = _mean([one.loss for one in of]), _mean([one.agreement for one in of])
            rows.append((TITLES[name], size.name, flops, parameters, loss, spread, agreement))
    columns = (
        "family",
        "size",
        "kFLOP/token",
        "parameters",
        f"loss ({UNIT})",
        "over seeds",
        "agreement with the whole",
    )
    return Table(title="Every size, mean over seeds", columns=columns, rows=tuple(rows))


def _costs(found: dict[str, dict[int, Family]]) -> Table:
    rows = []
    for name, by_seed in found.items():
        each = list(by_seed.values())
        rows.append((
            TITLES[name], len(each[0].sizes), _mean([one.operations for one in each]) / 1e12,
            _mean([one.memory for one in each]) / 1e6, _mean([one.apart for one in each]) / 1e6,
            1e3 * _mean([one.extraction[0] for one in each]), 1e3 * _mean([one.extraction[1] for one in each]),
        ))  # fmt: skip
    columns = (
        "family", "sizes", "TFLOP to train", "MB in memory", "MB of all sizes apart", "ms to take the smallest out",
        "ms to copy its files",
    )  # fmt: skip
    note = (
        "Models trained alone need nothing taken out: their line is that of a whole model. Cuts take no training, and "
        "models as small as these are taken out in the time of opening files."
    )
    return Table(title="What a family costs", columns=columns, rows=tuple(rows), note=note)


def _plot(found: dict[str, dict[int, Family]], what: str, label: str) -> Plot:
    lines = []
    for name, by_seed in found.items():
        each = list(by_seed.values())
        names = [size.name for size in each[0].sizes]
        points = sorted(
            (_mean([getattr(one.size(n), what) for one in each]), _mean([one.size(n).loss for one in each]))
            for n in names
        )
        xs, ys = zip(*points, strict=True)
        lines.append(Line(label=TITLES[name], x=xs, y=ys))
    return Plot(title=f"Loss by {label}", x_label=label, y_label=f"loss ({UNIT})", x_log=True, lines=tuple(lines))


def analyse(study: Study) -> Findings:
    """All figures and claims of the recipe."""
    found = families(study)
    missing = [TITLES[name] for name in TITLES if name not in found]
    notes = [f"Not trained to the end with all seeds: {', '.join(missing)}."] if missing else []
    if not found:
        return Findings(notes=tuple(notes))
    return Findings(
        claims=tuple(_claims(found)),
        tables=(_table(found), _costs(found)),
        plots=(_plot(found, "flops", "operations per token"), _plot(found, "parameters", "parameters")),
        notes=tuple(notes),
    )
