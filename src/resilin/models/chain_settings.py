"""The settings of a decoder whose every hidden vector is an ordered list of chains (Chain-of-Model, 2025).

Chain i of a layer's output reads chains 1 to i of its input and nothing of later ones, so the first i chains are an
exact model of their own: **scale i**.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from resilin.config import Settings

if TYPE_CHECKING:
    from resilin.models.decoder_settings import DecoderSettings

PositiveInt = Annotated[int, Field(gt=0)]


class ChainSettings(Settings):
    """How a decoder's widths are divided into chains: all of them in the proportion of the chains' query heads."""

    sizes: tuple[PositiveInt, ...]
    """Query heads of each chain, in order; together the model's `heads`. One chain is an ordinary decoder."""
    share_keys: bool = False
    """CoLM-Air: keys and values are made from the first chain alone and read by the queries of all, so that a cache
    made by the first chain serves every scale. Each chain needs a multiple of `kv_heads` query heads."""
    mlp_sizes: tuple[PositiveInt, ...] = ()
    """Feed-forward neurons of each chain, together `mlp_size`; empty: in the proportion of `sizes`."""
    frozen: Annotated[int, Field(ge=0)] = 0
    """So many leading chains are not trained: what their scales compute stays as it is, to the bit."""
    trained: Literal["all", "head"] = "all"
    """head: only the output matrix is trained (of chains that are not frozen), as for elastic inference with a model
    that was trained at its full scale alone."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.sizes:
            raise ValueError("chains.sizes is empty: give the query heads of each chain, such as [2, 2, 4]")
        if self.mlp_sizes and len(self.mlp_sizes) != len(self.sizes):
            raise ValueError(f"chains.mlp_sizes has {len(self.mlp_sizes)} entries for {len(self.sizes)} chains")
        if self.frozen >= len(self.sizes):
            raise ValueError(
                f"chains.frozen is {self.frozen} of {len(self.sizes)} chains: nothing is left to train; use at most "
                f"{len(self.sizes) - 1}"
            )
        return self


class Widths(NamedTuple):
    """The width of each chain (of one, where there are no chains), in order.

    Attributes:
        hidden: of the residual stream.
        queries: of all query heads.
        keys: of all key (or value) heads; of shared keys one entry, made from the first chain.
        mlp: of the feed-forward.
    """

    hidden: tuple[int, ...]
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    mlp: tuple[int, ...]

    def upto(self, chains: int) -> Widths:
        """Of the first chains."""
        return Widths(*(part[:chains] for part in self))


def reach_of(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Where each chain ends: running sums."""
    return tuple(accumulate(sizes))


def _shares(what: str, total: int, sizes: tuple[int, ...], hint: str) -> tuple[int, ...]:
    """A width divided in the proportion of chains.

    Raises:
        ValueError: it does not come out even.
    """
    whole = sum(sizes)
    for number, size in enumerate(sizes):
        if total * size % whole:
            raise ValueError(
                f"chains.sizes {list(sizes)}: chain {number + 1} would have {total * size / whole:g} of {what} "
                f"({total}): {hint}"
            )
    return tuple(total * size // whole for size in sizes)


def chain_widths(settings: DecoderSettings) -> Widths:
    """The widths of a decoder's chains.

    Raises:
        ValueError: they do not come out even.
    """
    chains, head = settings.chains, settings.head_width
    keys, mlp = settings.key_heads * head, settings.feed_forward_size
    if chains is None:
        return Widths((settings.hidden_size,), (settings.heads * head,), (keys,), (mlp,))
    sizes = chains.sizes
    step = f"use a multiple of {sum(sizes)}"
    hidden = _shares("hidden_size", settings.hidden_size, sizes, step)
    of_keys: tuple[int, ...] = (keys,)
    if not chains.share_keys:
        hint = "use sizes that kv_heads divides in proportion, or chains.share_keys"
        of_keys = tuple(n * head for n in _shares("kv_heads", settings.key_heads, sizes, hint))
    of_mlp = chains.mlp_sizes or _shares("mlp_size", mlp, sizes, f"{step}, or give chains.mlp_sizes")
    return Widths(hidden, tuple(size * head for size in sizes), of_keys, of_mlp)


def check_chains(settings: DecoderSettings) -> None:
    """Refuse chains that do not divide a decoder, and what is not defined for chains.

    Raises:
        ValueError: which setting, and what would do.
    """
    chains = settings.chains
    if chains is None:
        return
    if sum(chains.sizes) != settings.heads:
        raise ValueError(
            f"chains.sizes {list(chains.sizes)} have {sum(chains.sizes)} query heads together, and heads is "
            f"{settings.heads}: every head belongs to one chain"
        )
    refused = {
        "moe: a router reads all chains": settings.moe is not None,
        "layer_sizes: chains are the same in all blocks": bool(settings.layer_sizes),
        "loop: what blocks are told spans all chains; use loop.condition = 'none'": settings.told,
        "norm_place = 'after': it is not supported for chains; use 'before'": settings.norm_place == "after",
        "qk_norm_over = 'width': it spans all chains; use 'head'": settings.qk_norm_over == "width",
        "mup_base_size: it is not defined for chains": settings.mup_base_size is not None,
    }
    for reason, found in refused.items():
        if found:
            raise ValueError(f"chains cannot be had with {reason}")
    if chains.share_keys:
        for number, size in enumerate(chains.sizes):
            if size % settings.key_heads:
                raise ValueError(
                    f"chains.share_keys: chain {number + 1} has {size} query heads, no multiple of the "
                    f"{settings.key_heads} kv_heads that all chains read"
                )
    widths = chain_widths(settings)
    if sum(widths.mlp) != settings.feed_forward_size:
        raise ValueError(
            f"chains.mlp_sizes {list(chains.mlp_sizes)} are {sum(widths.mlp)} neurons together, and mlp_size is "
            f"{settings.feed_forward_size}"
        )
