"""Batch norm over parts of a batch, so that its statistics come from as many samples whatever the batch.

Wu et al., CVPR 2020, section 3.3. Legend: N samples, C channels, k splits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from resilin.multigrid.pooled import pool_of, pool_size, pooled_moments, processes
from resilin.nouns import StepView, keeps_weights


class SubBatchNorm(nn.Module):
    """Batch norm whose batch is cut into k splits, each normalised by itself; scale and shift are shared.

    Sample n belongs to split n mod k. Each split keeps moving averages of its own; evaluation uses their merger,

        mean = avg_i mean_i,    var = avg_i var_i + avg_i (mean_i - mean)^2.

    With k = 1 it is `torch.nn.BatchNorm`, to the bit and with the same state. A batch that k does not divide is cut
    into gcd(N, k) splits. `before_step` sets k from the source's grid schedule; parameters and the optimizer's state
    are never replaced.

    Where training is distributed (`torch.distributed`), the batch is what this process has of it: one that is smaller
    than `base` is pooled with those of `pool` neighbouring processes, as many as make up `base`.

    Attributes:
        splits: k.
        group: samples that a split is meant to have, base batch times short cycle; 0 where nobody said. A forward pass
            over part of a step's batch uses as many splits of this size as fit.
        pool: processes that statistics come from; above 1, k is 1.
        weight: (C,) scale.
        bias: (C,) shift.
        running_mean: (C,), or (k, C) with more than one split.
        running_var: the same.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, features: int, eps: float = 1e-5, momentum: float | None = 0.1, base: int = 0) -> None:
        """Args:
        features: C.
        eps: added to variances.
        momentum: of the moving averages; None: their plain mean.
        base: samples that statistics should come from (8 in the paper); 0: k is left as it is.
        """
        super().__init__()
        self.features, self.eps, self.momentum, self.base = features, eps, momentum, base
        self.splits, self.group, self.pool = 1, 0, 1
        self.weight, self.bias = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.int64))

    def extra_repr(self) -> str:
        """For people."""
        return f"{self.features}, splits={self.splits}, base={self.base}"

    @torch.no_grad()
    def merged(self) -> tuple[Tensor, Tensor]:
        """Mean and variance (C,) over all splits."""
        if self.splits == 1:
            return self.running_mean, self.running_var
        mean = self.running_mean.mean(0)
        return mean, self.running_var.mean(0) + (self.running_mean - mean).square().mean(0)

    @torch.no_grad()
    def set_splits(self, splits: int) -> None:
        """Change k: the merged statistics go to every new split. Nothing happens where k is the same.

        Raises:
            ValueError: for less than 1.
        """
        if splits < 1:
            raise ValueError(f"a batch is cut into at least 1 split, not {splits}")
        if splits == self.splits:
            return
        mean, variance = self.merged()
        self.splits = splits
        shape = (self.features,) if splits == 1 else (splits, self.features)
        self.running_mean, self.running_var = mean.expand(shape).clone(), variance.expand(shape).clone()

    @keeps_weights
    def before_step(self, view: StepView) -> None:
        """Set k to what the step's shape asks for: int(long-cycle batch / base), at least 1; and `pool` likewise."""
        schedule = getattr(view.source, "grid_schedule", None)
        if schedule is None or not self.base:
            return
        segment, phase = schedule.segment(view.step), schedule.phase(view.step)
        _, world = processes()
        batch = segment.base.multiplier * view.source.batch_size // world  # type: ignore[attr-defined]
        splits = max(1, batch // self.base)
        self.set_splits(splits)
        self.group = phase.multiplier * view.source.batch_size // world // splits  # type: ignore[attr-defined]
        self.pool = pool_size(self.base // max(1, batch), world)

    def splits_of(self, count: int) -> int:
        """Splits of a forward pass over `count` samples."""
        wanted = self.splits
        if self.group:
            wanted = max(1, min(wanted, count // self.group))
            wanted = math.gcd(wanted, self.splits) if self.splits % wanted else wanted
        return math.gcd(count, wanted)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...) -> (N, C, ...)."""
        if not self.training:
            mean, variance = self.merged()
            return F.batch_norm(x, mean, variance, self.weight, self.bias, False, 0.0, self.eps)
        self.num_batches_tracked.add_(1)
        factor = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        pool = pool_of(self.pool)
        if pool is not None:
            return self._pooled(x, factor, pool)
        k = self.splits_of(len(x))
        if k == 1 and self.splits == 1:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, True, factor, self.eps
            )  # fmt: skip
        C = self.features
        # channels-last memory cannot be seen as (N/k, kC, ...): it is copied.
        cut = x.contiguous().view(len(x) // k, k * C, *x.shape[2:])
        mean, variance = self._first_splits(k)
        weight, bias = self.weight.repeat(k), self.bias.repeat(k)
        done = F.batch_norm(cut, mean, variance, weight, bias, True, factor, self.eps)
        self._keep(mean, variance, k)
        return done.view(x.shape)

    def _pooled(self, x: Tensor, factor: float, pool: dist.ProcessGroup) -> Tensor:
        """One split, of the batches of several processes."""
        mean, variance, count = pooled_moments(x, pool)
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
            self.running_var.lerp_((variance * (count / max(1.0, count - 1))).to(self.running_var.dtype), factor)
        wide = (1, -1, *[1] * (x.ndim - 2))
        scale = (variance + self.eps).rsqrt() * self.weight
        return ((x - mean.view(wide)) * scale.view(wide) + self.bias.view(wide)).to(x.dtype)

    @torch.no_grad()
    def _first_splits(self, k: int) -> tuple[Tensor, Tensor]:
        """Running statistics for k splits to update, flat (kC,)."""
        mean, variance = self.running_mean.view(self.splits, -1), self.running_var.view(self.splits, -1)
        if k == self.splits:
            return mean.view(-1), variance.view(-1)
        zeros = torch.zeros(k * self.features, dtype=mean.dtype, device=mean.device)
        return zeros, zeros.clone()

    @torch.no_grad()
    def _keep(self, mean: Tensor, variance: Tensor, k: int) -> None:
        """With fewer splits than k in this pass (a tail), every running split takes part of one that there was."""
        if k == self.splits:
            return  # updated in place
        factor = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        for running, new in ((self.running_mean, mean), (self.running_var, variance)):
            seen = new.view(k, -1).repeat(self.splits // k, 1)  # `new` is factor * what was seen
            running.view(self.splits, -1).mul_(1 - factor).add_(seen)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Take statistics of any k, as the checkpoint has them."""
        saved = state_dict.get(f"{prefix}running_mean")
        if isinstance(saved, Tensor) and saved.shape[-1] == self.features:
            self.set_splits(saved.shape[0] if saved.ndim == 2 else 1)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def plain(self, dims: int = 3) -> nn.Module:
        """An ordinary batch norm over `dims` axes that evaluates alike."""
        kinds = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
        norm = kinds[dims](self.features, self.eps, self.momentum).to(self.weight.device)
        mean, variance = self.merged()
        with torch.no_grad():
            norm.weight.copy_(self.weight)
            norm.bias.copy_(self.bias)
        norm.running_mean, norm.running_var = mean.clone(), variance.clone()
        norm.num_batches_tracked = self.num_batches_tracked.clone()
        return norm.train(self.training)
