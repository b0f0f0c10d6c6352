"""The ranks of a torch.distributed process group saving together."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from resilin.checkpoint.errors import CheckpointError


class ProcessGroup:
    """A `Coordinator` over a gloo group. Messages are JSON: nothing is pickled.

    Args:
        group: of all ranks, and of its own, `dist.new_group(backend="gloo")`: a save in the background uses it from
            another thread, and must not meet the messages of the training. Layouts number ranks as this group does.
        wait: for a collective that is under way.
    """

    def __init__(self, group: dist.ProcessGroup, wait: Callable[[Any], object] = lambda work: work.wait()) -> None:
        self._group, self._wait = group, wait
        self.rank, self.world = group.rank(), group.size()

    def gather(self, value: Any) -> list[Any] | None:
        """Lengths first, then the texts, padded to the longest."""
        raw = json.dumps(value).encode()
        try:
            length = torch.tensor([len(raw)])
            lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
            self._wait(dist.all_gather(lengths, length, group=self._group, async_op=True))
            longest = max(int(one) for one in lengths)
            mine = torch.zeros(longest, dtype=torch.uint8)
            mine[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
            all_of_them = [torch.empty_like(mine) for _ in range(self.world)] if self.rank == 0 else None
            self._wait(dist.gather(mine, all_of_them, group=self._group, group_dst=0, async_op=True))
        except RuntimeError as error:
            raise self._lost(error) from error
        if all_of_them is None:
            return None
        return [
            json.loads(text[: int(count)].numpy().tobytes()) for text, count in zip(all_of_them, lengths, strict=True)
        ]

    def broadcast(self, value: Any) -> Any:
        """The length first, then the text."""
        raw = json.dumps(value).encode() if self.rank == 0 else b""
        try:
            length = torch.tensor([len(raw)])
            self._wait(dist.broadcast(length, group=self._group, group_src=0, async_op=True))
            text = torch.empty(int(length), dtype=torch.uint8)
            if self.rank == 0:
                text.copy_(torch.frombuffer(bytearray(raw), dtype=torch.uint8))
            self._wait(dist.broadcast(text, group=self._group, group_src=0, async_op=True))
        except RuntimeError as error:
            raise self._lost(error) from error
        return json.loads(text.numpy().tobytes())

    def _lost(self, error: RuntimeError) -> CheckpointError:
        return CheckpointError(
            f"rank {self.rank}: the ranks that save this checkpoint lost each other ({error}); nothing was committed, "
            "and the checkpoints before it are still good"
        )
