"""A small mixture of experts trained with everything in memory, by torch's own optimizer, and with tiers."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from resilin.memory import TieredExperts, TierSettings
from resilin.memory.expert_state import LazyAdamW
from resilin.models.decoder_settings import DecoderSettings, MoESettings
from resilin.models.initial import fill_parameters
from resilin.models.moe import MoE, route

MOE = MoESettings(experts=7, experts_per_token=2, expert_size=16)
LAYERS = 3
LR, DECAY, CLIP = 0.01, 0.1, 0.5


class Stack(nn.Module):
    def __init__(self, gated: bool = True) -> None:
        super().__init__()
        settings = DecoderSettings(hidden_size=16, heads=2, gated=gated, moe=MOE, init="fan_in")
        self.layers = nn.ModuleList(MoE(settings, MOE) for _ in range(LAYERS))
        fill_parameters(self, settings, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, list[set[int]]]:
        used = []
        for layer in self.layers:
            out, router = layer(x)
            used.append(set(route(router.flatten(0, 1), MOE)[1].flatten().tolist()))
            x = x + out
        return x, used


def batches(step: int) -> list[tuple[Tensor, Tensor]]:
    """Two micro-batches of few tokens, so that some experts are left alone."""
    generator = torch.Generator().manual_seed(step)
    return [(torch.randn(1, 2, 16, generator=generator), torch.randn(1, 2, 16, generator=generator)) for _ in range(2)]


def dense_part(model: nn.Module) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    dense = [p for name, p in model.named_parameters() if ".experts." not in name]
    return dense, torch.optim.AdamW(dense, lr=LR, weight_decay=DECAY, fused=True, betas=(0.9, 0.95))


def factor_of(dense: list[nn.Parameter], squared: float) -> float:
    total = squared + sum(float(torch.linalg.vector_norm(p.grad, dtype=torch.float64)) ** 2 for p in dense)
    return min(1.0, CLIP / total**0.5)


class InMemory:
    """Every expert a parameter of its own, with a gradient only where a token visited it."""

    def __init__(self, gated: bool = True) -> None:
        self.model = Stack(gated)
        self.names = [n for n in ("gate", "up", "down") if getattr(self.model.layers[0].experts, n) is not None]
        self.own = {
            (layer, e, name): nn.Parameter(getattr(module.experts, name).detach()[e].clone())
            for layer, module in enumerate(self.model.layers)
            for e in range(MOE.experts)
            for name in self.names
        }
        self.dense, self.optimizer = dense_part(self.model)
        self.rest = torch.optim.AdamW(self.own.values(), lr=LR, weight_decay=DECAY, fused=True, betas=(0.9, 0.95))

    def step(self, step: int) -> float:
        loss_sum, visited = 0.0, [set() for _ in range(LAYERS)]
        for x, y in batches(step):
            out, used = self.model(x)
            visited = [a | b for a, b in zip(visited, used, strict=True)]
            loss = (out - y).square().sum()
            loss.backward()
            loss_sum += float(loss.detach())
        squared = 0.0
        for layer, module in enumerate(self.model.layers):
            for e in range(MOE.experts):
                if e in visited[layer]:
                    grads = [getattr(module.experts, name).grad[e] for name in self.names]
                    flat = torch.cat([grad.flatten() for grad in grads])
                    squared += float(torch.linalg.vector_norm(flat, dtype=torch.float64)) ** 2
        factor = factor_of(self.dense, squared)
        for (layer, e, name), parameter in self.own.items():
            grad = getattr(self.model.layers[layer].experts, name).grad[e]
            parameter.grad = grad * factor if e in visited[layer] else None
        for parameter in self.dense:
            parameter.grad.mul_(factor)
        self.optimizer.step()
        self.rest.step()
        with torch.no_grad():
            for (layer, e, name), parameter in self.own.items():
                getattr(self.model.layers[layer].experts, name)[e] = parameter
        self.model.zero_grad()
        return loss_sum

    def states(self) -> dict[str, Tensor]:
        found = {}
        for (layer, e, name), parameter in self.own.items():
            kept = self.rest.state.get(parameter, {})
            zeros = torch.zeros_like(parameter)
            found[f"{layer}.{e}.{name}"] = parameter.detach().clone()
            for kind in ("exp_avg", "exp_avg_sq"):
                found[f"{layer}.{e}.{name}.{kind}"] = kept.get(kind, zeros).clone()
            found[f"{layer}.{e}.updates"] = torch.as_tensor(kept.get("step", 0.0)).double()
        return found


class Tiered:
    def __init__(self, folder: Path, gated: bool = True, host: int = 2, catch_up: bool = False, **options) -> None:
        self.model = Stack(gated)
        experts = self.model.layers[0].experts
        record = sum(12 * p[0].numel() for p in experts.parameters()) + 32
        rule = LazyAdamW(weight_decay=DECAY, catch_up=catch_up)
        self.tiers = TieredExperts(self.model, TierSettings(folder, host_bytes=host * record, **options), rule)
        self.dense, self.optimizer = dense_part(self.model)

    def step(self, step: int) -> float:
        loss_sum = 0.0
        for x, y in batches(step):
            out, _ = self.model(x)
            loss = (out - y).square().sum()
            loss.backward()
            loss_sum += float(loss.detach())
        factor = factor_of(self.dense, self.tiers.squared_norm())
        for parameter in self.dense:
            parameter.grad.mul_(factor)
        self.optimizer.step()
        self.tiers.step(LR, factor)
        self.model.zero_grad()
        return loss_sum

    def states(self) -> dict[str, Tensor]:
        found = {}
        for layer in range(LAYERS):
            for name, rows in self.tiers.stacked(layer).items():
                found |= {f"{layer}.{e}.{name}": row for e, row in enumerate(rows)}
        return found


if __name__ == "__main__":  # trains until it is killed, writing back after every third step
    torch.set_num_threads(1)
    run = Tiered(Path(sys.argv[1]))
    for step in range(10**6):
        run.step(step)
        if step % 3 == 2:
            run.tiers.write_back()
        print(step, flush=True)  # noqa: T201
