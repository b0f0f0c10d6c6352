"""What of a run's state stays as it is while a step's gradient is computed: it can be saved meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from resilin.checkpoint.staging import memory_of


def steady_tensors(model: nn.Module, optimizer_state: Mapping[str, Any]) -> list[Tensor]:
    """The trainable parameters and the optimizer's tensors.

    Not those that share memory with a buffer or a frozen parameter: a forward pass may write these.

    Args:
        model: of the run.
        optimizer_state: what its optimizer saves.
    """
    written = {memory_of(buffer) for buffer in model.buffers()}
    written |= {memory_of(parameter) for parameter in model.parameters() if not parameter.requires_grad}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [tensor for tensor in (*trained, *_tensors_in(optimizer_state)) if memory_of(tensor) not in written]


def _tensors_in(node: Any) -> Iterator[Tensor]:
    if isinstance(node, Tensor):
        yield node
    elif isinstance(node, Mapping):
        for item in node.values():
            yield from _tensors_in(item)
    elif isinstance(node, list):
        for item in node:
            yield from _tensors_in(item)
