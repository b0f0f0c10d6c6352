"""A run's optimizer where a part of its model lives in tiers of memory."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from resilin.config import UserError
from resilin.memory.expert_store import clear, clear_abandoned
from resilin.memory.expert_updates import outline_of
from resilin.memory.settings import ExpertTiers
from resilin.memory.tiered_experts import TieredExperts
from resilin.nouns import Optimizer, State
from resilin.optim.rows import rows_of
from resilin.optim.settings import OptimizerSettings
from resilin.transforms import OptimizerTransform

Values = Callable[[str, torch.Size], Tensor]


class TieredOptimizer(OptimizerTransform):
    """Updates what is in tiers beside the rest.

    A checkpoint is that of a run without tiers. Logs `experts/stall_s` (seconds of the step that computation waited for
    the disk), bytes of each tier, bytes read and written so far, the hit rate so far, and the share of experts that
    steps used; of this worker's experts.

    Args:
        inner: of everything else.
        tiers: of the experts.
    """

    def __init__(self, inner: Optimizer, tiers: TieredExperts) -> None:
        super().__init__(inner)
        self.tiers, self._stalled = tiers, 0.0

    def step(self, step: int) -> Mapping[str, float]:
        """Update all parameters."""
        logs = dict(self.inner.step(step))
        self.tiers.step(step)
        report = self.tiers.report()
        stalled, self._stalled = report.stall_s - self._stalled, report.stall_s
        logs |= {f"experts/{name}": float(value) for name, value in report.as_logs().items()}
        return logs | {"experts/stall_s": stalled}

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self.inner.zero_grad()
        self.tiers.drop_gradients()

    def state_dict(self) -> State:
        """As the optimizer of the whole model in memory would save it."""
        state = self.inner.state_dict()
        return {**state, "parameters": {**state["parameters"], **self.tiers.moments()}}

    def load_state_dict(self, state: State) -> None:
        """Take back what this, or the optimizer of the model in memory, gave.

        Raises:
            ValueError: naming what is missing, unknown or of another shape.
        """
        mine = set(self.tiers.names)
        rest = {name: moments for name, moments in state["parameters"].items() if name not in mine}
        self.tiers.check_moments(state["parameters"])
        self.inner.load_state_dict({**state, "parameters": rest})
        self.tiers.load_moments(state["parameters"])


def scratch_folder(settings: ExpertTiers, run_folder: Path | None, worker: int) -> Path:
    """A new folder for a worker's files, where settings or run say; what a process that is gone left is removed."""
    base = settings.folder or (run_folder / "experts" if run_folder is not None else None)
    name = f"worker-{worker:05d}-"
    if base is None:
        return Path(tempfile.mkdtemp(prefix=f"experts-{name}"))
    base.mkdir(parents=True, exist_ok=True)
    clear_abandoned(base.glob(f"{name}*"))
    return Path(tempfile.mkdtemp(prefix=name, dir=base))


def take_experts(
    settings: ExpertTiers,
    optimizer: OptimizerSettings,
    model: nn.Module,
    total_steps: int,
    *,
    run_folder: Path | None = None,
    worker: int = 0,
    outline: nn.Module | None = None,
    values: Values | None = None,
    device: torch.device | None = None,
) -> TieredExperts:
    """Take the experts out of a run's model, or of a worker's part of it; their files go when nobody needs them.

    Args:
        settings: of the tiers.
        optimizer: of the run.
        model: that computes.
        total_steps: of the run.
        run_folder: its folder.
        worker: whose experts these are.
        outline: as for `TieredExperts`, like what follows.
        values: of a model without memory.
        device: where it computes.

    Raises:
        UserError: what cannot live in tiers, and why.
    """
    listening = [type(m).__name__ for m in model.modules() if hasattr(m, "before_step") or hasattr(m, "after_step")]
    if listening:
        raise UserError(
            f"{listening[0]} changes between steps by looking at whole tensors, which memory.experts keeps elsewhere: "
            "leave [memory.experts] out"
        )
    folder = scratch_folder(settings, run_folder, worker)
    tiers = TieredExperts(
        model,
        folder,
        settings,
        optimizer,
        total_steps,
        outline=outline,
        values=values,
        device=device,
        scratch=True,
    )
    own = settings.folder is None and run_folder is not None
    weakref.finalize(tiers, _discard, folder, folder.parent if own else None)
    return tiers


def _discard(folder: Path, base: Path | None) -> None:
    clear(folder)
    if base is not None:
        with suppress(OSError):  # others are in it
            base.rmdir()


def tiered_optimizer(
    settings: ExpertTiers,
    optimizer: OptimizerSettings,
    model: nn.Module,
    total_steps: int,
    *,
    run_folder: Path | None = None,
    values: Values | None = None,
    device: torch.device | None = None,
) -> TieredOptimizer:
    """The optimizer of a model that one process computes, once its experts are in tiers.

    Args:
        settings: of the tiers.
        optimizer: of the run.
        model: its experts are taken, and it gets its other weights where `values` are given.
        total_steps: of the run.
        run_folder: its folder.
        values: of a model on the meta device: (name, shape) -> initial values.
        device: where it computes.

    Raises:
        UserError: what cannot live in tiers, and why.
    """
    outline = outline_of(model)
    tiers = take_experts(
        settings, optimizer, model, total_steps,
        run_folder=run_folder, outline=outline, values=values, device=device,
    )  # fmt: skip
    if values is not None:
        _fill_rest(model, values, device or torch.device("cpu"))
    here = {name: p for name, p in model.named_parameters() if p.requires_grad and rows_of(p) is None}
    return TieredOptimizer(optimizer.build_owned(outline, total_steps, here), tiers)


def _fill_rest(model: nn.Module, values: Values, device: torch.device) -> None:
    """Give a model on the meta device all weights but those that are lent to it."""
    made: dict[int, nn.Parameter] = {}
    names = {id(p): name for name, p in model.named_parameters()}
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if rows_of(parameter) is not None:
                continue
            if id(parameter) not in made:
                value = values(names[id(parameter)], parameter.shape).to(device)
                made[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
            setattr(module, name, made[id(parameter)])
