"""FSDP: every worker keeps a share of the weights, and gathers the others block by block while it needs them.

The engine is torch's `fully_shard` (FSDP2; Zhao et al., PyTorch FSDP, 2023), with sums in the place of means: gradients
are divided once, by the units of the whole step. What the optimizer and checkpoints see are the local tensors, and how
they lie is said by the same specifications as everywhere (`Shard` of dimension 0, as DTensor cuts it). The model is
divided by `resilin.parallel.gathered`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from resilin.parallel.canonical import Node
from resilin.parallel.exchange import add_up_all
from resilin.parallel.group import Group


def local(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor, sharing its memory."""
    # A DTensor, whose class takes most of a second to import.
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class FsdpShards:
    """What the engine of workers needs of parameters that FSDP has divided: it sums their gradients by itself.

    Args:
        parameters: by name.
        sums: for each of them the groups in which a rank has only a part of the gradient's sum.
        group: all ranks that have copies or shards of these.

    Attributes:
        shards: by name the local tensors, as parameters for an optimizer; ranks that have none of one lack it.
    """

    exact = False
    collects = False

    def __init__(
        self, parameters: Sequence[tuple[str, nn.Parameter]], sums: Mapping[str, tuple[Group, ...]], group: Group
    ) -> None:
        self.names = [name for name, _ in parameters]
        self.parameters = [p for _, p in parameters]
        self.group, self._sums = group, dict(sums)
        self.shards = {name: nn.Parameter(local(p.detach())) for name, p in parameters if local(p).numel()}

    def reduce(self, mine: Sequence[Node], blocks: Sequence[Sequence[tuple[int, int]]]) -> None:
        """Gradients were summed during the backward passes; what only parts of were computed is summed now."""
        by_group: dict[tuple[int, ...], tuple[Group, list[Tensor]]] = {}
        for name, parameter in zip(self.names, self.parameters, strict=True):
            for group in self._sums.get(name, ()):
                if group.size > 1:
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
                    by_group.setdefault(group.ranks, (group, []))[1].append(local(parameter.grad))
        for group, grads in by_group.values():
            add_up_all(grads, group)

    def sums_of(self, name: str) -> list[Tensor]:
        """Its shard's gradient, whole at every rank that has one: nobody has to give it.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"the gradient of {name!r} is summed where it is computed")

    def used(self) -> Tensor:
        """(P,) float64: 1 for every parameter that has a gradient."""
        return torch.tensor([p.grad is not None for p in self.parameters], dtype=torch.float64)

    def squares(self) -> Tensor:
        """(P, 1) float64 squared norms of the local gradients."""
        found = torch.zeros(len(self.parameters), 1, dtype=torch.float64)
        for row, parameter in enumerate(self.parameters):
            if parameter.grad is not None:
                found[row] = local(parameter.grad).double().square().sum().cpu()
        return found

    def set_gradients(self, used: Sequence[bool]) -> None:
        """Put local gradients into `.grad` of the shards."""
        for name, parameter, has in zip(self.names, self.parameters, used, strict=True):
            if name in self.shards:
                grad = parameter.grad
                self.shards[name].grad = local(grad) if has and grad is not None else None

    def gradients(self) -> list[Tensor]:
        """The gradients of what this rank owns."""
        return [p.grad for p in self.shards.values() if p.grad is not None]

    def read(self) -> None:
        """Shards are the parameters' own memory."""

    def gather(self) -> None:
        """Weights are gathered when they are needed."""
