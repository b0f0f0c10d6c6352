"""AdamW through torch's fused kernel, with coupled or independent weight decay.

Sources: Loshchilov and Hutter, "Decoupled weight decay regularization", 2019 (the paper's decay is independent of the
learning rate; torch's is coupled to it); Wortsman et al., 2023, section 3.2.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim.adamw import adamw

from resilin.optim.groups import Group
from resilin.optim.part import Moments, Part, root_mean_square, with_gradient
from resilin.optim.scheduled import Owned, ScheduledSettings

Beta = Annotated[float, Field(ge=0, lt=1)]


class AdamWPart(Part):
    """theta <- theta - s_t * (lr * Delta + decay * theta), Delta = m / (sqrt(u) + eps) with bias corrections.

    m (`exp_avg`) and u (`exp_avg_sq`) are moving averages of the gradient and its square, in the parameter's format.
    """

    def __init__(
        self, groups: Sequence[Group], lr: float, *, independent: bool, betas: tuple[float, float], eps: float
    ):
        super().__init__(groups, lr, independent=independent)
        self.betas, self.eps = betas, eps

    def new_moments(self, parameter: nn.Parameter) -> Moments:
        """Zeros, and a count of steps."""
        return {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format, requires_grad=False),
        }

    def update(self, factor: float, *, record: bool) -> Mapping[str, Tensor]:
        """One kernel per group."""
        deltas: dict[str, Tensor] = {}
        for pace, group in self.groups:
            members, grads = with_gradient(group)
            adamw(
                [m.parameter for m in members],
                grads,
                [m.moments["exp_avg"] for m in members],
                [m.moments["exp_avg_sq"] for m in members],
                [],
                [m.moments["step"] for m in members],
                fused=True,
                amsgrad=False,
                beta1=self.betas[0],
                beta2=self.betas[1],
                lr=factor * pace.lr,
                weight_decay=pace.decay / pace.lr,  # the kernel multiplies by its lr again
                eps=self.eps,
                maximize=False,
            )
            # The fused kernel counts no change of its tensors; autograd, and a save under way, rely on the count.
            increment_version(
                tensor for m in members for tensor in (m.parameter, m.moments["exp_avg"], m.moments["exp_avg_sq"])
            )
            if record:
                deltas |= {m.name: root_mean_square(self.delta(m.moments)) for m in members}
        return deltas

    def hyper_parameters(self) -> dict[str, Any]:
        """Those of torch's AdamW."""
        return {"betas": list(self.betas), "eps": self.eps}

    def delta(self, moments: Moments) -> Tensor:
        """The direction of the last step, before the learning rate and without decay."""
        step = moments["step"]
        mean = moments["exp_avg"] / (1 - self.betas[0] ** step)
        root = (moments["exp_avg_sq"] / (1 - self.betas[1] ** step)).sqrt_()
        return mean.div_(root.add_(self.eps))


class AdamW(ScheduledSettings):
    """AdamW; masters and moments are float32, whatever the forward pass computes in."""

    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay of the moving averages of the gradient and of its square."""
    eps: float = Field(default=1e-8, ge=0)
    """Added to the root of the second moment; too large where gradients are tiny (Wortsman et al., section 3.4)."""

    def parts(self, model: nn.Module, owned: Owned | None = None) -> list[Part]:
        """One part with all parameters."""
        independent = self.decay == "independent"
        return [AdamWPart(self.groups(model, owned), self.lr, independent=independent, betas=self.betas, eps=self.eps)]
