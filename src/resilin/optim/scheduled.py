"""The Optimizer noun over parts: schedule in, state by parameter name out; and the settings all optimizers share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from resilin.config import UserError, component
from resilin.nouns import State
from resilin.optim.groups import Group, Rule, make_groups
from resilin.optim.mup import learning_rate_scales
from resilin.optim.part import Part, root_mean_square
from resilin.optim.schedule import Schedule
from resilin.optim.settings import OptimizerSettings
from resilin.optim.sign import sign_parts, sign_rates

Owned = Mapping[str, nn.Parameter]
"""What of each parameter is updated here: some of its elements, flat, or all of it."""

Recorded = Literal["update_rms", "parameter_rms"]


class ScheduledSettings(OptimizerSettings):
    """What every optimizer here has: a learning rate with a schedule, weight decay, and rules for parameters."""

    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(default=0.1, ge=0)
    """lambda: what decays per step, times the learning rate where `decay` is coupled."""
    decay: Literal["coupled", "independent"] = "coupled"
    """coupled: theta -= s_t * lr * (Delta + lambda * theta), as in torch; independent:
    theta -= s_t * (lr * Delta + lambda * theta), with a lambda near 1e-4."""
    decay_vectors: bool = False
    """Whether norms and biases decay."""
    decay_embeddings: bool = True
    """Whether embedding tables decay."""
    schedule: Annotated[Schedule, component("resilin.optim.schedule:Cosine")] = Field(
        default_factory=dict, validate_default=True
    )
    """The schedule s_t."""
    rules: tuple[Rule, ...] = ()
    """Exceptions by parameter name and shape; the first match wins."""
    mup_base_width: int | None = Field(default=None, gt=0)
    """muP: learning rates of linear layers are scaled by this width / hidden size; 256 in Wortsman et al. (2023)."""
    record: tuple[Recorded, ...] = ()
    """Log root mean squares, of each parameter and of all: of its update Delta (before the learning rate), of its
    values after the step."""
    record_every: int = Field(default=1, gt=0)
    """Steps between those logs."""

    @model_validator(mode="after")
    def _minimum_below_peak(self) -> Self:
        minimum = self.schedule.min_lr
        if minimum is not None and minimum > self.lr:
            raise ValueError(
                f"schedule.min_lr ({minimum:g}) is above the peak learning rate lr ({self.lr:g}): lower it, or give "
                "min_ratio"
            )
        return self

    def groups(self, model: nn.Module, owned: Owned | None = None) -> list[Group]:
        """The model's trainable parameters by these settings; or what is owned of them, in their places."""
        scales = None if self.mup_base_width is None else learning_rate_scales(model, self.mup_base_width)
        groups = make_groups(
            model,
            self.weight_decay,
            rules=self.rules,
            decay_vectors=self.decay_vectors,
            decay_embeddings=self.decay_embeddings,
            lr_scales=scales,
            apart=sign_rates(model).keys(),
        )
        if owned is None:
            return groups
        mine = [
            replace(group, parameters=tuple((name, owned[name]) for name, _ in group.parameters if name in owned))
            for group in groups
        ]
        return [group for group in mine if group.parameters]

    @abstractmethod
    def parts(self, model: nn.Module, owned: Owned | None = None) -> list[Part]:
        """The update rules over `self.groups(model, owned)`."""

    def all_parts(self, model: nn.Module, owned: Owned | None = None) -> list[Part]:
        """And that of parameters that go by sign."""
        return [*self.parts(model, owned), *sign_parts(model, owned)]

    def build(self, model: nn.Module, total_steps: int) -> Scheduled:
        """The optimizer, its moments created beside the parameters."""
        schedule = partial(self.schedule.factor, total=total_steps, peak=self.lr)
        return Scheduled(self.all_parts(model), self.lr, schedule, self.record, self.record_every)

    def owning(self, model: nn.Module, total_steps: int) -> Callable[[Owned], Scheduled]:
        """What makes the optimizer of one of many workers.

        Raises:
            UserError: something is recorded, for which all elements of a parameter would be needed.
        """
        if self.record:
            raise UserError("optimizer.record needs all elements of a parameter in one process: use one worker")
        schedule = partial(self.schedule.factor, total=total_steps, peak=self.lr)
        # All workers say the same of the whole model's groups, whatever each of them owns. One number stands for each
        # parameter: moments are made beside it, and torch's meta device would cost more than all else here.
        stand_ins = {name: nn.Parameter(torch.empty(1)) for name, p in model.named_parameters() if p.requires_grad}
        whole = self.all_parts(model, stand_ins)
        groups = [group for part in whole for group in part.described_groups()]
        return lambda owned: Scheduled([part.owning(owned) for part in whole], self.lr, schedule, groups=groups)


class Scheduled:
    """Parts that share a schedule, seen as one `resilin.nouns.Optimizer`.

    Attributes:
        parts: the update rules, each over its own parameters.
        lr: peak learning rate, before any parameter's own factor.
        schedule: from the step to the factor s_t.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        lr: float,
        schedule: Callable[[int], float],
        record: Sequence[Recorded] = (),
        record_every: int = 1,
        groups: Sequence[Mapping[str, Any]] | None = None,
    ):
        """Args:
        parts, lr, schedule: see above.
        record, record_every: as in `ScheduledSettings`.
        groups: what `state_dict` says of the groups; None: those of the parts.
        """
        self.parts = tuple(parts)
        self._groups = groups
        self.lr, self.schedule = lr, schedule
        self.record, self.record_every = tuple(record), record_every

    @torch.no_grad()
    def step(self, step: int) -> Mapping[str, float]:
        """Apply the update of step `step` (from 0); logs `lr` (before any rule's factor) and what is recorded."""
        factor = self.schedule(step)
        due = bool(self.record) and step % self.record_every == 0
        deltas: dict[str, Tensor] = {}
        for part in self.parts:
            deltas.update(part.update(factor, record=due and "update_rms" in self.record))
        logs = {"lr": factor * self.lr}
        if due and "update_rms" in self.record:
            logs |= self._all_and_each("update_rms", deltas)
        if due and "parameter_rms" in self.record:
            values = {m.name: root_mean_square(m.parameter) for part in self.parts for m in part.members()}
            logs |= self._all_and_each("parameter_rms", values)
        return logs

    def _all_and_each(self, what: str, each: Mapping[str, Tensor]) -> dict[str, float]:
        """`{what: over all elements, what/name: of each}`, with one transfer from the device."""
        if not each:
            return {}
        sizes = {m.name: m.parameter.numel() for part in self.parts for m in part.members()}
        values = dict(zip(each, torch.stack(list(each.values())).tolist(), strict=True))
        total = sum(sizes[name] for name in values)
        mean_square = sum(value**2 * sizes[name] for name, value in values.items()) / total
        return {what: mean_square**0.5, **{f"{what}/{name}": value for name, value in values.items()}}

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for part in self.parts:
            for member in part.members():
                member.parameter.grad = None

    def state_dict(self) -> State:
        """`{"parameters": {name: {"exp_avg": tensor, ...}}, "groups": [...]}`: the live tensors, not copies.

        The groups are for other tools (`Part.described_groups`); `load_state_dict` leaves the settings as they are.
        """
        return {
            "parameters": {m.name: dict(m.moments) for part in self.parts for m in part.members()},
            "groups": list(self._groups)
            if self._groups is not None
            else [group for part in self.parts for group in part.described_groups()],
        }

    def load_state_dict(self, state: State) -> None:
        """Copy saved moments into the live ones.

        Raises:
            ValueError: naming a parameter that is missing or unknown, or whose moments have another shape; nothing
                is changed then.
        """
        saved: Mapping[str, Mapping[str, Tensor]] = state["parameters"]
        live = {m.name: m.moments for part in self.parts for m in part.members()}
        unknown = sorted(set(saved) - set(live))
        if unknown:
            raise ValueError(
                f"the saved optimizer state holds {unknown[0]!r}, which this model does not train (nor "
                f"{len(unknown) - 1} others): was it saved by another model, or is the parameter now frozen?"
            )
        for name, moments in live.items():
            if name not in saved:
                raise ValueError(f"the saved optimizer state lacks parameter {name!r}, which this model trains")
            if set(saved[name]) != set(moments):
                raise ValueError(
                    f"the saved optimizer state of {name!r} holds "
                    f"{', '.join(sorted(saved[name])) or 'nothing'}, and this optimizer keeps "
                    f"{', '.join(sorted(moments)) or 'nothing'}: was it saved by another one?"
                )
            for key, tensor in moments.items():
                if saved[name][key].shape != tensor.shape:
                    raise ValueError(
                        f"the saved {key!r} of parameter {name!r} has shape {tuple(saved[name][key].shape)}; "
                        f"this model's is {tuple(tensor.shape)}"
                    )
        with torch.no_grad():
            for name, moments in live.items():
                for key, tensor in moments.items():
                    tensor.copy_(saved[name][key])
