"""The same study at several rates of failure, or on several sizes of cluster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from resilin.config import UserError
from resilin.planner.long_run.draw import Failures
from resilin.planner.long_run.settings import StudySettings
from resilin.planner.long_run.study import Study, study

Quantity = Literal["rate", "machines"]


def scaled(settings: StudySettings, quantity: Quantity, value: float) -> StudySettings:
    """The study with one quantity changed.

    Args:
        settings: of the study.
        quantity: `rate`: everything that may happen does so `value` times as often; `machines`: about so many compute
        (the
            nearest number that the stages divide), each replica doing what it did.
        value: of it.

    Raises:
        UserError: its failures are of a file, or the value is not positive.
    """
    if settings.trace is not None:
        raise UserError("a trace is of one cluster and one rate of failure: name laws in [failures] instead")
    if not value > 0:
        raise UserError(f"{quantity} should be positive, not {value:g}")
    if quantity == "machines":
        stages = settings.job.stages
        machines = max(round(value / stages), 1) * stages
        cluster = settings.cluster.model_copy(update={"machines": machines})
        return settings.model_copy(update={"cluster": cluster})
    laws = {name: getattr(settings.failures, name) for name in Failures.model_fields}
    found = {
        name: None if law is None else law.model_copy(update={"mean_hours": law.mean_hours / value})
        for name, law in laws.items()
    }
    return settings.model_copy(update={"failures": Failures(**found)})


def sweep(
    settings: StudySettings, quantity: Quantity, values: Sequence[float], tell: Callable[[str], None] | None = None
) -> list[tuple[float, Study]]:
    """(value, study) of each; of machines the number that was taken."""
    found = []
    for value in values:
        made = scaled(settings, quantity, value)
        taken = float(made.cluster.machines) if quantity == "machines" else value
        if tell is not None:
            tell(f"{quantity} {taken:g}")
        found.append((taken, study(made, tell)))
    return found


def curves_of(studies: Sequence[tuple[float, Study]]) -> dict[str, list[tuple[float, float]]]:
    """By way, (value, goodput); a run that was given up counts with what it had done."""
    names = [line.name for line in studies[0][1].lines] if studies else []
    return {name: [(value, one.line(name).outcome.goodput) for value, one in studies] for name in names}
