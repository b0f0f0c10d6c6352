"""Measuring gradients, updates and parameters while training, tensor by tensor.

An optimizer transform: on every n-th step it reads gradients before the inner optimizer's update, and moments and
parameters after it, and returns what it saw beside the inner optimizer's own logs. It changes none of them.

    [optimizer]
    use = "resilin.evaluate.update_probes:Probed"
    tensors = ["blocks.0.*"]
    optimizer = { lr = 3e-3 }

Logged for each tensor that matches (Wortsman et al., 2023, section 3.4):
    probe/gradient_rms/name    root mean square of the gradient as the optimizer gets it: after clipping;
                               `before_clipping` turns it back
    probe/update_rms/name      root mean square of Adam's direction m / (sqrt(v) + eps), bias-corrected, before lr
    probe/parameter_rms/name   root mean square of the parameter after the update
"""

from __future__ import annotations

from typing import Annotated

import fnmatch
from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from resilin.config import component
from resilin.nouns import AfterStep, BeforeStep, Optimizer, State, StepView
from resilin.optim.scheduled import Scheduled
from resilin.optim.settings import OptimizerSettings


def before_clipping(gradient_rms: float, gradient_norm: float, clip_norm: float) -> float:
    """A gradient's root mean square before global-norm clipping.

    Args:
        gradient_rms: after clipping.
        gradient_norm: the global norm before clipping, which every step logs as `grad_norm`.
        clip_norm: the run's `train.clip_norm`; 0: it does not clip.
    """
    return gradient_rms * max(1.0, gradient_norm / clip_norm) if clip_norm > 0 else gradient_rms


def adam_update(exp_avg: Tensor, exp_avg_sq: Tensor, step: float, betas: tuple[float, float], eps: float) -> Tensor:
    """Adam's bias-corrected direction m / (sqrt(v) + eps), from its moments after `step` updates, float32."""
    m = exp_avg.float() / (1.0 - betas[0] ** step)
    v = exp_avg_sq.float() / (1.0 - betas[1] ** step)
    direction: Tensor = m / (v.sqrt() + eps)
    return direction


def _roots(tensors: list[Tensor]) -> list[float]:
    """Root mean square of each, in one transfer from the device."""
    if not tensors:
        return []
    norms: list[float] = torch.stack(torch._foreach_norm([t.float() for t in tensors])).tolist()
    return [norm / tensor.numel() ** 0.5 for norm, tensor in zip(norms, tensors, strict=True)]


class ProbedOptimizer:
    """An optimizer that also says how large gradients, updates and parameters are, on every n-th step."""

    def __init__(self, inner: Optimizer, watched: Mapping[str, nn.Parameter], every: int):
        self.inner = inner
        self.watched = dict(watched)
        self.every = every

    @torch.no_grad()
    def step(self, step: int) -> Mapping[str, float]:
        """The inner optimizer's update and logs, with the measurements beside them."""
        if step % self.every:
            return self.inner.step(step)
        names = [name for name, p in self.watched.items() if p.grad is not None]
        gradients = _roots([self.watched[name].grad for name in names])  # type: ignore[misc]
        logs = dict(self.inner.step(step))
        logs |= {f"probe/gradient_rms/{n}": rms for n, rms in zip(names, gradients, strict=True)}
        updates = self._updates()
        logs |= {f"probe/update_rms/{n}": r for n, r in zip(updates, _roots(list(updates.values())), strict=True)}
        parameters = _roots(list(self.watched.values()))
        logs |= {f"probe/parameter_rms/{n}": r for n, r in zip(self.watched, parameters, strict=True)}
        return logs

    def _updates(self) -> dict[str, Tensor]:
        """Adam's directions of the watched tensors; tensors that another rule updates have none."""
        if not isinstance(self.inner, Scheduled):
            return {}
        name_of = {p: name for name, p in self.watched.items()}
        found = {}
        for part in self.inner.parts:
            for group in part.param_groups:
                for p in group["params"]:
                    state = part.state[p]
                    if p in name_of and {"exp_avg", "exp_avg_sq", "step"} <= state.keys():
                        found[name_of[p]] = adam_update(
                            state["exp_avg"], state["exp_avg_sq"], float(state["step"]), group["betas"], group["eps"]
                        )
        return found

    def zero_grad(self) -> None:
        """The inner optimizer's."""
        self.inner.zero_grad()

    def before_step(self, view: StepView) -> None:
        """Passed on to the inner optimizer."""
        if isinstance(self.inner, BeforeStep):
            self.inner.before_step(view)

    def after_step(self, view: StepView) -> None:
        """Passed on to the inner optimizer."""
        if isinstance(self.inner, AfterStep):
            self.inner.after_step(view)

    def state_dict(self) -> State:
        """The inner optimizer's."""
        return self.inner.state_dict()

    def load_state_dict(self, state: State) -> None:
        """The inner optimizer's."""
        self.inner.load_state_dict(state)


class Probed(OptimizerSettings):
    """Measure gradients, Adam updates and parameters while training with an optimizer."""

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
