"""A layout as a few choices, which samplers and surrogates work on, and what is known of it before it is tried."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from resilin.models.flops import parameter_counts
from resilin.planner.cost import Arrangement, Prediction

Choice = int | str
Known = dict[str, list[Choice]]
"""All values of every choice that is one, in order."""
NAMES = (
    "data",
    "tensor",
    "pipeline",
    "context",
    "expert",
    "micro",
    "sharding",
    "schedule",
    "recompute",
    "offload",
    "sequence",
)


@dataclass(frozen=True, slots=True)
class Hint:
    """What the cost model says of a layout, for whoever does not trust it.

    Attributes:
        rate: tokens a second.
        numbers: for trees: `memory` is log2 of the predicted bytes over what a plan may count on; the others describe
            model and layout by ratios that mean the same for other models.
    """

    rate: float
    numbers: dict[str, float] = field(default_factory=dict)


def hint_of(step: Prediction, limit: float) -> Hint:
    """From a prediction.

    Args:
        step: of the layout.
        limit: bytes that a plan may count on.
    """
    work, plan, d = step.work, step.plan, step.plan.degrees
    return Hint(
        step.tokens_per_second,
        {
            "memory": math.log2(step.memory.total / limit),
            "parameters": math.log2(parameter_counts(work.model).total),
            "workers": math.log2(d.workers),
            "tokens": math.log2(plan.micro * work.tokens / d.context),
            "width": math.log2(work.model.hidden_size / d.tensor),
            "filled": math.log2(plan.micros(work) / d.pipeline),
        },
    )


def choices(plan: Arrangement) -> dict[str, Choice]:
    """A layout's choices; different layouts of a search differ in one of them at least."""
    d = plan.degrees
    schedule = f"{plan.parallel.schedule} x{plan.parallel.chunks}" if d.pipeline > 1 else "none"
    sharding = plan.parallel.sharding + (f" x{d.replicate}" if d.replicate > 1 else "")
    return {
        "data": d.data * d.replicate,
        "tensor": d.tensor,
        "pipeline": d.pipeline,
        "context": d.context,
        "expert": d.expert,
        "micro": plan.micro,
        "sharding": sharding if plan.states_divided else "none",
        "schedule": schedule,
        "recompute": plan.recompute,
        "offload": plan.offload,
        "sequence": "divided" if plan.parallel.sequence and d.tensor > 1 else "whole",
    }


def values(plans: Sequence[Arrangement], earlier: Iterable[Mapping[str, Choice]] = ()) -> Known:
    """All values of every choice that is one, in order.

    How many data workers there are is none where all layouts have as many workers: the other degrees decide it.

    Args:
        plans: layouts.
        earlier: choices of other studies, whose values count as well.
    """
    every = [*map(choices, plans), *earlier]
    found = {name: sorted({one[name] for one in every if name in one}, key=_order) for name in NAMES}
    if len({plan.degrees.workers for plan in plans}) == 1 and not earlier:
        found["data"] = found["data"][:1]
    return {name: each for name, each in found.items() if len(each) > 1}


def numbers(chosen: Mapping[str, Choice], known: Known) -> list[float]:
    """A layout's choices as numbers for a regressor: degrees and rows by their logarithm, names by their place."""
    return [_number(chosen.get(name, each[0]), each) for name, each in known.items()]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A layout that may be tried.

    Attributes:
        plan: the layout.
        choices: of it.
        key: the same, to compare by.
        row: numbers for trees: choices, and those of the hint.
        hint: what the cost model says; None where it is not asked.
    """

    plan: Arrangement
    choices: dict[str, Choice]
    key: tuple[Choice, ...]
    row: tuple[float, ...]
    hint: Hint | None


def key_of(chosen: Mapping[str, Choice]) -> tuple[Choice, ...]:
    """Choices in order, to compare by."""
    return tuple(chosen[name] for name in NAMES)


def row_of(chosen: Mapping[str, Choice], known: Known, hint: Hint | None) -> tuple[float, ...]:
    """A layout as numbers for trees."""
    return (*numbers(chosen, known), *(hint.numbers.values() if hint else ()))


def candidates(plans: Sequence[Arrangement], known: Known, hints: Sequence[Hint] = ()) -> list[Candidate]:
    """Layouts with all that proposers ask of them.

    Args:
        plans: the layouts.
        known: values of choices.
        hints: of each of them; empty: nothing is known.
    """
    found = []
    for place, plan in enumerate(plans):
        chosen, hint = choices(plan), hints[place] if hints else None
        found.append(Candidate(plan, chosen, key_of(chosen), row_of(chosen, known, hint), hint))
    return found


def _number(value: Choice, each: Sequence[Choice]) -> float:
    return math.log2(value) if isinstance(value, int) else float(each.index(value))


def _order(value: Choice) -> tuple[int, str]:
    return (value, "") if isinstance(value, int) else (0, value)
