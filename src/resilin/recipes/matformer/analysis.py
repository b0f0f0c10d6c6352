"""The analysis of the recipe `matformer`: losses by size, what mixtures give, how often sizes agree with the whole."""

from __future__ import annotations

import math
import statistics
from itertools import pairwise

from resilin.recipes.findings import Claim, Findings, Line, Plot, Row, RunRecord, Study, Table
from resilin.recipes.gains import Values, gain_claim, gain_of

SIZES = ("0.125", "0.25", "0.5", "1")
NAMES = dict(zip(SIZES, ("S", "M", "L", "XL"), strict=True))
ALONE = {"0.125": "alone_eighth", "0.25": "alone_quarter", "0.5": "alone_half"}
TITLES = {
    "nested": "nested, one size a step",
    "large": "nested, larger sizes more often",
    "joint": "nested, all sizes each step",
    "per_layer": "a size for each layer (Once-for-All)",
    "plain": "the whole model trained alone, cut",
    "plain_long": "the same for four times the steps, cut",
}
PAPER = {
    "nested": ("2.970", "2.934", "2.886", "2.846"),
    "large": ("3.010", "2.943", "2.884", "2.829"),
    "alone": ("3.017", "2.971", "2.910", "2.840"),
}
UNIT = "nat/token"
NEAR = 0.05


def measured(study: Study, arm: str, member: str, what: str = "loss") -> Values:
    """A quantity of a member at the end of an arm's runs."""
    found = {t.seed: t.record.final.get(f"family/{member}/{what}") for t in study.select(arm=arm)}
    return {seed: value for seed, value in found.items() if value is not None}


def alone(study: Study, size: str, what: str = "loss") -> Values:
    """The same of the model of a size that was trained alone."""
    if size == "1":
        return measured(study, "plain", "1", what)
    return measured(study, ALONE[size], "alone", what)


def _rungs(record: RunRecord) -> dict[str, tuple[float, float]]:
    """(parameters, loss) of every member that Mix'n'Match may choose, by name."""
    found = {}
    for key, value in record.final.items():
        _, _, rest = key.partition("family/")
        name, _, what = rest.rpartition("/")
        if what == "loss" and name and not name.startswith("falling") and name != "skewed" and value is not None:
            parameters = record.final.get(f"family/{name}/parameters")
            if parameters is not None:
                found[name] = (parameters, value)
    return found


def _under_the_line(record: RunRecord) -> float | None:
    """How far, on average, mixtures lie below the straight line between the trained sizes beside them."""
    rungs = _rungs(record)
    trained = sorted(rungs[size] for size in SIZES if size in rungs)
    gaps = []
    for name, (parameters, loss) in rungs.items():
        if name in SIZES:
            continue
        for (p0, l0), (p1, l1) in pairwise(trained):
            if p0 < parameters < p1:
                gaps.append(l0 + (l1 - l0) * (parameters - p0) / (p1 - p0) - loss)
    return statistics.fmean(gaps) if gaps else None


def _rising(study: Study) -> list[float]:
    """How much lower mixtures with the larger sizes behind are than the same ones with them in front."""
    gains = []
    for trial in study.select(arm="nested"):
        final, found = trial.record.final, []
        for key, value in final.items():
            if not key.startswith("family/falling: ") or not key.endswith("/loss") or value is None:
                continue
            large, small = key.removeprefix("family/falling: ").removesuffix("/loss").split(", ")
            rising = final.get(f"family/{small}, {large}/loss")
            if rising is not None:
                found.append(value - rising)
        if found:
            gains.append(statistics.fmean(found))
    return gains


def claims(study: Study) -> list[Claim]:
    """What the paper says, and what the specification of the method adds."""
    return [*_of_sizes(study), *_of_mixtures(study), *_of_training(study)]


def _near(name: str, statement: str, gains: list[float]) -> Claim:
    """That a whole nested model is not much behind another one."""
    mean = statistics.fmean(gains) if gains else math.inf
    return Claim(name=name, statement=statement, holds=mean <= NEAR, evidence=f"{mean:+.4f} over {len(gains)} seeds")


def _of_sizes(study: Study) -> list[Claim]:
    small, loss = SIZES[0], {size: measured(study, "nested", size) for size in SIZES}
    cut = gain_claim(
        "better than a cut",
        "the smallest size of the nested model is better than the same cut of a model trained alone",
        gain_of(loss[small], measured(study, "plain", small)),
        0.0,
        "loss of the cut less that of the nested model's",
    )
    against_alone = [
        gain_claim(
            f"{NAMES[size]} as good as alone",
            f"{NAMES[size]} of the nested model has a lower loss than a model of its size trained alone",
            gain_of(loss[size], alone(study, size)),
            0.0,
            "loss alone less that of the nested model's",
        )
        for size in SIZES[:-1]
    ]
    near = _near(
        "XL near alone",
        f"the whole nested model ends within {NEAR} nat/token of one trained alone",
        gain_of(alone(study, "1"), loss["1"]),
    )
    near_longer = _near(
        "XL near as many steps alone",
        f"... and within {NEAR} nat/token of one trained alone for as many steps, with twice the compute",
        gain_of(measured(study, "plain_long", "1"), loss["1"]),
    )
    agrees = gain_claim(
        "agrees more",
        "S says what XL says more often inside the nested model than two models trained alone do",
        gain_of(alone(study, small, "agreement"), measured(study, "nested", small, "agreement")),
        0.0,
        "share of tokens",
    )
    return [cut, *against_alone, near, near_longer, agrees]


def _of_mixtures(study: Study) -> list[Claim]:
    under = [gap for t in study.select(arm="nested") if (gap := _under_the_line(t.record)) is not None]
    middle = measured(study, "nested", "0.25 x2, 0.5 x2")
    return [
        gain_claim(
            "mixtures on the line",
            "mixtures by layer lie on or under the line between the trained sizes beside them",
            under,
            -0.005,
            "nat/token below the line",
        ),
        gain_claim(
            "larger sizes behind",
            "mixtures with larger sizes in deeper layers are better than with them in front",
            _rising(study),
            0.0,
            "nat/token",
        ),
        gain_claim(
            "neighbouring sizes",
            "a mixture of the two middle sizes is better than one of the smallest and the largest, which is larger",
            gain_of(middle, measured(study, "nested", "skewed")),
            0.0,
            "nat/token",
        ),
    ]


def _of_training(study: Study) -> list[Claim]:
    loss = {size: measured(study, "nested", size) for size in SIZES}
    each_layer = [
        gain_claim(
            f"{NAMES[size]} better than per layer",
            f"{NAMES[size]} is better when all layers have one size in a step than when each has its own",
            gain_of(loss[size], measured(study, "per_layer", size)),
            0.0,
            "nat/token",
        )
        for size in (SIZES[0], "1")
    ]
    joint = [gain_of(loss[size], measured(study, "joint", size)) for size in SIZES]
    by_seed = [statistics.fmean(column) for column in zip(*joint, strict=True)] if all(joint) else []
    sampling = gain_claim(
        "sampling better than joint",
        "one size a step is better, over the four sizes, than all sizes in a quarter of the steps",
        by_seed,
        0.0,
        "nat/token",
    )
    weight = gain_claim(
        "more weight on XL",
        "drawing larger sizes more often makes the whole model better",
        gain_of(measured(study, "large", "1"), loss["1"]),
        0.0,
        "nat/token",
    )
    return [*each_layer, sampling, weight]


def _mean(values: Values) -> float | None:
    return statistics.fmean(values.values()) if values else None


def _by_size(study: Study) -> Table:
    rows: list[tuple[str | float | int | None, ...]] = []
    for arm, title in TITLES.items():
        if study.select(arm=arm):
            rows.append((title, *(_mean(measured(study, arm, size)) for size in SIZES)))
    rows.append(("each size trained alone", *(_mean(alone(study, size)) for size in SIZES)))
    for arm, figures in PAPER.items():
        rows.append((f"paper, 850M: {TITLES.get(arm, 'each trained alone')}", *figures))
    return Table(title="Held-out loss by size", columns=("", *NAMES.values()), rows=tuple(rows))


def _agreement(study: Study) -> Table:
    rows: list[tuple[str | float | int | None, ...]] = []
    for what, title in (("agreement", "most probable token is XL's"), ("kl", "KL(XL || size), nat/token")):
        for arm in ("nested", "joint", "per_layer", "plain"):
            if study.select(arm=arm):
                rows.append((f"{title}: {TITLES[arm]}", *(_mean(measured(study, arm, s, what)) for s in SIZES[:-1])))
        rows.append((f"{title}: each trained alone", *(_mean(alone(study, size, what)) for size in SIZES[:-1])))
    return Table(title="Consistency with the whole model", columns=("", *list(NAMES.values())[:-1]), rows=tuple(rows))


def _plot(study: Study) -> Plot:
    lines = []
    for arm in ("nested", "per_layer", "plain"):
        records = [_rungs(t.record) for t in study.select(arm=arm)]
        names = [name for name in records[0] if all(name in one for one in records)] if records else []
        points = sorted((records[0][n][0], statistics.fmean(one[n][1] for one in records)) for n in names)
        if points:
            x, y = zip(*points, strict=True)
            lines.append(Line(label=TITLES[arm], x=x, y=y))
    points = []
    for size in SIZES:
        loss, parameters = _mean(alone(study, size)), _mean(alone(study, size, "parameters"))
        if loss is not None and parameters is not None:
            points.append((parameters, loss))
    if points:
        x, y = zip(*points, strict=True)
        lines.append(Line(label="each size trained alone", x=x, y=y))
    return Plot(
        title="Mix'n'Match between the trained sizes",
        x_label="parameters without embedding and head",
        y_label=UNIT,
        y_log=True,
        lines=tuple(lines),
    )


def analyse(study: Study) -> Findings:
    """Rows, claims, tables and the picture."""
    rows = []
    for number, size in enumerate(SIZES):
        for arm in ("nested", "large"):
            values = list(measured(study, arm, size).values())
            if values:
                rows.append(Row.over_seeds(f"{NAMES[size]}, {TITLES[arm]}", values, UNIT, PAPER[arm][number]))
        values = list(alone(study, size).values())
        if values:
            rows.append(Row.over_seeds(f"{NAMES[size]}, trained alone", values, UNIT, PAPER["alone"][number]))
    return Findings(
        rows=tuple(rows),
        claims=tuple(claims(study)),
        tables=(_by_size(study), _agreement(study)),
        plots=(_plot(study),),
    )
