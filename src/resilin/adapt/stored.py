"""A frozen base stored in fewer bytes than its adapters."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from resilin.adapt.adapter import Dora
from resilin.adapt.linear import AdaptedLinear
from resilin.adapt.targets import AdapterError, is_plain_map, is_quantised
from resilin.models.linear import Embedding, Linear
from resilin.models.moe import Experts


def _computes_with_any_format(module: nn.Module) -> bool:
    """Whether a module takes its weights to its input's format, whichever they are stored in."""
    adapted = isinstance(module, AdaptedLinear) and is_plain_map(module)
    return adapted or type(module) in (Linear, Embedding, Experts)


@torch.no_grad()
def store_frozen(model: nn.Module, dtype: torch.dtype, fresh: Iterable[str] = ()) -> int:
    """Store the frozen matrices of a model with adapters in `dtype`; all else stays as it is.

    Products are computed in the format that autocast or their input has, so what a matrix of numbers that `dtype` can
    hold computes is the same to the bit; other numbers are rounded once. Norms, biases, what is trained, and the
    optimizer's state stay in float32.

    Args:
        model: with adapters attached; changed in place.
        dtype: torch.bfloat16, say.
        fresh: adapters that have not been trained: a dora's magnitudes are taken from the weights as stored, so that
            it still starts as the identity.

    Returns:
        Bytes saved.

    Raises:
        AdapterError: there is no such matrix, or one is quantised.
    """
    saved = 0
    for path, module in model.named_modules():
        if isinstance(module, AdaptedLinear) and is_quantised(module):
            raise AdapterError(
                f"{path} has a quantised weight ({module.weight.dtype}), which is smaller already: leave base_dtype out"
            )
        if not _computes_with_any_format(module):
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.ndim > 1 and not parameter.requires_grad and parameter.dtype.itemsize > dtype.itemsize:
                saved += parameter.numel() * (parameter.dtype.itemsize - dtype.itemsize)
                parameter.data = parameter.data.to(dtype)
        if isinstance(module, AdaptedLinear):
            for name in set(fresh) & set(module.adapters):
                adapter = module.adapter(name)
                if isinstance(adapter, Dora):
                    adapter.start_from(module.whole_weight())
    if not saved:
        raise AdapterError(
            f"base_dtype: no frozen matrix of this {type(model).__name__} can be stored in {dtype}: leave it out"
        )
    return saved
