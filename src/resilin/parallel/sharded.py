"""FSDP: every worker keeps a share of the weights, and gathers the others block by block while it needs them.

The engine is torch's `fully_shard` (FSDP2; Zhao et al., PyTorch FSDP, 2023), with sums in the place of means: gradients
are divided once, by the units of the whole step. What the optimizer and checkpoints see are the local tensors, and how
they lie is said by the same specifications as everywhere (`Shard` of dimension 0, as DTensor cuts it).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from resilin.models.decoder import Decoder
from resilin.models.moe import Experts
from resilin.models.stage_span import Elsewhere
from resilin.parallel.blueprint import Blueprint
from resilin.parallel.canonical import Node
from resilin.parallel.exchange import add_up_all
from resilin.parallel.group import Group
from resilin.parallel.world import World


def shard_module(module: nn.Module, world: World, blueprint: Blueprint, device_type: str, *, by_step: bool) -> None:
    """Divide the parameters of a model among the workers that have copies of them, in place.

    Args:
        module: this worker's part of a model; a decoder's blocks are gathered one at a time, their experts too where
            these are divided already, the rest together.
        world: all workers, who call together. Copies are sharded over the axes dp and cp, those of experts over edp,
            and replicated over rep. Experts of which there is one copy beside those stay as they are.
        blueprint: of the whole model.
        device_type: "cpu" or "cuda".
        by_step: whether what is gathered is kept after a forward pass; see `Gathered`.
    """
    # What a block gives may be a view, and is never written to.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh, kept = _mesh(world, device_type, ("dp", "cp")), False if by_step else None
    alone: set[nn.Parameter] = set()
    if world.axis("ep") > 1:
        experts = {name: inner for name, inner in module.named_modules() if isinstance(inner, Experts)}
        if world.axis("edp") == 1:
            alone = {p for layer in experts.values() for p in layer.parameters()}
        else:
            of_experts = _mesh(world, device_type, ("edp",))
            for name, layer in experts.items():
                dims = {p: Shard(blueprint.sharded_dim(f"{name}.{own}")) for own, p in layer.named_parameters()}
                fully_shard(layer, mesh=of_experts, reshard_after_forward=kept, shard_placement_fn=dims.__getitem__)
    for inner in module.modules():
        if isinstance(inner, Decoder):
            for block in inner.blocks:
                if not isinstance(block, Elsewhere):
                    fully_shard(block, mesh=mesh, reshard_after_forward=kept, ignored_params=alone)
    fully_shard(module, mesh=mesh, reshard_after_forward=kept, ignored_params=alone)
    for inner in module.modules():
        if isinstance(inner, FSDPModule):
            inner.set_gradient_divide_factor(1.0)
            inner.set_force_sum_reduction_for_comms(True)


class Gathered:
    """Weights that FSDP gathers once for all micro-batches of a step, and whose gradients it sums once.

    They are there from the first forward pass until the last backward pass, and gradients in whole beside them: FSDP's
    own way, block by block for each pass, sends them twice for every micro-batch, which a pipeline has many of.

    Args:
        chunks: the parts of the model that this worker has, each divided by `shard_module`.
    """

    def __init__(self, chunks: Sequence[nn.Module]) -> None:
        self._chunks = list(chunks)

    def before_backward(self, chunk: int, *, last: bool) -> None:
        """Called before each backward pass.

        Args:
            chunk: its part of the model.
            last: whether it is the step's last one there.
        """
        root = self._chunks[chunk]
        assert isinstance(root, FSDPModule)
        root.set_is_last_backward(last)
        root.set_requires_gradient_sync(last)
        root.set_reshard_after_backward(last)

    def sum_up(self, chunk: int) -> None:
        """Sum a chunk's gradients, and give its weights up, where no backward pass of autograd's ends the step.

        A schedule that cuts backward passes in halves ends with gradients of weights, which hooks of FSDP do not see:
        they are told so by hand, as `torch.distributed.pipelining` does it.
        """
        root = self._chunks[chunk]
        self.before_backward(chunk, last=True)
        state = fully_shard.state(root)  # type: ignore[attr-defined]
        for inner in state._state_ctx.all_states:
            for group in inner._fsdp_param_groups:
                group.post_backward()
        state._root_post_backward_final_callback()

    def give_up(self) -> None:
        """Keep this worker's share only: after passes that no backward pass follows."""
        for chunk in self._chunks:
            for inner in chunk.modules():
                if isinstance(inner, FSDPModule):
                    inner.reshard()


def _mesh(world: World, device_type: str, axes: tuple[str, ...]) -> DeviceMesh:
    """The ranks that this worker shares parameters with: (replicas, shards), or (shards,), which lie on these axes."""
    # Groups are made by all workers together: one of the shards, and one of the replicas where there are several.
    shards, both = world.group(*axes), next(ranks for ranks in world.members("rep", *axes) if world.rank in ranks)
    grid = np.array(both).reshape(world.axis("rep"), -1)
    if len(grid) == 1:
        return _of_groups(device_type, grid[0], [shards], ("shards",))
    return _of_groups(device_type, grid, [world.group("rep"), shards], ("replicas", "shards"))


def _of_groups(device_type: str, ranks: np.ndarray, groups: Sequence[Group], names: tuple[str, ...]) -> DeviceMesh:
    processes: list[dist.ProcessGroup] = []
    for group in groups:
        if group.process_group is None:  # torch wants a group even of one
            raise ValueError(f"the axis {names[len(processes)]} has one rank: FSDP has nothing to divide there")
        processes.append(group.process_group)
    return DeviceMesh.from_group(
        processes if len(processes) > 1 else processes[0],
        device_type,
        mesh=torch.from_numpy(np.ascontiguousarray(ranks)) if len(processes) > 1 else None,
        mesh_dim_names=names,
    )


def local(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


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
