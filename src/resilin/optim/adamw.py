"""AdamW (Loshchilov and Hutter, 2019) through torch's fused kernel, with coupled or independent weight decay."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from resilin.config import component
from resilin.optim.groups import Rule, make_groups
from resilin.optim.schedule import Schedule
from resilin.optim.scheduled import Scheduled
from resilin.optim.settings import OptimizerSettings


class AdamW(OptimizerSettings):
    """AdamW with a schedule."""

    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and the second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decay per step: times the learning rate where `decay = "coupled"`, by itself where `"independent"`."""
    decay: Literal["coupled", "independent"] = "coupled"
    """coupled: theta -= s_t * lr * (Delta + wd * theta); independent: theta -= s_t * (lr * Delta + wd * theta)."""
    decay_vectors: bool = False
    """Whether norms and biases decay."""
    decay_embeddings: bool = True
    """Whether embedding tables decay."""
    schedule: component(Schedule, "resilin.optim.schedule:Cosine") = Field(default={})  # type: ignore[valid-type]
    """The schedule s_t."""
    rules: tuple[Rule, ...] = ()
    """Exceptions by parameter name and shape; the first match wins."""

    def build(self, model: nn.Module, total_steps: int) -> Scheduled:
        """The optimizer, its moments created beside the parameters."""
        groups = make_groups(
            model,
            self.weight_decay,
            rules=self.rules,
            decay_vectors=self.decay_vectors,
            decay_embeddings=self.decay_embeddings,
        )
        names = {p: name for group in groups for name, p in group.parameters}
        part = torch.optim.AdamW(
            [
                {
                    "params": [p for _, p in group.parameters],
                    "peak_lr": group.lr_scale * self.lr,
                    "weight_decay": group.weight_decay
                    / (group.lr_scale * self.lr if self.decay == "independent" else 1.0),
                }
                for group in groups
            ],
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            fused=True,
        )
        for parameter in names:
            part.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }
        return Scheduled([part], names, self.lr, partial(self.schedule.factor, total=total_steps, peak=self.lr))
