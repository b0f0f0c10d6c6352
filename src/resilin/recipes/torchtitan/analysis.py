"""The analysis of the recipe `torchtitan`: how far runs that change their layout end from one that does not."""

from __future__ import annotations

import math

from resilin.recipes.findings import Claim, Findings, Line, Plot, Row, RunRecord, Study, Table, Trial

REFERENCE = "uninterrupted"
LAYOUTS = {"layouts": "data, tensor and pipeline parallelism in turn", "exact": "data, then data x pipeline"}
MISTAKES = {"kept_local_batch": "each worker's batch kept", "lost_state": "the optimizer's state lost"}
CLOSE = 0.005  # of the final loss
AFTER = 10  # steps after a change over which a jump is looked for


def final_losses(study: Study, arm: str) -> dict[int, float]:
    """The held-out loss at the end, by seed; NaN for a run that did not get there."""
    found = {}
    for trial in study.select(arm=arm):
        loss = trial.record.final.get("loss")
        found[trial.seed] = math.nan if loss is None else loss
    return found


def apart(study: Study, arm: str) -> list[float]:
    """For each seed, by how much of the uninterrupted run's final loss an arm's is higher."""
    reference, mine = final_losses(study, REFERENCE), final_losses(study, arm)
    return [mine[seed] / reference[seed] - 1 for seed in sorted(mine) if seed in reference]


def losses(record: RunRecord) -> dict[int, float]:
    """The training loss of each step."""
    return {step: value for step, value in record.series.get("loss", ()) if value is not None}


def jumps(study: Study, arm: str) -> list[float]:
    """For each seed, the largest difference of the training losses in the steps after any change of layout."""
    reference = {trial.seed: losses(trial.record) for trial in study.select(arm=REFERENCE)}
    found = []
    for trial in study.select(arm=arm):
        changes = [int(stretch["until"]) for stretch in trial.record.settings["model"]["stretches"][:-1]]
        mine, other = losses(trial.record), reference.get(trial.seed, {})
        after = {change + number for change in changes for number in range(1, AFTER + 1)}
        steps = [step for step in sorted(after) if step in mine and step in other]
        found.append(max((abs(mine[s] - other[s]) for s in steps), default=math.nan))
    return found


def same_bits(study: Study, arm: str) -> list[bool]:
    """For each seed, whether the final weights are those of the uninterrupted run, to the bit."""
    reference = {trial.seed: trial.record.weights for trial in study.select(arm=REFERENCE)}
    return [bool(t.record.weights) and t.record.weights == reference.get(t.seed) for t in study.select(arm=arm)]


def _claims(study: Study) -> list[Claim]:
    claims = []
    for arm, title in LAYOUTS.items():
        gaps = [abs(gap) for gap in apart(study, arm)]
        if not gaps:
            continue
        claims.append(
            Claim(
                name=f"{arm} end alike",
                statement=f"{title}: the final loss is within {CLOSE:.1%} of the uninterrupted run's",
                holds=max(gaps) < CLOSE,
                evidence=f"{max(gaps):.2e} of it at most, {len(gaps)} seeds",
            )
        )
    bits = same_bits(study, "exact")
    if bits:
        claims.append(
            Claim(
                name="the same bits",
                statement="data, then data x pipeline parallelism leaves the weights of one process, to the bit",
                holds=all(bits),
                evidence=f"{sum(bits)} of {len(bits)} seeds have the same digest of all weights",
            )
        )
    right = [abs(gap) for arm in LAYOUTS for gap in apart(study, arm)]
    worse = apart(study, "kept_local_batch")
    if worse:
        claims.append(
            Claim(
                name="keeping each worker's batch is worse",
                statement="with 4 times the workers and the batch of each kept, the same tokens end more than "
                f"{CLOSE:.1%} higher",
                holds=min(worse) > max([CLOSE, *right]),
                evidence=f"{min(worse):.1%} to {max(worse):.1%} higher, {len(worse)} seeds",
            )
        )
    jump, steady = jumps(study, "lost_state"), [value for arm in LAYOUTS for value in jumps(study, arm)]
    if jump:
        claims.append(
            Claim(
                name="losing the optimizer's state shows",
                statement=f"without it the training loss leaves its course within {AFTER} steps, by 10 times more than "
                "any change of layout makes it",
                holds=min(jump) > 10 * max(steady, default=math.inf),
                evidence=f"{min(jump):.3g} nat/token at least, against {max(steady, default=math.nan):.1e} at most, "
                f"{len(jump)} seeds",
            )
        )
    return claims


def _table(trials: tuple[Trial, ...]) -> Table:
    rows = [(t.arm, t.seed, t.record.final.get("loss"), t.record.weights[:12]) for t in trials]
    return Table(title="Every run", columns=("run", "seed", "held-out loss", "digest of weights"), rows=tuple(rows))


def analyse(study: Study) -> Findings:
    """Rows, claims, a table and the training losses of one seed."""
    rows = [Row.over_seeds("held-out loss, uninterrupted", list(final_losses(study, REFERENCE).values()), "nat/token")]
    for arm, title in (LAYOUTS | MISTAKES).items():
        if study.select(arm=arm):
            rows.append(Row.over_seeds(f"held-out loss, {title}", list(final_losses(study, arm).values()), "nat/token"))
            rows.append(Row.over_seeds(f"largest jump of the training loss, {title}", jumps(study, arm), "nat/token"))
    lines = []
    for arm, title in ({REFERENCE: REFERENCE} | LAYOUTS | MISTAKES).items():
        found = study.select(arm=arm)
        if found:
            points = losses(found[0].record)
            lines.append(Line(label=title, x=tuple(points), y=tuple(points.values())))
    plot = Plot(
        title=f"Training loss, seed {study.seeds()[0]}", x_label="step", y_label="nat/token", lines=tuple(lines)
    )
    return Findings(rows=tuple(rows), claims=tuple(_claims(study)), tables=(_table(study.trials),), plots=(plot,))
