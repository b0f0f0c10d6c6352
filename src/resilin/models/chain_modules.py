"""What of a decoder is not a linear map, chain by chain: norms, the embedding, the output matrix, dropout.

A norm's statistics are those of each chain by itself: taken over the whole width they would tell earlier chains of
later ones.

Shapes: B batch, T tokens, H heads, V vocabulary, D_i width of chain i, D of a scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from resilin.keys import Keys, kept
from resilin.models.chain_linear import Chained
from resilin.models.chain_settings import reach_of
from resilin.models.linear import Embedding, Linear, product
from resilin.models.rms_norm import rms_norm_of_parts


class ChainNorm(Chained):
    """A norm of each chain by itself.

    Args:
        sizes: what each chain has of the dimension `dim`.
        make: the norm of a chain, told its size.
        dim: -1: a norm of the chain's width; -2: chains are heads, and each is normed by itself, with a scale for the
            heads of its chain.
        rms_eps: where it is the root-mean-square norm of the width, what is added to the mean square.
    """

    def __init__(
        self, sizes: tuple[int, ...], make: Callable[[int], nn.Module], dim: int = -1, rms_eps: float | None = None
    ) -> None:
        super().__init__()
        self.reach, self.dim, self.rms_eps = reach_of(sizes), dim, rms_eps
        self.chains = nn.ModuleList(make(size) for size in sizes)
        self.sizes = sizes

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D) of any scale; of heads (..., H, head size)."""
        count = self.scale_of(x.shape[self.dim])
        if count == 1:
            alone: Tensor = self.chains[0](x)
            return alone
        if self.rms_eps is not None:
            return rms_norm_of_parts(x, [norm.weight for norm in self.chains[:count]], self.rms_eps)  # type: ignore[misc]
        parts = x.split(self.sizes[:count], self.dim)
        return torch.cat([norm(part) for norm, part in zip(self.chains, parts, strict=False)], self.dim)


class ChainEmbedding(Chained):
    """One table of tokens whose columns are divided into chains, also for the output matrix."""

    def __init__(self, tokens: int, sizes: tuple[int, ...], device: torch.device | str | None = None) -> None:
        super().__init__()
        self.reach = reach_of(sizes)
        self.chains = nn.ModuleList(Embedding(tokens, size, device=device) for size in sizes)

    def forward(self, tokens_BT: Tensor, width: int | None = None) -> Tensor:
        """(B, T) -> (B, T, D) of the scale that is so wide; None: of the largest."""
        parts = self.chains[: self.scale_of(width or self.reach[-1])]
        embedded = [part(tokens_BT) for part in parts]
        return embedded[0] if len(embedded) == 1 else torch.cat(embedded, -1)

    @property
    def weight(self) -> Tensor:
        """(V, D): the whole table, put together."""
        return matrix_of(self, self.reach[-1])


class ChainHead(Chained):
    """The output matrix, with columns for each chain: logits of scale i are those of scale i - 1 and what chain i adds.

    Like a decoder's head it is used by its weight and not called.
    """

    def __init__(self, tokens: int, sizes: tuple[int, ...], device: torch.device | str | None = None) -> None:
        super().__init__()
        self.reach = reach_of(sizes)
        self.chains = nn.ModuleList(Linear(size, tokens, bias=False, device=device) for size in sizes)

    @property
    def weight(self) -> Tensor:
        """(V, D): the whole matrix, put together."""
        return matrix_of(self, self.reach[-1])


def matrix_of(table: ChainEmbedding | ChainHead, width: int) -> Tensor:
    """(V, D) of the scale that is so wide: the columns of its chains side by side."""
    weights: list[Tensor] = [part.weight for part in table.chains[: table.scale_of(width)]]  # type: ignore[misc]
    return weights[0] if len(weights) == 1 else torch.cat(weights, 1)


def scale_logits(table: ChainEmbedding | ChainHead, hidden: Tensor) -> Iterator[Tensor]:
    """The logits of every scale up to that of the input, each from the one before: (..., D) -> (..., V).

    Logits of scale i are those of scale i - 1 plus what chain i adds, so all of them cost what the last costs alone;
    and a chain whose columns are zero changes no bit.
    """
    start, logits = 0, None
    for part, stop in zip(table.chains[: table.scale_of(hidden.shape[-1])], table.reach, strict=False):
        more = product(hidden[..., start:stop], part.weight)  # type: ignore[arg-type]
        logits = more if logits is None else logits + more
        start = stop
        yield logits


def chain_kept(x_BTD: Tensor, p: float, keys: Keys, sizes: tuple[int, ...]) -> Tensor:
    """Which elements dropout keeps, (B, T, D) bool: drawn for each chain by itself, so that a scale draws what it draws
    inside a larger one; the first chain as a decoder without chains does.
    """
    masks, left = [], x_BTD.shape[-1]
    for chain, size in enumerate(sizes):
        if not left:
            break
        own = keys.fold("chain").fold(chain) if chain else keys
        masks.append(kept(x_BTD[..., :size], p, own))
        left -= size
    return masks[0] if len(masks) == 1 else torch.cat(masks, -1)


def first_part(module: nn.Module) -> nn.Module:
    """The first chain's part of a module of chains; any other module itself."""
    return module.chains[0] if isinstance(module, Chained) else module
