"""Run by torchrun: saves a state cut over ranks with torch.distributed.checkpoint, or loads one and says what it got.

dcp_run.py save OUT     DTensor shards of uneven sizes; rank 0 also writes OUT.safetensors, the whole values
dcp_run.py load IN OUT  into a model and optimizer cut the other way; rank 0 writes the whole values
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from end_of_ranks import leave
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


def start(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3, bias=False))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0, "lr": 2e-2},
    ]
    return model, torch.optim.AdamW(groups, lr=1e-2)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for number in range(count):
        torch.manual_seed(number)
        model(torch.randn(4, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(value: Tensor) -> Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def values(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    weights, state = get_state_dict(model, optimizer)
    found = {f"model/{name}": whole(value) for name, value in weights.items()}
    for name, moments in state["state"].items():
        found.update({f"optimizer/{key}/{name}": whole(value) for key, value in moments.items()})
    return found


def main(mode: str, first: Path, second: Path | None = None) -> None:
    dist.init_process_group("gloo")
    model, optimizer = start(seed=0 if mode == "save" else 1)
    step(model, optimizer, 3 if mode == "save" else 1)
    weights, state = get_state_dict(model, optimizer)
    tree = {"model": weights, "optim": state, "step": 3 if mode == "save" else 0, "data": {"seen": 12, "order": [1, 2]}}
    if mode == "save":
        dcp.save(tree, checkpoint_id=first)
        out = first.with_suffix(".safetensors")
    else:
        assert second is not None
        tree["data"] = {"seen": 0, "order": [0, 0]}
        dcp.load(tree, checkpoint_id=first)
        set_state_dict(model, optimizer, model_state_dict=tree["model"], optim_state_dict=tree["optim"])
        assert tree["step"] == 3
        assert tree["data"] == {"seen": 12, "order": [1, 2]}
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
        assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 2e-2]
        out = second
    found = values(model, optimizer)
    if dist.get_rank() == 0:
        save_file(found, out)
    leave()


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
