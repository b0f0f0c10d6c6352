"""Which blocks of a decoder this process computes, where a pipeline divides them; see `resilin.parallel.pipeline`.

Shapes: B batch, T tokens, D hidden size, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Hidden:
    """What goes from one stage to the next.

    Attributes:
        hidden_BTD: the residual stream.
        router_logits: (B, T, E) of every block with experts so far.
    """

    hidden_BTD: Tensor
    router_logits: tuple[Tensor, ...] = ()


@dataclass(frozen=True, slots=True)
class StageShape:
    """What a stage would compute.

    Attributes:
        rows: B.
        tokens: T.
        hidden: D, of the residual stream between stages: what is computed of it.
        routers: of each block of the model, how many experts may be chosen; 0: it has none, or is passed by.
    """

    rows: int
    tokens: int
    hidden: int
    routers: tuple[int, ...] = ()


StageOutput = Hidden | StageShape
"""What a decoder that is a stage gives in place of an output."""


class StageSpan:
    """One stage's part of a decoder.

    An objective calls its model as ever. At the first stage the embedding begins; at later ones what came from the
    stage before stands in its place; a stage that is not the last gives a `Hidden` in place of an output.

    Args:
        blocks: numbers of the blocks.
        first: whether the embedding is here.
        last: whether the final norm and the head are.

    Attributes:
        incoming: what the stage before sent; taken by the next forward pass.
        probing: whether a forward pass is to give its `StageShape`, and compute nothing.
        apart: whether the embedding's weight gets no gradient here: that of the embedding's output is caught instead.
        tokens: ids that the last forward pass computed, (B, T) or as many as it left.
        embedded: what the embedding gave for them, (B, T, D); its `.grad` is there after the backward pass.
    """

    def __init__(self, blocks: range, *, first: bool, last: bool) -> None:
        self.blocks, self.first, self.last = blocks, first, last
        self.incoming: Hidden | None = None
        self.probing = False
        self.apart = False
        self.tokens: Tensor | None = None
        self.embedded: Tensor | None = None

    def begin(self, tokens: Tensor, embed: nn.Module) -> Tensor:
        """The embedding's output, by itself where its gradient is wanted apart."""
        x: Tensor = embed(tokens)
        if self.apart and torch.is_grad_enabled():
            self.embedded = x = x.detach().requires_grad_()
        return x

    def take(self) -> Hidden:
        """What the stage before sent; once.

        Raises:
            ValueError: the model is called a second time for one micro-batch.
        """
        if self.incoming is None:
            raise ValueError(
                "the objective calls its model more than once for a micro-batch, which a pipeline cannot do: use "
                "parallel.pipeline = 1"
            )
        found, self.incoming = self.incoming, None
        return found


class Elsewhere(nn.Module):
    """In the place of a module that another stage has: it has no parameters, and is not called."""

    def forward(self, *_: object) -> Tensor:
        """Refuses.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("this module is at another stage of the pipeline")
