"""A part of an optimizer: some parameters that one update rule moves.

Not a `torch.optim.Optimizer`: that class keys its state by parameter order, and its construction imports the whole of
`torch.compile` (1.3 s of a run's start). The rules below call torch's fused and foreach kernels all the same.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from resilin.optim.groups import Group

Moments = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Member:
    """A parameter with its name and its moments."""

    name: str
    parameter: nn.Parameter
    moments: Moments = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Pace:
    """The factors of a group that stay the same over the run.

    Attributes:
        lr: peak learning rate.
        decay: at peak, the fraction of a parameter that decays in one step: lr * weight_decay where decay is
            coupled to the learning rate, weight_decay itself where it is independent. The schedule scales both.
    """

    lr: float
    decay: float


class Part(ABC):
    """Groups of parameters, moved by the rule of a subclass."""

    def __init__(self, groups: Sequence[Group], lr: float, *, independent: bool):
        """Args:
        groups: whose parameters are moved; their moments are created here, beside them.
        lr: peak learning rate before each group's factor.
        independent: whether weight decay is independent of the learning rate.
        """
        self.groups: list[tuple[Pace, list[Member]]] = []
        for group in groups:
            rate = lr * group.lr_scale
            pace = Pace(rate, group.weight_decay * (1.0 if independent else rate))
            self.groups.append((pace, [Member(n, p, self.new_moments(p)) for n, p in group.parameters]))

    @abstractmethod
    def new_moments(self, parameter: nn.Parameter) -> Moments:
        """The moments before the first step."""

    @abstractmethod
    def update(self, factor: float, *, record: bool) -> Mapping[str, Tensor]:
        """Move every parameter that has a gradient.

        Args:
            factor: the schedule's s_t: theta <- theta - s_t * (lr * Delta + decay * theta).
            record: whether to return the root mean square of each parameter's Delta, 0-d, by name.
        """

    def hyper_parameters(self) -> dict[str, Any]:
        """The rule's own settings by the names that torch gives them, as JSON values."""
        return {}

    def described_groups(self) -> list[dict[str, Any]]:
        """The groups as a torch optimizer would save them, with names of parameters: `{"lr": peak, "weight_decay":
        as torch multiplies it by the learning rate, ..., "parameters": [name, ...]}`.
        """
        return [
            {
                "lr": pace.lr,
                "weight_decay": pace.decay / pace.lr,
                **self.hyper_parameters(),
                "parameters": [member.name for member in members],
            }
            for pace, members in self.groups
            if members
        ]

    def over(self, place: Callable[[Member], Member]) -> Self:
        """The same rule over other memory.

        Args:
            place: gives for each member what is moved in its place.
        """
        other = copy.copy(self)
        other.groups = [(pace, [place(member) for member in members]) for pace, members in self.groups]
        return other

    def owning(self, owned: Mapping[str, nn.Parameter]) -> Self:
        """The same rule over what is owned of its parameters, by name, with moments of its own."""
        other = copy.copy(self)
        other.groups = []
        for pace, members in self.groups:
            mine = [(member.name, owned[member.name]) for member in members if member.name in owned]
            if mine:
                other.groups.append((pace, [Member(name, p, self.new_moments(p)) for name, p in mine]))
        return other

    def members(self) -> Iterable[Member]:
        """All parameters of the part."""
        for _, members in self.groups:
            yield from members


def with_gradient(members: Iterable[Member]) -> tuple[list[Member], list[Tensor]]:
    """Members that have a gradient, and their gradients."""
    pairs = [(m, m.parameter.grad) for m in members if m.parameter.grad is not None]
    return [m for m, _ in pairs], [grad for _, grad in pairs]


def root_mean_square(x: Tensor) -> Tensor:
    """sqrt(mean(x^2)), 0-d, reduced in at least float32."""
    norm: Tensor = torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32))
    return norm / math.sqrt(x.numel())
