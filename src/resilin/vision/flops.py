"""Floating-point operations of a model on inputs of a shape, counted as it runs without computing."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def forward_flops(model: nn.Module, shape: Sequence[int]) -> int:
    """Operations (a multiply-add is two) of the products in a forward pass over one input.

    Args:
        model: called in evaluation mode, on the meta device; the model itself is not changed.
        shape: of one input, channels first, without the batch.
    """
    shadow = copy.deepcopy(model).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shadow(torch.empty((1, *shape), device="meta"))
    return int(counter.get_total_flops())
