"""Activation checkpointing: what of a block is kept for the backward pass and what is computed again.

Randomness is keyed, not drawn from a generator, so nothing has to be restored and gradients are the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Recompute = Literal["none", "block", "selective"]

# Matrix products and attention: dear to repeat, while norms, rotations and activations are cheap and large.
_KEPT = frozenset(
    getattr(torch.ops.aten, name).default
    for name in (
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "_grouped_mm",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
    if hasattr(torch.ops.aten, name)
)


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def run_block(kind: Recompute, block: Callable[..., Any], *args: Any) -> Any:
    """`block(*args)`, keeping only what `kind` says: everything, the block's input, or its matrix products."""
    if kind == "none" or not torch.is_grad_enabled():
        return block(*args)
    if kind == "block":
        return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
