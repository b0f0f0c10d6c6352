"""Evaluating a family: what each member costs and how good it is, and the picture of one against the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from resilin.models.decoder_settings import DecoderSettings
from resilin.nested.budgets import Budget, BudgetError
from resilin.nested.consistency import Consistency, consistency
from resilin.nested.cost import Cost, Latency, cost, latency
from resilin.nested.elastic_record import ElasticRecord
from resilin.nested.in_place import decoder_in
from resilin.nested.rungs import Kind, SizeRecord
from resilin.nouns import Batch


@dataclass(frozen=True, slots=True)
class Member:
    """A sub-model of a family.

    Attributes:
        name: its size, or sizes by layer.
        wanted: its budget.
        kind: whether it was trained, mixes trained sizes, or neither.
    """

    name: str
    wanted: Budget
    kind: Kind


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A member with what was measured of it; None where nothing was.

    Attributes:
        member: which one.
        cost: counted.
        quality: on held-out data.
        seconds: on this machine.
    """

    member: Member
    cost: Cost
    quality: Consistency | None
    seconds: Latency | None

    def row(self) -> dict[str, Any]:
        """As JSON values: sizes in numbers, operations for a token, seconds."""
        found: dict[str, Any] = {
            "name": self.member.name,
            "kind": self.member.kind,
            "budget": self.member.wanted.to_dict(),
            "parameters": self.cost.parameters,
            "non_embedding": self.cost.non_embedding,
            "flops_per_token": self.cost.flops,
            "kv_bytes_per_token": self.cost.kv_bytes,
        }
        if self.seconds is not None:
            found |= {"seconds_per_prompt": self.seconds.prompt, "seconds_per_token": self.seconds.token}
        if self.quality is not None:
            found |= {
                "tokens": self.quality.tokens,
                "loss": self.quality.loss,
                "perplexity": math.exp(min(self.quality.loss, 700.0)),
                "agreement": self.quality.agreement,
                "kl": self.quality.kl,
            }
        return found


def members_of(
    settings: DecoderSettings, record: SizeRecord, *, between: int = 1, more: Sequence[Budget] = ()
) -> list[Member]:
    """The sizes (or loops) of a record, some mixtures of neighbouring ones, and further budgets; by rising cost.

    Args:
        settings: of the full model.
        record: which sizes there are.
        between: how many mixtures between two sizes, spread evenly over those that the rule has; 0: none.
        more: further budgets, also untrained ones.

    Raises:
        BudgetError: sizes do not fit.
    """
    if between < 0:
        raise BudgetError(f"{between} mixtures between two sizes: expected 0 or more")
    rungs, layers = record.rungs(settings), record.rungs_per_size(settings)
    found = []
    for number, (name, wanted) in enumerate(rungs):
        step = number % layers  # how many layers have the larger of two sizes
        chosen = {round(layers * (k + 1) / (between + 1)) for k in range(between)}
        if step == 0 or step in chosen:
            found.append(Member(name, wanted, record.kind(settings, wanted)))
    known = {member.wanted for member in found}
    if isinstance(record, ElasticRecord):
        more = [*record.axes(settings), *more]
    found += [Member(str(one), one, record.kind(settings, one)) for one in more if one not in known]
    return sorted(found, key=lambda member: cost(settings, member.wanted).flops)


def evaluate_family(
    model: nn.Module,
    members: Sequence[Member],
    batches: Iterable[Batch] | None,
    *,
    timed: bool = True,
    prompt: int = 64,
    repeats: int = 5,
    progress: Callable[[int], None] | None = None,
) -> list[Evaluated]:
    """What each member costs and, with data, how good it is, on the same prefixes.

    Args:
        model: the full one.
        members: of its family.
        batches: of held-out tokens and labels; None: only costs are told.
        timed: whether each member is timed on this machine.
        prompt: tokens of the prompt that is timed.
        repeats: of which the median counts.
        progress: called after each batch with how many are done.
    """
    settings = decoder_in(model).settings
    prompt = min(prompt, settings.max_positions - 1)
    qualities: Sequence[Consistency | None] = [None] * len(members)
    if batches is not None:
        qualities = consistency(model, [member.wanted for member in members], batches, progress)
    times = [latency(model, m.wanted, prompt=prompt, repeats=repeats) if timed else None for m in members]
    return [
        Evaluated(member, cost(settings, member.wanted), quality, seconds)
        for member, quality, seconds in zip(members, qualities, times, strict=True)
    ]


def plot_family(found: Sequence[Evaluated], path: Path, title: str) -> bool:
    """Loss against parameters, operations and, where they were timed, seconds; trained sizes are filled points.

    Returns:
        False where matplotlib is not installed.

    Raises:
        BudgetError: the members were not evaluated.
    """
    measured = [(one, one.quality) for one in found if one.quality is not None]
    if not measured:
        raise BudgetError("there is nothing to plot: the family was evaluated on no data")
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes_of: list[tuple[str, Callable[[Evaluated], float]]] = [
        ("parameters", lambda one: one.cost.parameters),
        ("operations per token", lambda one: one.cost.flops),
    ]
    if all(one.seconds is not None for one, _ in measured):
        axes_of.append(("milliseconds per token", lambda one: 1e3 * one.seconds.token if one.seconds else math.nan))
    figure, axes = pyplot.subplots(1, len(axes_of), figsize=(5.2 * len(axes_of), 3.8), squeeze=False)
    looks = {"trained": ("o", "C0"), "mix": ("o", "white"), "untrained": ("x", "C3")}
    for (label, value), axis in zip(axes_of, axes.flat, strict=True):
        for kind, (marker, face) in looks.items():
            points = [(value(one), quality.loss) for one, quality in measured if one.member.kind == kind]
            if points:
                style = {"color": face} if marker == "x" else {"facecolors": face, "edgecolors": "C0"}
                axis.scatter(*zip(*points, strict=True), marker=marker, label=kind, zorder=2, **style)
        line = sorted((value(one), quality.loss) for one, quality in measured if one.member.kind == "trained")
        axis.plot(*zip(*line, strict=True), color="C0", alpha=0.3, zorder=1)
        axis.set(xlabel=label, ylabel="loss (nats per token)")
    axes.flat[0].set_title(title)
    axes.flat[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90, metadata={"Software": None})
    pyplot.close(figure)
    return True
