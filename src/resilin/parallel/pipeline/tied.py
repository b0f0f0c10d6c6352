"""A weight that is the embedding at the first stage and the head at the last: one sum of its gradients, at the last.

In one process autograd adds the embedding's gradient of a micro-batch to the head's, and both together to the sum. Two
sums, one at each stage, would round otherwise. So the first stage sends the gradient of the embedding's output, which
has the size of an activation, and the last stage does what autograd would. The message is for nobody who waits: a
micro-batch's backward pass ends at the first stage, and the last one adds up when it gets there.

Shapes: B rows, T tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from resilin.parallel.pipeline.messages import Message, Op, Part, Receive
from resilin.parallel.pipeline.schedule import Action, B, I, W


class TiedSum:
    """The gradients of a step's micro-batches, at the rank of the last stage.

    The head's part of a micro-batch is kept until the embedding's is there: as many (V, D) tensors as micro-batches are
    then on their way back to the first stage.

    Args:
        weight_VD: the weight.
        collect: called when the gradient of the next micro-batch has been added to `weight_VD.grad`.

    Attributes:
        next: the micro-batch whose gradient of the embedding's output is to be added next.
    """

    def __init__(self, weight_VD: nn.Parameter, collect: Callable[[], None]) -> None:
        self._weight, self._collect = weight_VD, collect
        self._heads: dict[int, tuple[Tensor | None, Tensor]] = {}
        self.next = 0

    @property
    def has_head(self) -> bool:
        """Whether the head's part of `next` is there: where backward passes are cut in halves, it may come later."""
        return self.next in self._heads

    @contextmanager
    def head(self, micro: int, tokens_BT: Tensor) -> Iterator[None]:
        """A micro-batch's backward pass through the last stage, whose gradient of the weight is kept apart.

        Args:
            micro: its number.
            tokens_BT: its ids, as the embedding gets them.
        """
        before, self._weight.grad = self._weight.grad, None
        yield
        self._heads[micro] = self._weight.grad, tokens_BT
        self._weight.grad = before

    @torch.no_grad()
    def embedding(self, grad_BTD: Tensor) -> None:
        """Add the embedding's part of micro-batch `next`, and both to the sum.

        Args:
            grad_BTD: of the embedding's output; only the order of its elements counts.
        """
        head_VD, tokens_BT = self._heads.pop(self.next)
        self.next += 1
        rows, weight = len(self._weight), self._weight
        grad_BTD = grad_BTD.reshape(*tokens_BT.shape, weight.shape[1])
        both_VD: Tensor = torch.ops.aten.embedding_dense_backward(grad_BTD, tokens_BT, rows, -1, False)
        if head_VD is not None:
            both_VD += head_VD
        weight.grad = both_VD if weight.grad is None else weight.grad.add_(both_VD)
        self._collect()


def heads_kept(ops: Sequence[Op], last: int) -> int:
    """The most (V, D) gradients of the head that the rank of the last stage keeps at one time, in `TiedSum`.

    Args:
        ops: of that rank, with what comes for the sum: of `lower`.
        last: number of the last stage.
    """
    heads: set[int] = set()
    due: set[int] = set()
    done = most = 0
    for op in ops:
        if isinstance(op, Receive) and op.message.embedded:
            due |= {_micro(op.message)}
        if not isinstance(op, Action):
            continue
        ready = set(due)
        if op.stage == last and op.kind in (B, W):
            heads.add(op.micro)
        elif op.stage == 0 and op.kind in (B, I):  # both ends are here
            due.add(op.micro)
        most = max(most, len(heads))
        while done in ready and done in heads:
            heads.remove(done)
            done += 1
    return most


def _micro(message: Message | Part) -> int:
    return message.micro if isinstance(message, Message) else message.rows.receiver_micro
