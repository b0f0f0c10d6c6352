"""Measuring gradients while training, tensor by tensor.

An optimizer transform: on every n-th step it reads the gradients it is about to hand to the inner optimizer and logs
their root mean square as `probe/gradient_rms/<name>` (Wortsman et al., 2023, section 3.4). It changes nothing. Updates
and parameters are logged by the optimizers themselves (`record = ["update_rms", "parameter_rms"]`).

    [optimizer]
    use = "resilin.evaluate.gradient_probes:Probed"
    tensors = ["blocks.0.*"]
    optimizer = { lr = 3e-3 }

Clipping comes before the optimizer, so what is logged is after it; `before_clipping` turns it back.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from resilin.config import component
from resilin.nouns import Optimizer
from resilin.optim.settings import OptimizerSettings
from resilin.transforms import OptimizerTransform


def before_clipping(gradient_rms: float, gradient_norm: float, clip_norm: float) -> float:
    """A gradient's root mean square before global-norm clipping.

    Args:
        gradient_rms: after clipping.
        gradient_norm: the global norm before clipping, which every step logs as `grad_norm`.
        clip_norm: the run's `train.clip_norm`; 0: it does not clip.
    """
    return gradient_rms * max(1.0, gradient_norm / clip_norm) if clip_norm > 0 else gradient_rms


class ProbedOptimizer(OptimizerTransform):
    """An optimizer that also says how large the gradients are, on every n-th step."""

    def __init__(self, inner: Optimizer, watched: Mapping[str, nn.Parameter], every: int):
        super().__init__(inner)
        self.watched = dict(watched)
        self.every = every

    @torch.no_grad()
    def step(self, step: int) -> Mapping[str, float]:
        """The inner optimizer's update and logs, with the measurements beside them."""
        seen = {n: p.grad for n, p in self.watched.items() if p.grad is not None} if step % self.every == 0 else {}
        if not seen:
            return self.inner.step(step)
        # One transfer from the device, before the update: an optimizer may write into the gradients.
        norms: list[float] = torch.stack(torch._foreach_norm([g.float() for g in seen.values()])).tolist()
        rms = {
            f"probe/gradient_rms/{name}": norm / gradient.numel() ** 0.5
            for (name, gradient), norm in zip(seen.items(), norms, strict=True)
        }
        return {**self.inner.step(step), **rms}


class Probed(OptimizerSettings):
    """Measure gradients while training with an optimizer."""

    every: int = Field(default=25, ge=1)
    """Steps between measurements; the first step is measured."""
    tensors: tuple[str, ...] = ("blocks.*.weight",)
    """Shell patterns of the parameter names to watch."""
    optimizer: Annotated[OptimizerSettings, component("resilin.optim.adamw:AdamW")] = Field(
        default_factory=dict, validate_default=True
    )
    """What updates the parameters."""

    def build(self, model: nn.Module, total_steps: int) -> ProbedOptimizer:
        """The optimizer, watched.

        Raises:
            ValueError: for patterns that match no trainable parameter.
        """
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        watched = {n: p for n, p in trainable.items() if any(fnmatch.fnmatchcase(n, w) for w in self.tensors)}
        if not watched:
            raise ValueError(
                f"optimizer.tensors {list(self.tensors)} matches no trainable parameter; names look like "
                f"{', '.join(list(trainable)[:4])}"
            )
        return ProbedOptimizer(self.optimizer.build(model, total_steps), watched, self.every)
