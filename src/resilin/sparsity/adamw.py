"""AdamW in which the decay of masked weights stays out of the momentum, but not out of the normalisation.

For a masked matrix W with mask m, gradient g of the effective weight and strength lambda:

    W <- W * (1 - s_t * lr * wd)
    mom <- b1 * mom + (1 - b1) * g
    d = lambda * (1 - m) * W,   u = mom + d
    v <- b2 * v + (1 - b2) * (g + d)^2          second_moment = "gradient"
    v <- b2 * v + (1 - b2) * u^2                second_moment = "update", as the published GPT-2 code has it
    W <- W - s_t * lr / (1 - b1^t) * u / (sqrt(v) / sqrt(1 - b2^t) + eps)

With "gradient" and lambda = 0 this is AdamW, to the bit. "update" is another optimizer also then: v follows the squared
momentum, which is smaller than the squared gradient where gradients are noisy, so steps are longer.

Sources: Huang et al., arXiv 2407.20584, appendix; their adamw.py, whose integer masks under `~` gave masked weights
the decay -lambda * W and kept ones -2 * lambda * W. Masks here are boolean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from resilin.optim.adamw import AdamW, AdamWPart
from resilin.optim.groups import Group
from resilin.optim.part import Member, Pace, Part, root_mean_square, with_gradient
from resilin.optim.scheduled import Owned, Scheduled
from resilin.optim.settings import OptimizerSettings
from resilin.sparsity.decay import Ramp, decay_of, masked_weights
from resilin.sparsity.linear import SparseLinear

SecondMoment = Literal["gradient", "update"]


class SparseAdamW(AdamW):
    """AdamW whose masked matrices decay where they are masked; every other parameter gets AdamW as it is."""

    ramp: Ramp = Ramp()
    """lambda(t)."""
    second_moment: SecondMoment = "gradient"
    """What v averages the square of: the gradient with the decay, or the momentum with the decay (published code)."""
    decay_masked: bool = True
    """Whether weight decay acts on masked weights too, as published; it helps the mask's own decay against them."""

    def build(self, model: nn.Module, total_steps: int) -> Scheduled:
        """The optimizer.

        Raises:
            SparsityError: the model has no masks.
        """
        schedule = partial(self.schedule.factor, total=total_steps, peak=self.lr)
        return SparseScheduled(
            self.all_parts(model), self.lr, schedule, self.record, self.record_every, ramp=self.ramp, steps=total_steps
        )

    def owning(self, model: nn.Module, total_steps: int) -> Callable[[Owned], Scheduled]:
        """Refused: a mask lies over a whole matrix."""
        return OptimizerSettings.owning(self, model, total_steps)  # type: ignore[return-value]

    def parts(self, model: nn.Module, owned: Owned | None = None) -> list[Part]:
        """One part for masked matrices, one for everything else."""
        layers = masked_weights(model)
        groups = self.groups(model)
        masked = _those(groups, lambda p: id(p) in layers)
        others = _those(groups, lambda p: id(p) not in layers)
        independent = self.decay == "independent"
        sparse = SparseAdamWPart(
            masked,
            self.lr,
            independent=independent,
            betas=self.betas,
            eps=self.eps,
            layers=layers,
            second_moment=self.second_moment,
            decay_masked=self.decay_masked,
        )
        return [sparse, AdamWPart(others, self.lr, independent=independent, betas=self.betas, eps=self.eps)]


def _those(groups: Sequence[Group], wanted: Callable[[nn.Parameter], bool]) -> list[Group]:
    picked = [
        Group(tuple((n, p) for n, p in group.parameters if wanted(p)), group.lr_scale, group.weight_decay)
        for group in groups
    ]
    return [group for group in picked if group.parameters]


class SparseScheduled(Scheduled):
    """Parts of which some decay masked weights with the strength of the step, logged as `mask_decay`."""

    def __init__(self, *args: object, ramp: Ramp, steps: int) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.ramp, self.steps = ramp, steps

    def step(self, step: int) -> Mapping[str, float]:
        """Apply the update of step `step`."""
        strength = self.ramp.at(step, self.steps)
        for part in self.parts:
            if isinstance(part, SparseAdamWPart):
                part.strength = strength
        return {**super().step(step), "mask_decay": strength}


class SparseAdamWPart(AdamWPart):
    """Masked matrices; `strength` is lambda of the step that comes."""

    def __init__(
        self,
        groups: Sequence[Group],
        lr: float,
        *,
        independent: bool,
        betas: tuple[float, float],
        eps: float,
        layers: Mapping[int, SparseLinear],
        second_moment: SecondMoment = "gradient",
        decay_masked: bool = True,
    ) -> None:
        super().__init__(groups, lr, independent=independent, betas=betas, eps=eps)
        self.layers, self.second_moment, self.decay_masked = layers, second_moment, decay_masked
        self.strength = 0.0

    def update(self, factor: float, *, record: bool) -> Mapping[str, Tensor]:
        """The kernel of torch while nothing decays; else matrix by matrix, so that temporaries are one matrix."""
        if self.strength == 0 and self.second_moment == "gradient" and self.decay_masked:
            return super().update(factor, record=record)
        deltas: dict[str, Tensor] = {}
        for pace, group in self.groups:
            for member, grad in zip(*with_gradient(group), strict=True):
                delta = self._move(member, grad, pace, factor)
                if record:
                    deltas[member.name] = root_mean_square(delta)
        return deltas

    def _move(self, member: Member, grad: Tensor, pace: Pace, factor: float) -> Tensor:
        weight, layer = member.parameter, self.layers[id(member.parameter)]
        mean, square, step = (member.moments[name] for name in ("exp_avg", "exp_avg_sq", "step"))
        step += 1
        count = step.double()  # powers of the betas in float32 would be seen in float64 weights
        if pace.decay and self.decay_masked:
            weight.mul_(1 - factor * pace.decay)
        elif pace.decay:
            weight.mul_(torch.where(layer.mask, 1 - factor * pace.decay, 1.0))
        mean.lerp_(grad, 1 - self.betas[0])
        decay = decay_of(layer, self.strength)
        update = mean + decay
        seen = update if self.second_moment == "update" else decay.add_(grad)
        square.mul_(self.betas[1]).addcmul_(seen, seen, value=1 - self.betas[1])
        root = (square / (1 - self.betas[1] ** count)).sqrt_().add_(self.eps)
        delta = update.div_(1 - self.betas[0] ** count).div_(root)
        weight.add_(delta, alpha=-factor * pace.lr)
        return delta
