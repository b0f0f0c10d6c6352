"""A linear map of which a mask keeps some weights; its parameters keep the names they had.

Shapes: ... any leading dimensions, D outputs, C inputs, G groups of the correction.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resilin.keys import Keys
from resilin.models.linear import Linear
from resilin.sparsity.low_rank import LowRankBoost, initial_correction, pooled, pooling_matrix, xavier
from resilin.sparsity.patterns import n_of_m_mask, share_of_row_mask
from resilin.sparsity.straight_through import masked

Metric = Literal["magnitude", "wanda"]


class SparseLinear(nn.Linear):
    """y = (m * W) x + b, and S (X x) beside it where there is a boost. W stays dense and all of it gets gradients.

    Made of a linear layer whose parameters it shares. Buffers: `mask` (D, C) bool; `first_mask`, where the mask moves;
    `square_sum` (C,) and `square_count`, for Wanda.

    Attributes:
        n, m: kept and size of a group.
        density: the share kept of each row, in place of n:m; None: n:m.
        metric: what the mask goes by: |W|, or |W| times the norm of its input (Wanda, Sun et al., 2023).
    """

    mask: Tensor
    first_mask: Tensor
    square_sum: Tensor
    square_count: Tensor

    def __init__(
        self,
        linear: nn.Linear,
        *,
        n: int = 2,
        m: int = 4,
        density: float | None = None,
        metric: Metric = "magnitude",
        moves: bool = True,
        boost: LowRankBoost | None = None,
        keys: Keys | None = None,
    ) -> None:
        """Args:
        linear: whose weight and bias become this module's own.
        n: kept of a group.
        m: size of a group.
        density: share kept of each row instead.
        metric: of the mask.
        moves: whether the mask will be updated, so that the first one is worth keeping.
        boost: adds S, and X where it is trained.
        keys: for what is drawn.
        """
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.n, self.m, self.density, self.metric = n, m, density, metric
        self.boost = boost
        self.training = linear.training
        device = self.weight.device
        if metric == "wanda":
            self.register_buffer("square_sum", torch.zeros(self.in_features, dtype=torch.float64, device=device))
            self.register_buffer("square_count", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("mask", self.wanted_mask())
        if moves:
            self.register_buffer("first_mask", self.mask.clone())
        if boost is not None:
            self._add_boost(boost, keys or Keys.of_step(0, 0))

    @torch.no_grad()
    def _add_boost(self, boost: LowRankBoost, keys: Keys) -> None:
        dtype, device = self.weight.dtype, self.weight.device
        self.correction = nn.Parameter(initial_correction(self.weight.detach(), self.mask, boost))
        if boost.train_pooling:
            drawn = boost.init == "xavier"
            start = xavier(self.in_features, boost.k, keys) if drawn else pooling_matrix(self.in_features, boost.k)
            self.pooling = nn.Parameter(start.to(device, dtype))

    @torch.no_grad()
    def wanted_mask(self) -> Tensor:
        """The mask that the weights (and inputs seen) ask for now."""
        scores_DC = self.weight.detach().abs()
        if self.metric == "wanda" and int(self.square_count):
            scores_DC = scores_DC * (self.square_sum / self.square_count).sqrt().to(scores_DC.dtype)
        if self.density is not None:
            return share_of_row_mask(scores_DC, self.density)
        return n_of_m_mask(scores_DC, self.n, self.m)

    @torch.no_grad()
    def start_from(self, mask_DC: Tensor) -> None:
        """Make this the one-shot mask, before the first step; the correction starts from it too."""
        self.mask.copy_(mask_DC)
        if hasattr(self, "first_mask"):
            self.first_mask.copy_(mask_DC)
        if self.boost is not None:
            self.correction.copy_(initial_correction(self.weight.detach(), self.mask, self.boost))

    def forget_inputs(self) -> None:
        """Count inputs anew."""
        if self.metric == "wanda":
            self.square_sum.zero_()
            self.square_count.zero_()

    @torch.no_grad()
    def _see(self, x: Tensor) -> None:
        rows = x.detach().reshape(-1, self.in_features)
        # A mean: a forward pass that is computed twice (recomputed blocks) counts twice above and below.
        self.square_sum += rows.double().square().sum(0)
        self.square_count += len(rows)

    def effective_weight(self) -> Tensor:
        """W~ (D, C): the masked weight, without the correction; differentiable straight through."""
        return masked(self.weight, self.mask)

    def whole_weight(self) -> Tensor:
        """The matrix (D, C) that the layer multiplies by, correction and all; for what goes on top of it."""
        weight, matrices = self.effective_weight(), self.correction_matrices()
        return weight if matrices is None else weight + matrices[0] @ matrices[1]

    def correction_matrices(self) -> tuple[Tensor, Tensor] | None:
        """(S, X) of the correction, X as a matrix also where it is a sum; None without one."""
        if self.boost is None:
            return None
        if self.boost.train_pooling:
            return self.correction, self.pooling
        return self.correction, pooling_matrix(self.in_features, self.boost.k).to(self.correction)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., D)."""
        if self.metric == "wanda" and self.training:
            self._see(x)
        y = F.linear(x, self.effective_weight(), self.bias)
        if self.boost is None:
            return y
        groups = F.linear(x, self.pooling) if self.boost.train_pooling else pooled(x, self.boost.k)
        return y + F.linear(groups, self.correction)

    @torch.no_grad()
    def plain_form(self) -> nn.Module:
        """An ordinary layer that computes the same: exact zeros where the mask is False; a correction is added in."""
        return self._plain(self.whole_weight().detach())

    def sparse_form(self) -> nn.Module:
        """An ordinary layer of the masked weight alone, without the correction."""
        return self._plain(self.effective_weight().detach())

    def original_form(self) -> nn.Module:
        """An ordinary layer of the dense weight."""
        return self._plain(self.weight.detach())

    def _plain(self, weight_DC: Tensor) -> nn.Module:
        linear = Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight_DC)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach())
        return linear.train(self.training)

    def extra_repr(self) -> str:
        """Sizes and pattern."""
        kept = f"{self.n}:{self.m}" if self.density is None else f"{self.density:.0%} of each row"
        return f"{super().extra_repr()}, keeps {kept} by {self.metric}"
