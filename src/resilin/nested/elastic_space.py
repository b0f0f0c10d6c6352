"""The sizes that Nemotron Elastic chooses among: some for each axis, as budgets.

The axes are the stream (`hidden`), neurons (`ffn`), attention heads (`heads`), heads and channels of Mamba-2 layers
(`mamba`), and how many layers are kept (`depth`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from resilin.config import Settings
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.hybrid_settings import HybridSettings
from resilin.nested.budgets import Budget, BudgetError
from resilin.nested.granularities import ffn_size

Share = Annotated[float, Field(gt=0, le=1)]
AxisName = Literal["hidden", "ffn", "heads", "mamba", "depth"]
Chosen = Mapping[str, Sequence[int]]
"""By axis, the number of the choice: one for all layers, or one for each that has the axis."""


class ElasticSpace(Settings):
    """What sizes there are, ascending shares of the whole; the last of each is 1. `[1]`: the axis is not elastic."""

    hidden: tuple[Share, ...] = (1.0,)
    """Of the residual stream."""
    ffn: tuple[Share, ...] = (0.5, 0.75, 1.0)
    """Of the neurons of each feed-forward."""
    heads: tuple[Share, ...] = (1.0,)
    """Of the query heads: equally many of every group where that comes out even, else whole groups."""
    mamba: tuple[Share | tuple[Share, Share], ...] = (1.0,)
    """Of the heads of Mamba-2 layers, or [share of the heads, share of their channels]."""
    depth: tuple[Share, ...] = (1.0,)
    """Of the layers, rounded to whole ones; the least important are left out."""
    heterogeneous: bool = False
    """Whether each layer has sizes of its own (not of `hidden` and `depth`); else all of a kind have the same."""

    @model_validator(mode="after")
    def _check(self) -> ElasticSpace:
        for name in ("hidden", "ffn", "heads", "mamba", "depth"):
            choices = [one if isinstance(one, tuple) else (one, 1.0) for one in getattr(self, name)]
            if not choices or any(share != 1.0 for share in choices[-1]):
                raise ValueError(f"{name} is {list(getattr(self, name))}: the last of its sizes is the whole, 1")
            for one, other in pairwise(choices):
                if one != other and all(a <= b for a, b in zip(one, other, strict=True)):
                    continue
                raise ValueError(f"{name} is {list(getattr(self, name))}: sizes ascend, each inside the next")
        return self


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a model.

    Attributes:
        name: of the axis.
        choices: how many sizes there are.
        layers: those that have it; () for `hidden` and `depth`.
        by_layer: whether each layer chooses for itself.
    """

    name: AxisName
    choices: int
    layers: tuple[int, ...] = ()
    by_layer: bool = False

    @property
    def rows(self) -> int:
        """How many choices are made."""
        return len(self.layers) if self.by_layer else 1

    def row_of(self, layer: int) -> int:
        """Which of them is about a layer."""
        return self.layers.index(layer) if self.by_layer else 0


def _even(name: str, layer: int, share: float, whole: int) -> int:
    size = round(share * whole)
    if size < 1 or abs(size - share * whole) > 1e-6:
        raise BudgetError(
            f"{share:g} of the {whole} {name} of layer {layer} is no whole number: use multiples of 1/{whole}"
        )
    return size


def _heads(own: DecoderSettings, layer: int, share: float) -> tuple[tuple[str, int], ...]:
    heads = _even("query heads", layer, share, own.heads)
    if heads % own.key_heads == 0:
        return ("heads", heads), ("kv_heads", own.key_heads)
    keys = _even("key heads", layer, share, own.key_heads)
    return ("heads", heads), ("kv_heads", keys)


def layer_fields(settings: DecoderSettings, space: ElasticSpace, axis: str, layer: int, choice: int) -> dict[str, int]:
    """What a layer's choice means, as a budget's entries for that layer.

    Raises:
        BudgetError: it does not come out even.
    """
    own, share = settings.at(layer), getattr(space, axis)[choice]
    if axis == "ffn":
        return {"ffn": max(1, round(share * ffn_size(settings, layer)))}
    if axis == "heads":
        return dict(_heads(own, layer, share))
    assert isinstance(own, HybridSettings)
    of_heads, of_channels = share if isinstance(share, tuple) else (share, 1.0)
    group = own.mamba.heads // own.mamba.groups
    heads = own.mamba.groups * _even("Mamba heads of a group", layer, of_heads, group)
    return {"mamba_heads": heads, "mamba_head_size": max(1, round(of_channels * own.mamba.head_size))}


def axes_of(settings: DecoderSettings, space: ElasticSpace) -> tuple[Axis, ...]:
    """The axes of a model along which there is a choice.

    Raises:
        BudgetError: an axis that the model has not, or sizes that do not come out even.
    """
    every = tuple(range(settings.layers))
    layers: dict[str, tuple[int, ...]] = {
        "ffn": settings.layers_of("mlp") if isinstance(settings, HybridSettings) else every,
        "heads": settings.attention_layers,
        "mamba": settings.layers_of("mamba") if isinstance(settings, HybridSettings) else (),
    }
    found: list[Axis] = []
    if len(space.hidden) > 1:
        found.append(Axis("hidden", len(space.hidden)))
    names: tuple[AxisName, ...] = ("ffn", "heads", "mamba")
    for name in names:
        count = len(getattr(space, name))
        if count == 1:
            continue
        if not layers[name]:
            what = {"ffn": "feed-forwards", "heads": "attention", "mamba": "Mamba-2 layers"}[name]
            raise BudgetError(f"space.{name}: the model has no {what}; leave it out")
        for layer in layers[name]:
            for choice in range(count):
                layer_fields(settings, space, name, layer, choice)
        found.append(Axis(name, count, layers[name], space.heterogeneous))
    if len(space.depth) > 1:
        found.append(Axis("depth", len(space.depth)))
    if settings.loop is not None or settings.chains is not None or settings.moe is not None:
        raise BudgetError("elastic models are plain decoders or hybrids: leave out loop, chains and moe")
    return tuple(found)


def hidden_of(settings: DecoderSettings, space: ElasticSpace, choice: int) -> int:
    """Width of the stream."""
    return max(2, round(space.hidden[choice] * settings.hidden_size))


def layers_kept(settings: DecoderSettings, space: ElasticSpace, choice: int) -> int:
    """How many layers are kept."""
    return max(1, round(space.depth[choice] * settings.layers))


def budget_at(settings: DecoderSettings, axis: Axis, space: ElasticSpace, layer: int, choice: int) -> Budget:
    """The budget of one choice in one layer, all else whole."""
    fields = layer_fields(settings, space, axis.name, layer, choice)
    every = range(settings.layers)
    tree: dict[str, Any] = {
        name: tuple(size if one == layer else None for one in every) for name, size in fields.items()
    }
    return Budget(**tree)


def budget_of(
    settings: DecoderSettings, space: ElasticSpace, axes: Sequence[Axis], chosen: Chosen, order: Sequence[int]
) -> Budget:
    """The budget of some choices.

    Args:
        settings: of the full model.
        space: its sizes.
        axes: of the model.
        chosen: a choice for each axis that is not whole.
        order: layers, the most important first.
    """
    tree: dict[str, Any] = {}
    by_layer: dict[str, list[int | None]] = {}
    for axis in axes:
        picked = chosen.get(axis.name)
        if picked is None:
            continue
        if axis.name == "hidden":
            tree["hidden"] = hidden_of(settings, space, picked[0])
        elif axis.name == "depth":
            tree["skip"] = tuple(sorted(order[layers_kept(settings, space, picked[0]) :]))
        else:
            for layer in axis.layers:
                entries = layer_fields(settings, space, axis.name, layer, picked[axis.row_of(layer)])
                for name, size in entries.items():
                    by_layer.setdefault(name, [None] * settings.layers)[layer] = size
    for name, sizes in by_layer.items():
        alike = {size for size in sizes if size is not None}
        tree[name] = alike.pop() if len(alike) == 1 else tuple(sizes)
    return Budget(**tree)
