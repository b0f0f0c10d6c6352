"""Dividing a model by FSDP: which of its modules are gathered together, over which workers, and how long it is kept.

Torch's `fully_shard` is imported with this module and takes most of a second, so only those import it who use it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard

from resilin.models.decoder import Decoder
from resilin.models.moe import Experts
from resilin.models.stage_span import Elsewhere
from resilin.parallel.blueprint import Blueprint
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
