"""The sizes that a nested model is trained at: fractions or numbers, as budgets.

A granularity is 1 (or the whole number of neurons) for all of the model, or a part: 0.25 or 512.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Literal

from resilin.models.decoder_settings import DecoderSettings
from resilin.nested.budgets import Budget, BudgetError

Target = Literal["ffn", "heads"]
Granularity = int | float
"""A share in (0, 1], or (an integer above 1) a number of neurons."""


def label_of(granularity: Granularity) -> str:
    """How a size is called in logs and tables: `0.25`, `1`, `512`."""
    return f"{granularity:g}"


def check_granularities(granularities: Sequence[Granularity]) -> None:
    """Refuse sizes that are no ascending list which ends with the whole model.

    Raises:
        ValueError: naming the one that is wrong.
    """
    if not granularities:
        raise ValueError("granularities is empty: give at least [1]")
    for one in granularities:
        if one <= 0 or (one > 1 and one != int(one)):
            raise ValueError(f"granularities has {one}: expected shares in (0, 1], or whole numbers of neurons above 1")
    shares = [one <= 1 for one in granularities]
    if any(shares) and not all(shares):
        raise ValueError("granularities mixes shares (at most 1) and numbers (above 1): use one of the two")
    if any(right <= left for left, right in pairwise(granularities)):
        raise ValueError(f"granularities {list(granularities)} should ascend, each a part of the next")
    if all(shares) and granularities[-1] != 1:
        raise ValueError(f"granularities end with {granularities[-1]}: the last one should be 1, the whole model")


def share_of(what: str, layer: int, size: int, share: Granularity) -> int:
    """A share of a size, which must come out even.

    Raises:
        BudgetError: it does not; the text names the nearest shares that do.
    """
    exact = size * Fraction(share).limit_denominator(10**6)
    if exact.denominator != 1 or exact < 1:
        below = max(int(exact), 1)
        near = sorted({below, min(below + 1, size)})
        raise BudgetError(
            f"{share:g} of the {size} {what} of layer {layer} is {float(exact):g}, no whole number: use "
            + " or ".join(f"{number / size:.6g} ({number})" for number in near)
        )
    return int(exact)


def ffn_size(settings: DecoderSettings, layer: int) -> int:
    """Neurons of a layer's feed-forward, or of each of its experts."""
    own = settings.at(layer)
    if settings.is_moe_layer(layer):
        assert own.moe is not None
        return own.moe.expert_size
    return own.feed_forward_size


def layer_sizes(
    settings: DecoderSettings, layer: int, granularity: Granularity, targets: Sequence[Target]
) -> tuple[int | None, int | None, int | None]:
    """Neurons, query heads and key heads of a layer at a granularity; None: all.

    Raises:
        BudgetError: they do not come out even, or exceed the layer.
    """
    ffn = heads = key_heads = None
    own, neurons = settings.at(layer), ffn_size(settings, layer)
    if granularity > 1:
        if granularity > neurons:
            raise BudgetError(f"granularity {granularity:g} is more than the {neurons} neurons of layer {layer}")
        share: Granularity = Fraction(int(granularity), neurons)  # type: ignore[assignment]
    else:
        share = granularity
    if "ffn" in targets:
        ffn = share_of("neurons", layer, neurons, share)
    if "heads" in targets:
        group = own.heads // own.key_heads
        heads = share_of("query heads", layer, own.heads, share)
        # Whole groups where they come out even, else equally many heads of every group.
        key_heads = heads // group if heads % group == 0 else own.key_heads
        if heads % key_heads:
            raise BudgetError(
                f"{float(share):g} of the {own.heads} query heads of layer {layer} is {heads}, which its "
                f"{own.key_heads} key heads cannot share equally: use multiples of 1/{own.key_heads}, or leave "
                "'heads' out of targets"
            )
    return ffn, heads, key_heads


def budget_at(
    settings: DecoderSettings, granularity: Granularity | Sequence[Granularity], targets: Sequence[Target] = ("ffn",)
) -> Budget:
    """The budget of a granularity, the same in all layers, or one for each layer.

    Args:
        settings: of the full model.
        granularity: one for all, or one for each layer.
        targets: what is cut: neurons, heads, or both in the same proportion.

    Raises:
        BudgetError: sizes do not come out even.
    """
    layers = range(settings.layers)
    each = [granularity] * len(layers) if isinstance(granularity, int | float) else list(granularity)
    if len(each) != len(layers):
        raise BudgetError(f"{len(each)} granularities for {len(layers)} layers: give one for each")
    rows = [layer_sizes(settings, layer, one, targets) for layer, one in zip(layers, each, strict=True)]
    columns = list(zip(*rows, strict=True))

    def merged(column: tuple[int | None, ...]) -> int | tuple[int | None, ...] | None:
        return column[0] if len(set(column)) == 1 else column

    ffn, heads, key_heads = (merged(column) for column in columns)
    return Budget(ffn=ffn, heads=heads, kv_heads=key_heads)
