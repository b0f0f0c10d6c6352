"""Putting the important neurons and heads of a trained model first, so that its leading parts are its best ones.

The whole model computes the same afterwards: neurons of a feed-forward, key heads with their query heads, and query
heads within their group may stand in any order.

How important a neuron is: with data, the mean of |its activation| times the norm of its column of `down`, which is what
it adds to the stream; without, the product of the norms of its weights. Of a head the same, over its values and columns
of `o`. Heads of a Mamba-2 layer stay in their group, whose B and C they share, and the order of channels is the same in
all heads. Nemotron Elastic's own scores are in `resilin.nested.ranking`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from resilin.config import UserError
from resilin.inference.scoring import evaluating
from resilin.models.attention import Attention
from resilin.models.decoder import Decoder
from resilin.models.linear import Linear
from resilin.models.mamba import Depthwise, Mamba2
from resilin.models.mlp import MLP
from resilin.models.moe import Experts, MoE
from resilin.nested.in_place import full
from resilin.nouns import Batch


class ImportanceError(UserError):
    """A model whose parts cannot be put in order; the text says which."""


class _MeanInput:
    """The mean of |x| of a linear map's input, by column, over all tokens that pass."""

    def __init__(self, linear: Linear) -> None:
        self.sum = torch.zeros(linear.in_features, dtype=torch.float64, device=linear.weight.device)
        self.rows = 0
        self.handle = linear.register_forward_pre_hook(self._see)

    def _see(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        x_NI = args[0].reshape(-1, args[0].shape[-1])
        self.sum += x_NI.abs().double().sum(0)
        self.rows += len(x_NI)

    @property
    def mean(self) -> Tensor:
        found: Tensor = self.sum / max(self.rows, 1)
        return found


def _plain(map_: nn.Module, name: str) -> Linear:
    if type(map_) is not Linear:
        raise ImportanceError(f"{name} is a {type(map_).__name__}: make the model plain before it is put in order")
    return map_


def _rows(matrix: Tensor) -> Tensor:
    found: Tensor = torch.linalg.vector_norm(matrix.double(), dim=-1)
    return found


def _neurons_by_weight(mlp: MLP) -> Tensor:
    score = _rows(_plain(mlp.up, "mlp.up").weight) * _rows(_plain(mlp.down, "mlp.down").weight.t())
    return score if mlp.gate is None else score * _rows(_plain(mlp.gate, "mlp.gate").weight)


def parts_of(model: Decoder) -> Iterator[tuple[str, Attention | MLP | MoE | Mamba2]]:
    """The parts of all blocks, by name, whose insides may stand in any order."""
    for layer, block in enumerate(model.blocks):
        for kind in ("attention", "mamba", "mlp", "moe"):
            part = getattr(block, kind, None)
            if part is not None:
                yield f"blocks.{layer}.{kind}", part


def _back(name: str, part: Attention | MLP | Mamba2) -> tuple[nn.Module, str]:
    """A part's map back to the stream, and its name."""
    found, last = (
        (part.o, "o")
        if isinstance(part, Attention)
        else (part.down, "down")
        if isinstance(part, MLP)
        else (part.out, "out")
    )
    return found, f"{name}.{last}"


@torch.no_grad()
def importance(model: Decoder, batches: Iterable[Batch] | None = None) -> dict[str, Tensor]:
    """Scores of neurons (`blocks.0.mlp`, (F,)) and of columns of heads (`blocks.0.attention`, `blocks.0.mamba`,
    (H * head size,)).

    Args:
        model: whole and plain.
        batches: of tokens that the scores are measured on; None: by the weights alone. Experts always go by theirs.

    Raises:
        ImportanceError: a part is no plain linear map, or the model has chains.
    """
    if model.settings.chains is not None:
        raise ImportanceError(
            "a decoder of chains is nested as it is, and its heads and neurons keep their chain: nothing is to be put "
            "in order"
        )
    seen: dict[str, tuple[_MeanInput, Linear]] = {}
    scores: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for name, part in parts_of(model):
            if isinstance(part, MoE):
                scores[f"{name}.experts"] = _experts_by_weight(part.experts)
                continue
            linear = _plain(*_back(name, part))
            scores[name] = _neurons_by_weight(part) if isinstance(part, MLP) else _rows(linear.weight.t())
            if batches is not None:
                seen[name] = (_MeanInput(linear), linear)
                hooks.callback(seen[name][0].handle.remove)
        if batches is not None:
            device = model.embed.weight.device
            with evaluating(model), full(model):
                for batch in batches:
                    batch = batch.to(device)
                    model(batch["tokens"], batch.get("positions"), batch.get("documents"))
    if not any(found.rows for found, _ in seen.values()) and batches is not None:
        raise ImportanceError("no batch was given to measure on: give some text, or go by the weights alone")
    for name, (found, linear) in seen.items():
        scores[name] = found.mean * _rows(linear.weight.t())
    return scores


def _experts_by_weight(experts: Experts) -> Tensor:
    """(E, F)."""
    score = _rows(experts.up) * _rows(experts.down.transpose(1, 2))
    return score if experts.gate is None else score * _rows(experts.gate)


def _sorted(scores: Tensor) -> Tensor:
    """Places by falling score; equal ones keep their order."""
    return scores.argsort(dim=-1, descending=True, stable=True)


@torch.no_grad()
def put_in_order(model: Decoder, scores: dict[str, Tensor], *, heads: bool = True) -> None:
    """Sort neurons, and heads, by falling importance, in place; the whole model computes the same (but for rounding).

    Args:
        model: whole and plain.
        scores: as `importance` gives them.
        heads: whether heads too: query heads within their group, and groups by the sum of theirs; of Mamba-2 layers
            heads within their group, and channels.
    """
    for name, part in parts_of(model):
        if isinstance(part, MoE):
            _order_experts(part, scores[f"{name}.experts"])
        elif isinstance(part, MLP):
            _order_mlp(part, _sorted(scores[name]))
        elif heads and isinstance(part, Attention):
            _order_heads(part, scores[name])
        elif heads and isinstance(part, Mamba2):
            _order_mamba(part, scores[name])


def _permute(linear: Linear | Depthwise, order: Tensor, dim: int) -> None:
    linear.weight.copy_(linear.weight.index_select(dim, order))
    if dim == 0 and linear.bias is not None:
        linear.bias.copy_(linear.bias[order])


def _order_mlp(mlp: MLP, order_F: Tensor) -> None:
    for name, dim in (("gate", 0), ("up", 0), ("down", 1)):
        linear = getattr(mlp, name)
        if linear is not None:
            _permute(_plain(linear, f"mlp.{name}"), order_F, dim)


def _order_experts(moe: MoE, scores_EF: Tensor) -> None:
    order_EF = _sorted(scores_EF)
    for stack, dim in ((moe.experts.gate, 1), (moe.experts.up, 1), (moe.experts.down, 2)):
        if stack is not None:
            place = order_EF[:, :, None] if dim == 1 else order_EF[:, None, :]
            stack.copy_(stack.gather(dim, place.expand_as(stack)))


def _order_mamba(mamba: Mamba2, scores: Tensor) -> None:
    """Channels by the size of their scores over all heads; heads, within their group, over the better half of those.

    (Nemotron Elastic, section 3.1.)
    """
    scores_HP = scores.view(mamba.heads, -1)
    channels_P = _sorted(torch.linalg.vector_norm(scores_HP, dim=0))
    best = channels_P[: -(-len(channels_P) // 2)]
    of_head_GR = torch.linalg.vector_norm(scores_HP[:, best], dim=1).view(mamba.groups, -1)
    first_G1 = torch.arange(mamba.groups, device=scores.device)[:, None] * of_head_GR.shape[1]
    heads_H = (first_G1 + _sorted(of_head_GR)).flatten()
    rows = (heads_H[:, None] * len(channels_P) + channels_P).flatten()
    for linear, order, dim in ((mamba.z, rows, 0), (mamba.x, rows, 0), (mamba.dt, heads_H, 0), (mamba.out, rows, 1)):
        _permute(_plain(linear, "mamba"), order, dim)
    _permute(mamba.conv_x, rows, 0)
    for vector, order in (
        (mamba.A_log, heads_H),
        (mamba.D, heads_H),
        (mamba.dt_bias, heads_H),
        (mamba.norm.weight, rows),
    ):
        vector.copy_(vector[order])


def _order_heads(attention: Attention, scores: Tensor) -> None:
    keys, width = attention.key_heads, attention.head_size
    group = attention.heads // keys
    of_head_KG = scores.view(keys, group, width).sum(-1)
    inside_KG = _sorted(of_head_KG)
    groups_K = _sorted(of_head_KG.sum(-1))
    heads_H = (torch.arange(keys, device=scores.device)[:, None] * group + inside_KG)[groups_K].flatten()
    columns = torch.arange(width, device=scores.device)
    queries = (heads_H[:, None] * width + columns).flatten()
    values = (groups_K[:, None] * width + columns).flatten()
    for linear, order, dim in (
        (attention.q, queries, 0),
        (attention.k, values, 0),
        (attention.v, values, 0),
        (attention.o, queries, 1),
    ):
        _permute(_plain(linear, "attention"), order, dim)
    if attention.norm_over_width:
        for norm, order in ((attention.q_norm, queries), (attention.k_norm, values)):
            weight = getattr(norm, "weight", None)
            if weight is not None:
                weight.copy_(weight[order])
