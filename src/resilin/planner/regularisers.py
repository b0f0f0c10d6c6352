"""Explicit regularisers of a run, switched off for a plan in which every token is seen once.

With one epoch the training loss on new data is an unbiased estimate of the test loss and nothing is over-fitted, so
dropout and label smoothing only slow the training down (arXiv 1906.06669, section 2 of the digest).
"""

from __future__ import annotations

from resilin.run.settings import RunSettings

FORCED = ("model.dropout", "objective.label_smoothing")
LEFT = ("optimizer.weight_decay",)


def _value(settings: RunSettings, key: str) -> float:
    section, name = key.split(".")
    return float(getattr(getattr(settings, section), name, 0.0) or 0.0)


def without_regularisers(settings: RunSettings, insist: bool = False) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Overrides that switch the explicit regularisers off, and sentences that say so.

    Args:
        settings: of the run.
        insist: keep them; the sentences then say what they cost.
    """
    overrides, notes = [], []
    for key in FORCED:
        value = _value(settings, key)
        if not value:
            continue
        if insist:
            notes.append(f"{key} = {value:g} is kept as insisted on: with tokens seen once it only slows training")
        else:
            overrides.append(f"{key}=0.0")
            notes.append(f"{key} is set to 0 (it was {value:g}): with tokens seen once nothing is over-fitted")
    for key in LEFT:
        value = _value(settings, key)
        if value:
            notes.append(f"{key} = {value:g} is left: it steers the size of updates too; the paper's setting is 0")
    return tuple(overrides), tuple(notes)
