"""The analysis of the recipe `frontier`: searches on paper, the published machine, and layouts that were really run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from statistics import fmean
from types import MappingProxyType

from resilin.planner.published import load_tables, predict_all
from resilin.planner.tune.sensitivity import told
from resilin.recipes.findings import Claim, Findings, Line, Plot, Row, Study, Table
from resilin.recipes.frontier import curves
from resilin.recipes.frontier.machine import layouts, limit, needed
from resilin.recipes.frontier.measured import DEFAULT, Measured, influence, measured, picked, short
from resilin.recipes.frontier.searches import BUDGET, KINDS, searched

ENOUGH = 8
"""Of ten seeds."""
CLOSE = 0.05
"""Of the best that was measured, by a search."""
FLAT, RATIO = 0.05, 16
"""By which rates of as many micro-batches for each stage may differ, and how many these are."""
STRONG: Mapping[str, float] = MappingProxyType({"175B": 0.89, "1T": 0.87})
"""Published shares of one replica's rate with as many rows in all (the paper's abstract)."""
POINTS = 0.03
"""By which a predicted share may be off."""


@dataclass(frozen=True, slots=True)
class Scale:
    """What a preset searches.

    Attributes:
        seeds: of the studies.
        kinds: of `KINDS`.
    """

    seeds: tuple[int, ...]
    kinds: tuple[str, ...]


SCALES: Mapping[str, Scale] = MappingProxyType(
    {
        "cpu": Scale(tuple(range(10)), ("trees", "blind", "chance", "hybrid", "untrusted")),
        "gpu": Scale(
            tuple(range(10)), ("trees", "blind", "chance", "hybrid", "untrusted")
        ),  # a GPU is of no use for it
        "paper": Scale(tuple(range(20)), tuple(KINDS)),
    }
)


def _enough(count: int, seeds: int) -> bool:
    return seeds > 0 and count * 10 >= ENOUGH * seeds


def search_claims(scale: Scale) -> list[Claim]:
    """Of the searches on the published machine."""
    trees = [searched("trees", seed) for seed in scale.seeds]
    chance = [searched("chance", seed) for seed in scale.seeds]
    hybrid = [searched("hybrid", seed) for seed in scale.seeds]
    untrusted = [searched("untrusted", seed) for seed in scale.seeds]
    count = len(scale.seeds)
    won = sum(a.last < b.last for a, b in zip(trees, chance, strict=True))
    early, late = (fmean(one.failing(third) for one in trees) for third in (0, 2))
    ranked = sum(
        bool(one.ranks) and max(map(one.ranks.index, ("micro", "tensor"))) < one.ranks.index("sharding")
        for one in trees
        if "sharding" in one.ranks
    )
    ahead = sum(a.regret[BUDGET // 4 - 1] <= b.last for a, b in zip(hybrid, untrusted, strict=True))
    return [
        Claim(
            name="trees beat chance",
            statement=f"after {BUDGET} trials, trees have found a better layout than chance, in {ENOUGH} of 10 seeds",
            holds=_enough(won, count),
            evidence=f"{won} of {count} seeds; missing to the best on the mean: trees "
            f"{fmean(o.last for o in trees):.1%}, chance {fmean(o.last for o in chance):.1%}",
        ),
        Claim(
            name="failures fade",
            statement="of the last third of the trials at most half as many fail as of the first third",
            holds=late <= early / 2,
            evidence=f"{early:.0%} and {late:.0%}; at most half in "
            f"{sum(one.failing(2) <= one.failing(0) / 2 for one in trees)} of {count} seeds",
        ),
        Claim(
            name="micro-batch and tensor degree before ZeRO",
            statement="exact Shapley values rank micro-batch and tensor degree above ZeRO-1, in 8 of 10 seeds",
            holds=_enough(ranked, count),
            evidence=f"{ranked} of {count} seeds",
        ),
        Claim(
            name="a wrong cost model is better than none",
            statement="begun with the best of a cost model that is wrong by 15% a choice, a quarter of the trials "
            "finds as good a layout as all of them without it, in 8 of 10 seeds",
            holds=_enough(ahead, count),
            evidence=f"{ahead} of {count} seeds; missing to the best after {BUDGET // 4} and {BUDGET} trials: "
            f"{fmean(o.regret[BUDGET // 4 - 1] for o in hybrid):.1%} and {fmean(o.last for o in untrusted):.1%}",
        ),
    ]


@cache
def direction_claims() -> tuple[Claim, ...]:
    """Of one choice at a time."""
    tensor, micros = curves.tensor_curve(), curves.micros_curve()
    stages, filled = curves.stages_curve(), curves.stages_curve(RATIO)
    steps = [b / a for a, b in pairwise(tensor)]
    gains = [b / a - 1 for a, b in pairwise(micros)]
    switched = curves.switches()
    return (
        Claim(
            name="tensor degree",
            statement="more tensor parallelism is slower for each die, most of all where it leaves the node",
            holds=tensor == sorted(tensor, reverse=True) and min(steps) == steps[-1],
            evidence=", ".join(f"{t}: {r / tensor[0]:.2f}" for t, r in zip(curves.TENSORS, tensor, strict=True)),
        ),
        Claim(
            name="micro-batches",
            statement="more micro-batches are quicker, each doubling by less",
            holds=micros == sorted(micros) and gains == sorted(gains, reverse=True),
            evidence=", ".join(f"{m}: {r / micros[-1]:.2f}" for m, r in zip(curves.MICROS, micros, strict=True)),
        ),
        Claim(
            name="stages",
            statement=f"more stages are slower with as many rows, and within {FLAT:.0%} with as many for each stage",
            holds=stages == sorted(stages, reverse=True) and max(filled[1:]) / min(filled[1:]) <= 1 + FLAT,
            evidence="; ".join(
                ", ".join(f"{p}: {r / each[0]:.2f}" for p, r in zip(curves.STAGES, each, strict=True))
                for each in (stages, filled)
            ),
        ),
        Claim(
            name="switches",
            statement="flash attention and interleaving gain; recomputing blocks costs at most a third; ZeRO-1 costs "
            "less than a tenth",
            holds=switched["flash attention"] > 1.05
            and switched["interleaving, 3 chunks"] > 1
            and switched["recomputing blocks"] >= 1 / 1.4
            and switched["ZeRO-1"] > 0.9,
            evidence=", ".join(f"{name} {value:.2f}x" for name, value in switched.items()),
        ),
    )


@cache
def scaling_claims() -> tuple[Claim, ...]:
    """Of the published scaling."""
    weak = {name: curves.weak(name)[-1] for name in curves.REPLICAS}
    strong = {name: curves.strong(name)[-1] for name in curves.REPLICAS}
    return (
        Claim(
            name="weak scaling",
            statement="with as many rows for each replica, the rate of a die stays within 3% of one replica's",
            holds=all(abs(share - 1) <= POINTS for _, share in weak.values()),
            evidence=", ".join(f"{name}, {dies:,} dies: {share:.1%}" for name, (dies, share) in weak.items()),
        ),
        Claim(
            name="strong scaling",
            statement="with as many rows in all, it falls to the published share, within 3 points",
            holds=all(abs(strong[name][1] - share) <= POINTS for name, share in STRONG.items()),
            evidence=", ".join(
                f"{name}, {dies:,} dies: {share:.1%} (published {STRONG[name]:.0%}; by the bubble alone {alone:.1%})"
                for name, (dies, share, alone) in strong.items()
            ),
        ),
    )


def real_claims(found: Measured) -> list[Claim]:
    """Of the layouts that were run here."""
    seeds = found.seeds
    ours = [picked(found, seed) for seed in seeds]
    theirs = [picked(found, seed, chance=True) for seed in seeds]
    near = sum(one.short <= CLOSE for one in ours)
    half = len(found.plans) // 2
    lost = fmean(one.short for one in ours)
    claims = [
        Claim(
            name="half of the runs do",
            statement=f"with {half} of {len(found.plans)} real runs the tuner's layout is within {CLOSE:.0%} of all",
            holds=bool(seeds) and near == len(seeds) and all(one.runs <= half for one in ours),
            evidence=f"{near} of {len(seeds)} seeds; missing on the mean {lost:.1%}, by chance "
            f"{fmean(one.short for one in theirs):.1%}",
        )
    ]
    if DEFAULT in found.plans:
        claims.append(
            Claim(
                name="better than the default",
                statement="the tuner's layout is at least as quick as plain data parallelism, within 5%",
                holds=lost <= short(found, DEFAULT) + CLOSE,
                evidence=f"missing to the best: {lost:.1%} and {short(found, DEFAULT):.1%}",
            )
        )
    return claims


def _published() -> Table:
    tables = [table for table in load_tables() if table.machine == "frontier"]
    found, shares = predict_all(tables)
    rows = tuple(
        (
            one.row.name,
            one.row.workers or one.step.workers,
            str(one.step.plan),
            one.row.value,
            one.value,
            "calibrates" if not one.counted else f"{one.error:+.0%}",
        )
        for one in found
    )
    note = (
        f"TFLOP/s of a die; products reach {next(iter(shares.values())):.0%} of peak, which comes from the first row; "
        "layouts and batches were not published in what could be read: they are the planner's"
    )
    return Table(
        title="The published machine",
        columns=("model", "dies", "layout", "published", "predicted", "error"),
        rows=rows,
        note=note,
    )


def _plots(scale: Scale) -> tuple[Plot, ...]:
    trials = tuple(float(number + 1) for number in range(BUDGET))

    def of_kind(kind: str) -> Line:
        each = [searched(kind, seed).regret for seed in scale.seeds]
        return Line(label=KINDS[kind], x=trials, y=tuple(fmean(one[n] for one in each) for n in range(BUDGET)))

    def relative(label: str, x: tuple[int, ...], y: list[float]) -> Line:
        return Line(label=label, x=tuple(map(float, x)), y=tuple(value / max(y) for value in y))

    return (
        Plot(
            title="What is missing to the best layout",
            x_label="trials",
            y_label="share, mean over seeds",
            lines=tuple(of_kind(kind) for kind in scale.kinds),
        ),
        Plot(
            title="One choice at a time, 22B",
            x_label="degree, or micro-batches",
            y_label="rate of a die, over the best",
            x_log=True,
            lines=(
                relative("tensor degree", curves.TENSORS, curves.tensor_curve()),
                relative("micro-batches", curves.MICROS, curves.micros_curve()),
                relative("stages, 64 micro-batches", curves.STAGES, curves.stages_curve()),
                relative(f"stages, {RATIO} micro-batches each", curves.STAGES, curves.stages_curve(RATIO)),
            ),
        ),
        Plot(
            title="Strong scaling",
            x_label="dies",
            y_label="rate of a die, over one replica's",
            x_log=True,
            lines=tuple(
                Line(
                    label=name,
                    x=tuple(float(one[0]) for one in curves.strong(name)),
                    y=tuple(one[1] for one in curves.strong(name)),
                )
                for name in curves.REPLICAS
            ),
        ),
    )


def _real_table(found: Measured) -> Table:
    middle, best = found.middle, max(found.middle.values())
    rows = tuple(
        (arm, str(found.plans[arm]), value, value / best)
        for arm, value in sorted(middle.items(), key=lambda pair: -pair[1])
    )
    note = "what each choice did (exact Shapley values of trees): " + "; ".join(told(influence(found)))
    return Table(
        title="Layouts that were run here", columns=("run", "layout", "tokens/s", "of the best"), rows=rows, note=note
    )


def analyse(study: Study) -> Findings:
    """Claims, regret of every kind of search, the published machine, real layouts, and pictures."""
    scale = SCALES[study.preset]
    rows = []
    for kind in scale.kinds:
        each = [searched(kind, seed) for seed in scale.seeds]
        rows.append(Row.over_seeds(f"missing to the best, {KINDS[kind]}", [100 * one.last for one in each], "%"))
        for third, word in ((0, "first"), (2, "last")):
            name = f"failures in the {word} third, {KINDS[kind]}"
            rows.append(Row.over_seeds(name, [100 * one.failing(third) for one in each], "%"))
    found = measured(study)
    large = sum(needed(step) > limit() for step in layouts())
    notes = (
        f"On paper {len(layouts()):,} layouts of 175 billion parameters on 128 dies; {large:,} run out of memory.",
    )
    return Findings(
        rows=tuple(rows),
        claims=(*search_claims(scale), *direction_claims(), *scaling_claims(), *(real_claims(found) if found else ())),
        tables=(_published(), *((_real_table(found),) if found else ())),
        plots=_plots(scale),
        notes=notes,
    )
