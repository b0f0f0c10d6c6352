"""An Optimizer noun over torch optimizers: schedule in, state by parameter name out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from resilin.nouns import State


class Scheduled:
    """Torch optimizers that share a schedule, seen as one `resilin.nouns.Optimizer`.

    Each group of each part carries `peak_lr`; at step t its `lr` is `schedule(t) * peak_lr`. The parts must have
    created their per-parameter state already, so that a checkpoint is complete at any step.

    Attributes:
        parts: the torch optimizers, in order.
        names: the name of every parameter they update.
    """

    def __init__(
        self,
        parts: Sequence[torch.optim.Optimizer],
        names: Mapping[nn.Parameter, str],
        lr: float,
        schedule: Callable[[int], float],
    ):
        self.parts = tuple(parts)
        self.names = dict(names)
        self.lr = lr
        self.schedule = schedule

    def step(self, step: int) -> Mapping[str, float]:
        """Apply the update of step `step` (from 0); logs `lr`, the unscaled learning rate."""
        factor = self.schedule(step)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = factor * group["peak_lr"]
            part.step()
        return {"lr": factor * self.lr}

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def _states(self) -> Iterable[tuple[str, nn.Parameter, dict[str, Tensor]]]:
        for part in self.parts:
            for group in part.param_groups:
                for parameter in group["params"]:
                    yield self.names[parameter], parameter, part.state[parameter]

    def state_dict(self) -> State:
        """`{"parameters": {name: {"exp_avg": tensor, ...}}}`: the live tensors, not copies."""
        return {"parameters": {name: dict(state) for name, _, state in self._states()}}

    def load_state_dict(self, state: State) -> None:
        """Copy saved moments into the live ones.

        Raises:
            ValueError: naming a parameter that is missing or unknown, or whose moments have another shape.
        """
        saved = state["parameters"]
        live = list(self._states())
        unknown = sorted(set(saved) - {name for name, _, _ in live})
        if unknown:
            raise ValueError(
                f"the saved optimizer state holds {unknown[0]!r}, which this model does not train "
                f"({len(unknown)} such parameters): was it saved by another model, or is the parameter now frozen?"
            )
        for name, _, moments in live:
            if name not in saved:
                raise ValueError(f"the saved optimizer state lacks parameter {name!r}, which this model trains")
            for key, tensor in moments.items():
                if key not in saved[name]:
                    raise ValueError(
                        f"the saved optimizer state of {name!r} lacks {key!r} (it holds "
                        f"{', '.join(sorted(saved[name])) or 'nothing'}): was it saved by another optimizer?"
                    )
                found = saved[name][key]
                if found.shape != tensor.shape:
                    raise ValueError(
                        f"the saved {key!r} of parameter {name!r} has shape {tuple(found.shape)}; "
                        f"this model's is {tuple(tensor.shape)}"
                    )
        with torch.no_grad():
            for name, _, moments in live:
                for key, tensor in moments.items():
                    tensor.copy_(saved[name][key])
