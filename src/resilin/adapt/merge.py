"""Merging adapters into the weights, and taking them out again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from resilin.adapt.attach import adapted_maps, attached_to, known
from resilin.adapt.linear import AdaptedLinear
from resilin.adapt.targets import AdapterError


def merge(model: nn.Module, adapters: Sequence[str] | None = None, *, keep: bool = True) -> None:
    """Put adapters into the weights: the model computes the same, at the base's cost.

    All weights are computed before the first is changed, so an error leaves the model as it was.

    Args:
        model: with adapters attached, none of them merged.
        adapters: the first ones of those in use, in their order; None: all in use.
        keep: hold on to a copy of each changed weight, so that `unmerge` restores every bit. Without it the weight is
            computed back in float64, up to rounding; dora cannot be, and refuses.

    Raises:
        AdapterError: for an unknown name or one that is not in use, ones that are not the first (later adapters see
            the weight that earlier ones leave), or while some are merged already.
    """
    attached = attached_to(model)
    if attached.merged is not None:
        raise AdapterError(f"adapters {', '.join(attached.merged)} are merged already: unmerge first")
    active = list(attached.active)
    names = active if adapters is None else [known(attached, name) for name in adapters]
    if names != active[: len(names)]:
        raise AdapterError(
            f"adapters {', '.join(names)} cannot be merged alone: in use are {', '.join(active) or 'none'}, in this "
            "order, and those that come first have to be merged first"
        )
    if not keep:
        lasting = [name for name in names if attached.settings[name].method == "dora"]
        if lasting:
            raise AdapterError(f"adapter {lasting[0]!r} is dora, which only a copy can take out again: keep=True")
    maps = adapted_maps(model).values()
    _merge_maps(list(maps), tuple(names), keep)
    attached.merged = tuple(names)


def _merge_maps(maps: list[AdaptedLinear], names: tuple[str, ...], keep: bool) -> None:
    done: list[AdaptedLinear] = []
    try:
        for linear in maps:
            linear.merge_(names, keep=True)
            done.append(linear)
    except ValueError as error:
        for linear in done:
            _put_back(linear)
        raise AdapterError(str(error)) from None
    if not keep:
        for linear in maps:
            linear.kept = None


def _put_back(linear: AdaptedLinear) -> None:
    weight = linear.restored()
    if weight is not None:
        linear.unmerge_(weight)


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Take the merged adapters out of the weights: to the bit where copies were kept, else by inverses in float64.

    Raises:
        AdapterError: nothing is merged, or a weight cannot be computed back; the model is then left as it was.
    """
    attached = attached_to(model)
    if attached.merged is None:
        raise AdapterError("no adapter is merged: there is nothing to take out")
    maps = list(adapted_maps(model).values())
    try:
        weights = [linear.restored() for linear in maps]
    except ValueError as error:
        raise AdapterError(str(error)) from None
    for linear, weight in zip(maps, weights, strict=True):
        if weight is not None:
            linear.unmerge_(weight)
    attached.merged = None
