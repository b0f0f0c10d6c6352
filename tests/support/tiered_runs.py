"""A small mixture of experts trained with everything in memory, and with tiers, by the same optimizer."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from resilin.memory import ExpertTiers, TieredExperts
from resilin.models.decoder_settings import DecoderSettings, MoESettings
from resilin.models.initial import fill_parameters
from resilin.models.moe import MoE, route
from resilin.optim.adamw import AdamW
from resilin.optim.clip import global_norm
from resilin.optim.rows import gradients_of, rows_of

MOE = MoESettings(experts=7, experts_per_token=2, expert_size=16)
LAYERS = 3
CLIP = 0.5
RULE = AdamW(lr=0.01, weight_decay=0.1)
TOTAL = 40


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


class InMemory:
    """Everything is a parameter, and is updated in every step."""

    def __init__(self, gated: bool = True) -> None:
        self.model = Stack(gated)
        self.optimizer = RULE.build(self.model, TOTAL)
        self.visits: dict[tuple[int, int], int] = {}

    def backward(self, step: int) -> float:
        loss_sum = 0.0
        for x, y in batches(step):
            out, used = self.model(x)
            loss = (out - y).square().sum()
            loss.backward()
            loss_sum += float(loss.detach())
            for key in {(layer, expert) for layer, experts in enumerate(used) for expert in experts}:
                self.visits[key] = self.visits.get(key, 0) + 1
        return loss_sum

    def step(self, step: int) -> float:
        loss_sum = self.backward(step)
        grads = [p.grad for p in self.model.parameters()]
        torch._foreach_mul_(grads, min(1.0, CLIP / float(global_norm(grads))))
        self.optimizer.step(step)
        self.model.zero_grad()
        return loss_sum

    def states(self) -> dict[str, Tensor]:
        found = {name: p.detach().clone() for name, p in self.model.named_parameters() if ".experts." in name}
        for name, moments in self.optimizer.state_dict()["parameters"].items():
            if ".experts." in name:
                found |= {f"{name}.{kind}": moment.clone() for kind, moment in moments.items() if moment.dim()}
        return found


class Tiered(InMemory):
    """The same with experts in tiers."""

    def __init__(self, folder: Path, gated: bool = True, host: int = 2, **options) -> None:
        self.model, self.visits = Stack(gated), {}
        record = sum(12 * p[0].numel() for p in self.model.layers[0].experts.parameters()) + 24
        self.tiers = TieredExperts(self.model, folder, ExpertTiers(host_bytes=host * record, **options), RULE, TOTAL)
        dense = {name: p for name, p in self.model.named_parameters() if rows_of(p) is None}
        self.optimizer = RULE.build_owned(Stack(gated), TOTAL, dense)

    def step(self, step: int) -> float:
        loss_sum = self.backward(step)
        dense = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = float(global_norm(gradients_of(self.model.parameters())))
        assert abs((float(global_norm(dense)) ** 2 + self.tiers.squared_norm()) ** 0.5 / norm - 1) < 1e-6
        factor = min(1.0, CLIP / norm)
        torch._foreach_mul_(dense, factor)
        self.tiers.scale(factor)
        self.optimizer.step(step)
        self.tiers.step(step)
        self.model.zero_grad()
        return loss_sum

    def states(self) -> dict[str, Tensor]:
        return {
            f"layers.{layer}.experts.{name}": stack
            for layer in range(LAYERS)
            for name, stack in self.tiers.stacked(layer).items()
        }


if __name__ == "__main__":  # trains until it is killed, writing back after every third step
    torch.set_num_threads(1)
    run = Tiered(Path(sys.argv[1]))
    for step in range(10**6):
        run.step(step)
        if step % 3 == 2:
            run.tiers.write_back()
        print(step, flush=True)  # noqa: T201
