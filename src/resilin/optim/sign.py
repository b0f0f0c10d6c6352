"""Parameters of which only the sign of the gradient counts: each step moves them by the same amount, down the gradient.

A module names such parameters of its own in `moved_by_sign`, with how far a step moves them: the offsets that balance
experts (`resilin.models.balance`). Whatever the optimizer, they have no moments and no decay, and no schedule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from resilin.optim.groups import Group
from resilin.optim.part import Moments, Part, root_mean_square, with_gradient


def sign_rates(model: nn.Module) -> dict[str, float]:
    """How far a step moves each of a model's trainable parameters that go by sign, by name."""
    found: dict[str, float] = {}
    for path, module in model.named_modules():
        for name, rate in getattr(module, "moved_by_sign", {}).items():
            if getattr(module, name).requires_grad:
                found[f"{path}.{name}" if path else name] = rate
    return found


class SignPart(Part):
    """theta <- theta - rate * sign(g); where the gradient is 0, or there is none, theta stays."""

    def __init__(self, groups: Sequence[Group]) -> None:
        """Args:
        groups: whose `lr_scale` is the rate.
        """
        super().__init__(groups, 1.0, independent=False)

    def new_moments(self, parameter: nn.Parameter) -> Moments:
        """None."""
        return {}

    def update(self, factor: float, *, record: bool) -> Mapping[str, Tensor]:
        """The schedule's factor is not looked at."""
        deltas: dict[str, Tensor] = {}
        for pace, group in self.groups:
            members, grads = with_gradient(group)
            for member, grad in zip(members, grads, strict=True):
                move = torch.sign(grad)
                member.parameter.sub_(move, alpha=pace.lr)
                if record:
                    deltas[member.name] = root_mean_square(move)
        return deltas


def sign_parts(model: nn.Module, owned: Mapping[str, nn.Parameter] | None = None) -> list[Part]:
    """The part of a model's parameters that go by sign, or of what is owned of them; [] where there are none.

    Args:
        model: with all parameters that are here.
        owned: what of each parameter is updated here, by name; None: all.
    """
    here = dict(model.named_parameters()) if owned is None else owned
    by_rate: dict[float, list[tuple[str, nn.Parameter]]] = {}
    for name, rate in sign_rates(model).items():
        if name in here:
            by_rate.setdefault(rate, []).append((name, here[name]))
    groups = [Group(tuple(members), rate, 0.0) for rate, members in by_rate.items()]
    return [SignPart(groups)] if groups else []
