"""Muon for hidden matrices, AdamW for everything else.

Sources: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024; Liu et al., "Muon is scalable
for LLM training", 2025 (weight decay, and the scale that matches AdamW's update).

Own code rather than `torch.optim.Muon`, which takes only single matrices (no stacks of experts), one after the other,
and always computes in bfloat16: hundreds of times slower on CPUs without bfloat16 units.

Shapes: K matrices of one shape, M rows (fan-out), N columns (fan-in).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from resilin.models.chain_modules import ChainHead
from resilin.optim.adamw import AdamWPart, Beta
from resilin.optim.groups import Group, embedding_names, is_vector
from resilin.optim.newton_schulz import orthogonalise
from resilin.optim.part import Member, Moments, Part, root_mean_square, with_gradient
from resilin.optim.scheduled import Owned, ScheduledSettings

Scale = Literal["match_adamw", "spectral"]

_BATCH_ELEMENTS = 2**24  # orthogonalised at once: bounds the temporaries to a few times 64 MB


def update_scale(scale: Scale, rows: int, columns: int) -> float:
    """What an orthogonal M x N update is multiplied by.

    match_adamw: 0.2 * sqrt(max(M, N)), so that its root mean square is AdamW's typical 0.2 and AdamW's learning rate
    and decay can be kept (Liu et al.); spectral: sqrt(max(1, M / N)), the original.
    """
    return 0.2 * math.sqrt(max(rows, columns)) if scale == "match_adamw" else math.sqrt(max(1.0, rows / columns))


class MuonPart(Part):
    """theta <- theta - s_t * (lr * Delta + decay * theta), Delta the orthogonalised momentum, scaled by its shape."""

    def __init__(
        self,
        groups: Sequence[Group],
        lr: float,
        *,
        independent: bool,
        momentum: float,
        nesterov: bool,
        steps: int,
        scale: Scale,
        dtype: torch.dtype | None,
    ):
        """Args:
        groups: of matrices (M, N) and stacks of matrices (K, M, N).
        lr: peak learning rate.
        independent: whether decay is independent of it.
        momentum: of the moving average of gradients.
        nesterov: whether the gradient is averaged in once more.
        steps: Newton-Schulz iterations.
        scale: of the update, by shape.
        dtype: of the iterations; None: bfloat16 on GPUs, float32 elsewhere.
        """
        super().__init__(groups, lr, independent=independent)
        self.momentum, self.nesterov = momentum, nesterov
        self.steps, self.scale, self.dtype = steps, scale, dtype

    def new_moments(self, parameter: nn.Parameter) -> Moments:
        """A zero momentum."""
        return {"momentum": torch.zeros_like(parameter, requires_grad=False)}

    def hyper_parameters(self) -> dict[str, Any]:
        """Those of torch's Muon, as far as it has them."""
        return {"momentum": self.momentum, "nesterov": self.nesterov, "ns_steps": self.steps}

    def update(self, factor: float, *, record: bool) -> Mapping[str, Tensor]:
        """Momentum by foreach kernels, then matrices of one shape orthogonalised together."""
        deltas: dict[str, Tensor] = {}
        for pace, group in self.groups:
            members, grads = with_gradient(group)
            if not members:
                continue
            parameters: list[Tensor] = [m.parameter for m in members]
            buffers = [m.moments["momentum"] for m in members]
            torch._foreach_lerp_(buffers, grads, 1 - self.momentum)
            moves = list(torch._foreach_lerp(grads, buffers, self.momentum)) if self.nesterov else buffers
            if pace.decay:
                torch._foreach_mul_(parameters, 1 - factor * pace.decay)
            for batch in _batches(members, moves):
                for (member, _), delta in zip(batch, self._deltas([move for _, move in batch]), strict=True):
                    member.parameter.add_(delta, alpha=-factor * pace.lr)
                    if record:
                        deltas[member.name] = root_mean_square(delta)
        return deltas

    def _deltas(self, moves: Sequence[Tensor]) -> Iterator[Tensor]:
        """The scaled orthogonal updates of matrices, or stacks of them, that share rows and columns."""
        rows, columns = moves[0].shape[-2:]
        stacked_KMN = torch.cat([move.reshape(-1, rows, columns) for move in moves])
        dtype = self.dtype or (torch.bfloat16 if stacked_KMN.is_cuda else torch.float32)
        updates_KMN = orthogonalise(stacked_KMN, self.steps, dtype).mul_(update_scale(self.scale, rows, columns))
        sizes = [move.numel() // (rows * columns) for move in moves]
        for move, update in zip(moves, updates_KMN.split(sizes), strict=True):
            yield update.reshape(move.shape)


def _batches(members: Sequence[Member], moves: Sequence[Tensor]) -> Iterator[list[tuple[Member, Tensor]]]:
    """Members by matrix shape, in pieces of bounded size."""
    by_shape: dict[tuple[int, ...], list[tuple[Member, Tensor]]] = {}
    for member, move in zip(members, moves, strict=True):
        by_shape.setdefault(tuple(move.shape[-2:]), []).append((member, move))
    for pairs in by_shape.values():
        batch: list[tuple[Member, Tensor]] = []
        for pair in pairs:
            if batch and sum(move.numel() for _, move in batch) + pair[1].numel() > _BATCH_ELEMENTS:
                yield batch
                batch = []
            batch.append(pair)
        yield batch


class Muon(ScheduledSettings):
    """Muon for hidden matrices (and stacks of expert matrices); AdamW for embeddings, head, norms and biases."""

    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Decay of Muon's moving average of gradients."""
    nesterov: bool = True
    """Average the gradient in once more before orthogonalising."""
    newton_schulz_steps: int = Field(default=5, ge=1, le=50)
    """Iterations of the orthogonalisation."""
    newton_schulz_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Format of its products; auto: bfloat16 on GPUs, float32 elsewhere."""
    scale: Scale = "match_adamw"
    """match_adamw: updates as large as AdamW's, so lr and decay carry over; spectral: the original, lr near 0.02."""
    adamw: tuple[str, ...] = ()
    """Patterns of further parameter names that AdamW takes: `*.router.weight`."""
    adamw_lr: float | None = Field(default=None, gt=0)
    """AdamW's peak learning rate; left out: lr."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """AdamW's moving averages."""
    eps: float = Field(default=1e-8, ge=0)
    """AdamW's eps."""

    def takes(self, model: nn.Module) -> frozenset[str]:
        """Names of the parameters that Muon moves: matrices that are neither embedding nor head.

        Raises:
            ValueError: naming a pattern of `adamw` that matches no parameter.
        """
        names = [name for name, _ in model.named_parameters()]
        for pattern in self.adamw:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(f"optimizer.adamw: {pattern!r} matches no parameter; names look like {names[:4]}")
        embeddings, head = embedding_names(model), getattr(model, "head_weight", None)
        chains = {id(p) for module in model.modules() if isinstance(module, ChainHead) for p in module.parameters()}
        return frozenset(
            name
            for name, p in model.named_parameters()
            if p.ndim in (2, 3)
            and not (p.ndim == 3 and p.shape[1] == 1)  # a convolution of each channel by itself is no matrix
            and not is_vector(name, p)
            and p is not head
            and id(p) not in chains
            and name not in embeddings
            and not any(fnmatchcase(name, pattern) for pattern in self.adamw)
        )

    def keeps_whole(self, model: nn.Module) -> set[str]:
        """The matrices that are orthogonalised."""
        return set(self.takes(model))

    def parts(self, model: nn.Module, owned: Owned | None = None) -> list[Part]:
        """Two parts."""
        taken, groups = self.takes(model), self.groups(model, owned)
        hidden = [_only(group, lambda name: name in taken) for group in groups]
        others = [_only(group, lambda name: name not in taken) for group in groups]
        independent = self.decay == "independent"
        dtypes = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
        return [
            MuonPart(
                [group for group in hidden if group.parameters],
                self.lr,
                independent=independent,
                momentum=self.momentum,
                nesterov=self.nesterov,
                steps=self.newton_schulz_steps,
                scale=self.scale,
                dtype=dtypes[self.newton_schulz_dtype],
            ),
            AdamWPart(
                [group for group in others if group.parameters],
                self.adamw_lr or self.lr,
                independent=independent,
                betas=self.betas,
                eps=self.eps,
            ),
        ]


def _only(group: Group, wanted: Callable[[str], bool]) -> Group:
    return replace(group, parameters=tuple((name, p) for name, p in group.parameters if wanted(name)))
