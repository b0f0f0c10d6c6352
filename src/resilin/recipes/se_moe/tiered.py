"""An optimizer that keeps a model's experts in tiers of memory, in a run like any other."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from resilin.config import SettingsError, component
from resilin.memory import TieredExperts, TierSettings
from resilin.memory.cache_policy import Kind
from resilin.memory.expert_state import ExpertShape, LazyAdamW
from resilin.models.decoder import Decoder
from resilin.nouns import Optimizer, State
from resilin.optim.adamw import AdamW
from resilin.optim.settings import OptimizerSettings


class Tiered(OptimizerSettings):
    """AdamW whose experts' part is lazy and lives in tiers; the rest is updated as ever.

    Every token of a step counts as one unit: sources that mask labels are not for it, nor is clipping, which would not
    see the experts.
    """

    optimizer: Annotated[AdamW, component("resilin.optim.adamw:AdamW")] = Field(
        default_factory=dict, validate_default=True
    )
    """Of all parameters; experts take its rate, schedule, betas and decay."""
    host_experts: int = Field(default=64, ge=1)
    """States that the cache in host memory holds."""
    policy: Kind = "lfu"
    """Who leaves it."""
    period: int = Field(default=500, ge=1)
    """Requests between decays of the cache's counts."""
    prefetch: bool = True
    """Whether the states of the next layer are read ahead."""
    megabytes_per_second: float | None = Field(default=None, gt=0)
    """Of the disk, which is slowed down to it; None: as it is."""
    folder: Path | None = None
    """Of the disk's files; None: a temporary one."""

    def build(self, model: nn.Module, total_steps: int) -> TieredOptimizer:
        """Take the experts out of a decoder."""
        decoder = next((module for module in model.modules() if isinstance(module, Decoder)), None)
        if decoder is None or decoder.settings.moe is None:
            raise SettingsError(f"Tiered needs a Decoder with experts, not a {type(model).__name__}: set model.moe")
        return TieredOptimizer(self, decoder, total_steps)


class TieredOptimizer:
    """See `Tiered`. Logs `tiers/stall_s` and `tiers/step_s` of each step, and `tiers/hit_rate` and others so far."""

    def __init__(self, settings: Tiered, decoder: Decoder, total_steps: int) -> None:
        self.settings, self.total_steps = settings, total_steps
        self._temporary = None if settings.folder else tempfile.TemporaryDirectory(prefix="experts-")
        folder = settings.folder or Path(self._temporary.name if self._temporary else ".")
        sizes = decoder.settings
        assert sizes.moe is not None
        record = ExpertShape(sizes.hidden_size, sizes.moe.expert_size, sizes.gated).record_bytes
        rate = settings.megabytes_per_second
        tiers = TierSettings(
            folder,
            host_bytes=settings.host_experts * record,
            policy=settings.policy,
            period=settings.period,
            prefetch=settings.prefetch,
            bytes_per_second=None if rate is None else rate * 1e6,
        )
        adamw = settings.optimizer
        rule = LazyAdamW(betas=adamw.betas, eps=adamw.eps, weight_decay=adamw.weight_decay)
        self.tiers = TieredExperts(decoder, tiers, rule)
        self.dense: Optimizer = adamw.build(decoder, total_steps)
        self._tokens, self._began, self._stalled = 0, time.perf_counter(), 0.0
        decoder.register_forward_pre_hook(self._count)

    def _count(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if not module.training or not torch.is_grad_enabled():
            return
        if not self._tokens:
            self._began = time.perf_counter()
        tokens: Tensor = arguments[0]
        self._tokens += tokens.numel()

    def step(self, step: int) -> Mapping[str, float]:
        """Update all parameters."""
        adamw = self.settings.optimizer
        logs = self.dense.step(step)
        rate = adamw.lr * adamw.schedule.factor(step, total=self.total_steps, peak=adamw.lr)
        self.tiers.step(rate, 1 / max(self._tokens, 1))
        report = self.tiers.report()
        stalled, self._stalled = report.stall_s - self._stalled, report.stall_s
        self._tokens = 0
        return {
            **logs,
            "tiers/stall_s": stalled,
            "tiers/step_s": time.perf_counter() - self._began,
            "tiers/hit_rate": report.hit_rate,
            "tiers/active": report.active,
            "tiers/host_bytes": float(report.host_bytes),
            "tiers/disk_bytes": float(report.disk_bytes),
            "tiers/read_bytes": float(report.read_bytes),
        }

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self.dense.zero_grad()

    def state_dict(self) -> State:
        """The dense part's; experts are brought to disk, where another process finds them if the folder is kept."""
        self.tiers.write_back()
        return {"dense": self.dense.state_dict(), "experts_at": self.tiers.steps}

    def load_state_dict(self, state: State) -> None:
        """Take the dense part back.

        Raises:
            ValueError: the folder of the experts holds another step's.
        """
        if int(state["experts_at"]) != self.tiers.steps:
            raise ValueError(
                f"the experts' folder holds step {self.tiers.steps}, and the checkpoint is of {state['experts_at']}: "
                "name the folder of that run in optimizer.folder"
            )
        self.dense.load_state_dict(state["dense"])
