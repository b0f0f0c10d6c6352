"""An embedding table cut by columns over ranks that have different tokens (SE-MoE, Shen et al., 2022, section 4.4).

Cut by rows, as tensor parallelism does among ranks with the same tokens, a rank would not have what its tokens need.
Cut by columns, every rank looks up its columns for everybody's tokens: ids go to all, parts of rows come back, and no
gradient of the size of the table is ever summed. The states of the table are a P-th of it on each rank.
Shapes: V rows, H columns, P ranks, S tokens of this rank, A of all, h columns of this rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from resilin.layout import Shard
from resilin.parallel.errors import ParallelError
from resilin.parallel.exchange import gathered, swapped
from resilin.parallel.expert.exchange import device_of
from resilin.parallel.group import Group
from resilin.parallel.local_model import LocalModel

AXIS = "dp"


class ColumnEmbedding(nn.Module):
    """`nn.Embedding` over ranks with different tokens.

    Attributes:
        weight: (V, h), this rank's columns. Its gradient is already the sum over all ranks' tokens, added in the order
            of ranks and positions.

    Args:
        weight_VH: the whole table.
        group: the ranks; H is a multiple of their number.

    Raises:
        ParallelError: the columns cannot be divided evenly.
    """

    def __init__(self, weight_VH: Tensor, group: Group) -> None:
        super().__init__()
        if weight_VH.shape[1] % group.size:
            raise ParallelError(f"{weight_VH.shape[1]} columns cannot be divided evenly among {group.size} ranks")
        self.group = group
        part = weight_VH.detach().chunk(group.size, 1)[group.index]
        self.weight = nn.Parameter(part.clone(memory_format=torch.contiguous_format))

    def forward(self, ids: Tensor) -> Tensor:
        """(...) ids of this rank, any number of them -> (..., H); all ranks call together."""
        flat_S = ids.reshape(-1)
        if self.group.size == 1:
            return self.weight[ids]
        on = device_of(self.group, torch.empty(0, device=ids.device))
        sizes: list[int] = gathered(torch.tensor([len(flat_S)], device=on), 0, self.group).tolist()
        ids_A = swapped(flat_S.repeat(self.group.size), [len(flat_S)] * self.group.size, sizes, self.group)
        rows_SH: Tensor = _Columns.apply(self.weight, ids_A, sizes, self.group)
        return rows_SH.view(*ids.shape, self.group.size * self.weight.shape[1])


class _Columns(torch.autograd.Function):
    """Own columns for all tokens, sent to whom the tokens belong; backward, gradients to whom the columns belong."""

    @staticmethod
    def forward(ctx: Any, weight_Vh: Tensor, ids_A: Tensor, sizes: list[int], group: Group) -> Tensor:
        ctx.save_for_backward(ids_A)
        ctx.sizes, ctx.group, ctx.rows = sizes, group, len(weight_Vh)
        own, width = sizes[group.index], weight_Vh.shape[1]
        came = swapped(weight_Vh.index_select(0, ids_A), sizes, [own] * group.size, group)
        return came.view(group.size, own, width).transpose(0, 1).reshape(own, group.size * width)

    @staticmethod
    def backward(ctx: Any, grad_SH: Tensor) -> tuple[Tensor | None, ...]:
        (ids_A,) = ctx.saved_tensors
        own, ranks = ctx.sizes[ctx.group.index], ctx.group.size
        width = grad_SH.shape[1] // ranks
        sent = grad_SH.view(own, ranks, width).transpose(0, 1).reshape(ranks * own, width)
        grad_Ah = swapped(sent, [own] * ranks, ctx.sizes, ctx.group)
        total = grad_Ah.new_zeros(ctx.rows, width)
        if grad_Ah.is_cuda:  # sorts ids and adds equal ones in order, where index_add has atomics
            return total.index_put((ids_A,), grad_Ah, accumulate=True), None, None, None
        return total.index_add_(0, ids_A, grad_Ah), None, None, None


def partition_embedding(model: nn.Module | LocalModel, name: str, group: Group) -> LocalModel:
    """Replace an embedding by one cut by columns over ranks with different tokens, in place.

    Args:
        model: with the embedding, which nothing else uses (a tied head would need whole rows).
        name: of the module.
        group: the ranks.

    Returns:
        The same module, with the cut made over the axis "dp": the parameter's gradient is not summed over it again.

    Raises:
        ParallelError: the module is no embedding, or the columns cannot be divided.
    """
    local = model if isinstance(model, LocalModel) else LocalModel.of(model)
    if group.size == 1:
        return local
    path, _, last = name.rpartition(".")
    parent = local.module.get_submodule(path)
    table = getattr(parent, last, None)
    if not isinstance(table, nn.Embedding):
        raise ParallelError(f"{name} is a {type(table).__name__}, not an embedding")
    setattr(parent, last, ColumnEmbedding(table.weight, group))
    return local.extended(AXIS, group, {f"{name}.weight": (Shard(AXIS, 1),)})
