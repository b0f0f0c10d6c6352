"""Mix'n'Match: which of the trained sizes each layer takes, so that the model just fits a budget (MatFormer, 2023).

Of the g^L combinations of g sizes in L layers only the g uniform ones were trained; the rule says which of the others
to take: sizes that do not fall with depth, of at most two neighbouring granularities, as few changes as can be
("increasing, least slope", section 3.3). No training, no search.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from resilin.models.decoder_settings import DecoderSettings
from resilin.nested.budgets import Budget, BudgetError
from resilin.nested.cost import cost
from resilin.nested.granularities import Granularity, Target, budget_at, label_of

Unit = Literal["params", "flops", "non_embedding"]


def ladder(
    settings: DecoderSettings, granularities: Sequence[Granularity], targets: Sequence[Target] = ("ffn",)
) -> list[tuple[str, Budget]]:
    """All models that the rule may choose, the smallest first, with names: L * (g - 1) + 1 of them.

    Step k between two granularities has the larger one in the k deepest layers. Those of one granularity alone were
    trained; their names are the granularity's.

    Args:
        settings: of the full model.
        granularities: ascending.
        targets: what they cut.
    """
    layers, found = settings.layers, []
    for number, small in enumerate(granularities):
        found.append((label_of(small), budget_at(settings, small, targets)))
        if number + 1 == len(granularities):
            break
        large = granularities[number + 1]
        for k in range(1, layers):
            name = f"{label_of(small)} x{layers - k}, {label_of(large)} x{k}"
            found.append((name, budget_at(settings, [small] * (layers - k) + [large] * k, targets)))
    return found


def measured_by(settings: DecoderSettings, unit: Unit, sequence_length: int | None = None) -> Callable[[Budget], float]:
    """The cost of budgets in one unit: parameters (all, or without embedding and head), or operations for a token."""
    field = {"params": "parameters", "flops": "flops", "non_embedding": "non_embedding"}[unit]

    def measure(wanted: Budget) -> float:
        return float(getattr(cost(settings, wanted, sequence_length=sequence_length), field))

    return measure


def largest_within(
    rungs: Sequence[tuple[str, Budget]], measure: Callable[[Budget], float], limit: float
) -> tuple[str, Budget]:
    """The last rung of a ladder that costs at most `limit`, found by halving; the first where none does.

    Args:
        rungs: by ascending cost.
        measure: the cost of a budget.
        limit: of the cost.

    Raises:
        BudgetError: the limit is not positive.
    """
    if limit <= 0:
        raise BudgetError(f"the limit is {limit:g}: expected more than nothing")
    low, high = 0, len(rungs) - 1
    if measure(rungs[high][1]) <= limit:
        return rungs[high]
    while high - low > 1:
        middle = (low + high) // 2
        if measure(rungs[middle][1]) <= limit:
            low = middle
        else:
            high = middle
    return rungs[low]


def mix_n_match(
    settings: DecoderSettings,
    limit: float,
    granularities: Sequence[Granularity],
    *,
    unit: Unit = "params",
    targets: Sequence[Target] = ("ffn",),
    sequence_length: int | None = None,
) -> Budget:
    """The largest model of the rule that costs at most `limit`; the smallest trained one where none does.

    Args:
        settings: of the full model.
        limit: of the whole model's cost.
        granularities: that were trained, ascending.
        unit: of the limit.
        targets: what the granularities cut.
        sequence_length: with "flops": of the texts they are averaged over.

    Raises:
        BudgetError: the limit is not positive, or granularities do not fit the model.
    """
    rungs = ladder(settings, granularities, targets)
    return largest_within(rungs, measured_by(settings, unit, sequence_length), limit)[1]


def at_latency(
    settings: DecoderSettings,
    seconds: float,
    granularities: Sequence[Granularity],
    measure: Callable[[Budget], float],
    targets: Sequence[Target] = ("ffn",),
) -> Budget:
    """The largest model of the rule that was measured to take at most `seconds`.

    Args:
        settings: of the full model.
        seconds: as `measure` gives them.
        granularities: that were trained, ascending.
        measure: seconds of a budget, on this machine.
        targets: what the granularities cut.
    """
    return largest_within(ladder(settings, granularities, targets), partial(measure), seconds)[1]
