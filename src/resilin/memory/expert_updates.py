"""A run's optimizer, applied to one expert at a time, now or later.

An update of an expert that no token visited has a gradient of zeros: it can be made up for when the expert is needed
next, from the numbers of the steps that it missed. Nothing is approximated, and nothing is fetched in between.

Shapes: P parameters of one expert.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from resilin.config import UserError
from resilin.memory.expert_state import ExpertShape, ExpertState, Record
from resilin.optim.part import Member
from resilin.optim.scheduled import Scheduled
from resilin.optim.settings import OptimizerSettings


class ExpertUpdates:
    """The update rule of one layer's experts.

    Args:
        optimizer: of the run.
        outline: names and shapes of the whole model, by which it groups parameters.
        total_steps: of the run.
        names: of the layer's stacks in the model, by `ExpertShape.names`.
        shape: of an expert.

    Raises:
        UserError: the optimizer cannot update a part of a model, or treats the matrices of an expert in unlike ways.

    Attributes:
        record: how an expert's state lies in memory.
    """

    def __init__(
        self,
        optimizer: OptimizerSettings,
        outline: nn.Module,
        total_steps: int,
        names: Mapping[str, str],
        shape: ExpertShape,
    ) -> None:
        owned = {names[n]: nn.Parameter(torch.empty(1, *shape.matrix_shape(n), device="meta")) for n in shape.names}
        built = optimizer.build_owned(outline, total_steps, owned)
        if not isinstance(built, Scheduled):
            raise UserError(
                f"memory.experts updates experts one by one, and {type(optimizer).__name__} makes no optimizer of "
                "parts (resilin.optim.Scheduled): use AdamW, SGD or Muon, or leave [memory.experts] out"
            )
        self._short, self._shape = {long: short for short, long in names.items()}, shape
        self._parts, self._schedule = built.parts, built.schedule
        kinds = {
            member.name: tuple((kind, moment.dim() > 0) for kind, moment in member.moments.items())
            for part in built.parts
            for member in part.members()
        }
        if len(set(kinds.values())) != 1:
            raise UserError(
                f"memory.experts keeps an expert's matrices together, and {type(optimizer).__name__} keeps unlike "
                f"things of {', '.join(sorted(kinds))}: use a rule that treats them alike"
            )
        ((*moments,),) = set(kinds.values())
        self.record = Record(shape, *(tuple(kind for kind, wide in moments if wide is w) for w in (True, False)))

    @torch.no_grad()
    def apply(self, state: ExpertState, grad_P: Tensor, steps: Sequence[int]) -> None:
        """Updates in place, one after another, all with one gradient.

        Args:
            state: of an expert.
            grad_P: its gradient, scaled.
            steps: the numbers of the updates.
        """
        if not steps:
            return

        def placed(member: Member) -> Member:
            name = self._short[member.name]
            parameter = nn.Parameter(self._shape.matrix(name, state.weights_P)[None], requires_grad=False)
            parameter.grad = self._shape.matrix(name, grad_P)[None]
            moments = state.moments(self._shape, name)
            return Member(member.name, parameter, {k: m[None] if m.dim() else m for k, m in moments.items()})

        parts = [part.over(placed) for part in self._parts]
        for step in steps:
            factor = self._schedule(step)
            for part in parts:
                part.update(factor, record=False)
        state.updates.add_(len(steps))


def outline_of(model: nn.Module) -> nn.Module:
    """The model's names and shapes without its memory."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
    return copy.deepcopy(model, memo)
