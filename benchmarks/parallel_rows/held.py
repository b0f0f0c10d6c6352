"""How many bytes autograd keeps for backward passes, at most, while something runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from types import TracebackType

import torch
from torch import Tensor


class Held:
    """While entered, counts the memory of tensors saved for backward passes, each memory once.

    Args:
        without: parameters, whose memory is there anyway.

    Attributes:
        peak: bytes.
    """

    def __init__(self, without: Iterable[Tensor]) -> None:
        self._without = {p.untyped_storage().data_ptr() for p in without}
        self._users: Counter[int] = Counter()
        self._now = self.peak = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda saved: saved.tensor)

    def _pack(self, tensor: Tensor) -> _Saved:
        return _Saved(tensor, self)

    def change(self, tensor: Tensor, users: int) -> None:
        """One user more or one less of a tensor's memory."""
        storage = tensor.untyped_storage()
        where = storage.data_ptr()
        if where in self._without:
            return
        before = self._users[where]
        self._users[where] += users
        if not before or not self._users[where]:
            self._now += users * storage.nbytes()
            self.peak = max(self.peak, self._now)

    def __enter__(self) -> Held:
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)


class _Saved:
    """A tensor that autograd keeps; told when it does no more."""

    def __init__(self, tensor: Tensor, held: Held) -> None:
        self.tensor, self._held = tensor.detach(), held
        held.change(self.tensor, 1)

    def __del__(self) -> None:
        self._held.change(self.tensor, -1)
