"""Which blocks of a decoder this process computes, where a pipeline divides them; see `resilin.parallel.pipeline`.

Shapes: B batch, T tokens, D hidden size, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

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


class StageDone(Exception):  # noqa: N818 - not an error: it leaves the objective, whose model ends elsewhere
    """Raised by a decoder that is not the last stage, in place of an output."""

    def __init__(self, hidden: Hidden) -> None:
        super().__init__("this stage is done")
        self.hidden = hidden


class ShapeSeen(Exception):  # noqa: N818
    """Raised in place of any computation while only the shape of the tokens is asked for."""

    def __init__(self, rows: int, tokens: int) -> None:
        super().__init__("the shape is seen")
        self.rows, self.tokens = rows, tokens


class StageSpan:
    """One stage's part of a decoder.

    An objective calls its model as ever. At the first stage the embedding begins; at later ones what came from the
    stage before stands in its place; a stage that is not the last leaves by `StageDone`.

    Args:
        blocks: numbers of the blocks.
        first: whether the embedding is here.
        last: whether the final norm and the head are.

    Attributes:
        incoming: what the stage before sent; taken by the next forward pass.
        probing: whether the next forward pass is to tell its shape instead.
    """

    def __init__(self, blocks: range, *, first: bool, last: bool) -> None:
        self.blocks, self.first, self.last = blocks, first, last
        self.incoming: Hidden | None = None
        self.probing = False

    def enter(self, rows: int, tokens: int) -> None:
        """Called by the decoder before it computes anything."""
        if self.probing:
            raise ShapeSeen(rows, tokens)

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
