"""One layer's experts as tiers know them: who has their gradients, and which updates they may have missed.

Shapes: E experts, P parameters of one expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from resilin.config import UserError
from resilin.memory.expert_state import ExpertShape, ExpertState
from resilin.memory.expert_updates import ExpertUpdates
from resilin.models.moe import Experts


class Unit:
    """Has the gradient of one expert, (P,) in host memory, where a parameter would have its own."""

    __slots__ = ("grad",)

    def __init__(self) -> None:
        self.grad: Tensor | None = None


@dataclass
class ExpertLayer:
    """What is known of a layer's experts outside their states.

    Attributes:
        prefix: of its stacks' names in the model.
        module: of the model.
        updates: its experts'; None: they are frozen.
        units: one for each expert.
        missed: numbers of the updates of which some expert may have had no part yet.
        before: how many updates there were before those.
        expected: the experts that the last step used: what the next one is expected to.
        used: those that this step uses.
        trained: whether this step computed gradients here.
    """

    prefix: str
    module: Experts
    updates: ExpertUpdates | None
    units: list[Unit]
    missed: list[int] = field(default_factory=list)
    before: int = 0
    expected: list[int] = field(default_factory=list)
    used: dict[int, None] = field(default_factory=dict)
    trained: bool = False

    def names(self, shape: ExpertShape) -> dict[str, str]:
        """Of the stacks in the model, by `ExpertShape.names`."""
        return {short: f"{self.prefix}.{short}" if self.prefix else short for short in shape.names}

    def make_up(self, state: ExpertState, zeros_P: Tensor) -> bool:
        """Give a state the updates that it has missed; whether there were any."""
        had = int(state.updates) - self.before if self.missed else 0
        if had == len(self.missed):
            return False
        assert self.updates is not None
        self.updates.apply(state, zeros_P, self.missed[had:])
        return True


@dataclass(frozen=True)
class StackRows:
    """The gradient of one stack, see `resilin.optim.rows`."""

    holders: list[Unit]
    name: str
    shape: ExpertShape

    def rows(self) -> list[Tensor | None]:
        """One for each expert."""
        return [None if unit.grad is None else self.shape.matrix(self.name, unit.grad) for unit in self.holders]


def common_shape(modules: Mapping[str, Experts]) -> tuple[ExpertShape, int, bool]:
    """The shape of all experts, how many a layer has, and whether they are trained.

    Raises:
        UserError: there are none, or they are unlike.
    """
    found = {
        (m.up.shape[2], m.up.shape[1], m.gate is not None, len(m.up), p.requires_grad)
        for m in modules.values()
        for p in m.parameters()
    }
    if not found:
        raise UserError("memory.experts needs a model with experts: set model.moe, or leave [memory.experts] out")
    if len(found) > 1:
        sizes = "; ".join(
            f"{count} of {wide} x {hidden}, {'trained' if trained else 'frozen'}"
            for hidden, wide, _, count, trained in sorted(found)
        )
        raise UserError(
            "memory.experts keeps experts of one shape in all layers, all trained or all frozen, and these are unlike: "
            f"{sizes}. Give all layers the same, or leave [memory.experts] out"
        )
    ((hidden, wide, gated, count, trained),) = found
    return ExpertShape(hidden, wide, gated), count, trained
