"""Activation checkpointing: what of a block is kept for the backward pass and what is computed again.

Randomness is keyed, not drawn from a generator, so nothing has to be restored and gradients are the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from resilin.models.linear import left_as_now
from resilin.models.offload import Offload

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


_nothing_kept: ContextVar[bool] = ContextVar("nothing_kept", default=False)


@contextmanager
def nothing_kept() -> Iterator[None]:
    """What is computed inside is computed again under `selective`, its matrix products too.

    For attention that is made of products: they have the square of the row, and are overwritten.
    """
    token = _nothing_kept.set(True)
    try:
        yield
    finally:
        _nothing_kept.reset(token)


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operation in _KEPT and not _nothing_kept.get()
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def run_block(kind: Recompute, block: Callable[..., Any], *args: Any, offload: Offload | None = None) -> Any:
    """`block(*args)`, keeping only what `kind` says: everything, the block's input, or its matrix products.

    Args:
        kind: of recomputation.
        block: whose first argument is its input.
        args: of the block.
        offload: where the input waits for the backward pass under `block`; None: where it is.
    """
    if kind == "none" or not torch.is_grad_enabled():
        return block(*args)
    block = left_as_now(block)
    if kind == "block":
        with offload.keeping_away(args[0]) if offload is not None else nullcontext():
            return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
