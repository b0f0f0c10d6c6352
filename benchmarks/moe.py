"""Tokens a second of a mixture-of-experts layer, forward and backward, against other ways to compute it.

The contenders take turns on the same weights, tokens and pull on the output: a loop over experts that selects each
one's rows, computes its feed-forward and adds the rows back (with a module for every expert, and with stacked weights),
and the Mixtral block of `transformers` with each way of its own that runs on the device. All give the same output and
the same gradients, which is checked before anything is timed. Every contender has the layer's router. The last row of a
size is the bound: the layer's matrix products and nothing else, on rows that are sorted already.

On a CPU one thread computes, and its processor time is taken, with what the system spends on its pages: other programs
on the machine change little. As in a run, freed memory is kept, and large tensors lie in large pages where the system
offers them: for everyone.

    resilin bench run moe --help
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resilin.bench.results import Report, Row, results_name
from resilin.models.decoder_settings import DecoderSettings, MoESettings
from resilin.models.initial import fill_parameters
from resilin.models.moe import MoE, route
from resilin.run.allocator import keep_freed_memory


class Size(NamedTuple):
    """Of the layer and of what goes through it."""

    tokens: int
    hidden: int
    experts: int
    expert_size: int
    choices: int = 2

    def __str__(self) -> str:
        layer = f"hidden size {self.hidden}, {self.experts} experts of {self.expert_size}, top-{self.choices}"
        return f"{self.tokens} tokens, {layer}"


SIZES = {
    "cpu": [
        Size(2048, 256, 16, 512),
        Size(8192, 256, 16, 256),
        Size(4096, 512, 16, 512),
        Size(8192, 256, 16, 64),
        Size(8192, 256, 64, 128),
        Size(2048, 512, 64, 256),
        Size(256, 256, 16, 128),
        Size(512, 128, 16, 64),
        Size(128, 64, 16, 32),
        Size(1024, 128, 64, 32),
        Size(2048, 256, 64, 64, 8),
    ],
    "cuda": [Size(16384, 2048, 16, 4096), Size(16384, 2048, 64, 1024), Size(65536, 1024, 16, 2048)],
}
OURS = "Resilin"
MODULES, STACKED = "a loop over modules", "a loop over stacked weights"
PRODUCTS = "its matrix products alone"
TARGETS = {MODULES: 3.0, STACKED: 3.0, "transformers Mixtral": 2.0}
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 0.05}
Layer = Callable[[Tensor], Tensor]


class Expert(nn.Module):
    """One gated feed-forward."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Parameter(part.detach().clone()) for part in (gate, up, down))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.gate)) * F.linear(x, self.up), self.down)


class Looped(nn.Module):
    """For every expert: select its tokens, compute, weight, add."""

    def __init__(self, moe: MoE, stacked: bool) -> None:
        super().__init__()
        assert moe.experts.gate is not None
        self.settings = moe.settings
        self.router = nn.Parameter(moe.router.weight.detach().clone())
        matrices = moe.experts.gate, moe.experts.up, moe.experts.down
        self.stacked = Expert(*matrices) if stacked else None
        self.modules_list = nn.ModuleList([] if stacked else [Expert(*one) for one in zip(*matrices, strict=True)])

    def _expert(self, number: int, x: Tensor) -> Tensor:
        if self.stacked is None:
            out: Tensor = self.modules_list[number](x)
            return out
        all_of = self.stacked
        hidden = F.silu(F.linear(x, all_of.gate[number])) * F.linear(x, all_of.up[number])
        return F.linear(hidden, all_of.down[number])

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = route(F.linear(x, self.router), self.settings)
        out = torch.zeros_like(x)
        for number in range(self.settings.experts):
            token, place = torch.where(chosen == number)
            rows = self._expert(number, x.index_select(0, token)) * weights[token, place, None].to(x.dtype)
            out = out.index_add(0, token, rows.to(out.dtype))
        return out

    def gradients(self) -> Iterator[Tensor]:
        """Of the router, and of gate, up and down, stacked."""
        assert self.router.grad is not None
        yield self.router.grad
        for name in ("gate", "up", "down"):
            parts = [getattr(one, name).grad for one in self.modules_list]
            yield getattr(self.stacked, name).grad if self.stacked is not None else torch.stack(parts)


class Ours(nn.Module):
    """The layer of the decoder."""

    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.moe(x[None])[0][0]
        return out

    def gradients(self) -> Iterator[Tensor]:
        experts = self.moe.experts
        for parameter in (self.moe.router.weight, experts.gate, experts.up, experts.down):
            assert parameter is not None
            assert parameter.grad is not None
            yield parameter.grad


class Mixtral(nn.Module):
    """The block of `transformers`, with one of its ways to compute the experts."""

    def __init__(self, moe: MoE, size: Size, way: str) -> None:
        super().__init__()
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        config = MixtralConfig(
            hidden_size=size.hidden,
            intermediate_size=size.expert_size,
            num_local_experts=size.experts,
            num_experts_per_tok=moe.settings.experts_per_token,
            router_jitter_noise=0.0,
            experts_implementation=way,
        )
        self.block = MixtralSparseMoeBlock(config)
        experts = moe.experts
        assert experts.gate is not None
        with torch.no_grad():
            self.block.gate.weight.copy_(moe.router.weight)
            self.block.experts.gate_up_proj.copy_(torch.cat([experts.gate, experts.up], 1))
            self.block.experts.down_proj.copy_(experts.down)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(x[None])[0]
        return out

    def gradients(self) -> Iterator[Tensor]:
        yield self.block.gate.weight.grad
        yield from self.block.experts.gate_up_proj.grad.chunk(2, 1)
        yield self.block.experts.down_proj.grad


class Products(nn.Module):
    """The matrix products of a forward and a backward pass over all experts, into memory that is there already."""

    def __init__(self, size: Size, counts: list[int], device: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.counts = counts
        make = {"device": device, "dtype": dtype}
        rows = sum(counts)
        self.x, self.pull, self.narrow = (torch.randn(rows, size.hidden, **make) for _ in range(3))
        self.gate, self.up, self.hidden = (torch.randn(rows, size.expert_size, **make) for _ in range(3))
        self.matrices = [torch.randn(size.experts, size.expert_size, size.hidden, **make) for _ in range(3)]
        self.gradients = [torch.empty_like(matrix) for matrix in self.matrices]

    def forward(self, x: Tensor) -> Tensor:
        tensors = (self.x, self.pull, self.narrow, self.gate, self.up, self.hidden)
        parts = list(zip(*(each.split(self.counts) for each in tensors), strict=True))
        for (x_, _, narrow, gate, up, hidden), gate_, up_, down in zip(parts, *self.matrices, strict=True):
            torch.mm(x_, gate_.t(), out=gate)
            torch.mm(x_, up_.t(), out=up)
            torch.mm(hidden, down, out=narrow)
        for (x_, pull, narrow, gate, up, hidden), gate_, up_, down, of_gate, of_up, of_down in zip(
            parts, *self.matrices, *self.gradients, strict=True
        ):
            torch.mm(hidden.t(), pull, out=of_down)
            torch.mm(pull, down.t(), out=hidden)
            torch.mm(gate.t(), x_, out=of_gate)
            torch.mm(up.t(), x_, out=of_up)
            torch.mm(gate, gate_, out=narrow)
            torch.addmm(narrow, up, up_, out=narrow)
        return x


def contenders(size: Size, device: str, dtype: torch.dtype) -> dict[str, Any]:
    moe = MoESettings(experts=size.experts, experts_per_token=size.choices, expert_size=size.expert_size)
    settings = DecoderSettings(hidden_size=size.hidden, heads=2, moe=moe, init="fan_in")
    layer = MoE(settings, moe)
    fill_parameters(layer, settings, 0)
    found: dict[str, nn.Module] = {
        MODULES: Looped(layer, stacked=False),
        STACKED: Looped(layer, stacked=True),
    }
    # "batched_mm" copies a matrix for every row of tokens: at these sizes that is tens of GiB.
    for way in ("eager", "grouped_mm"):
        found[f"transformers Mixtral, {way}"] = Mixtral(layer, size, way)
    return {name: module.to(device, dtype) for name, module in {OURS: Ours(layer), **found}.items()}


def take(layer: nn.Module, x: Tensor, pull: Tensor) -> Tensor:
    layer.zero_grad(set_to_none=True)
    x.grad = None
    out: Tensor = layer(x)
    out.backward(pull)
    return out


def seconds(layer: nn.Module, x: Tensor, pull: Tensor) -> float:
    clock = time.perf_counter if x.is_cuda else time.process_time
    if x.is_cuda:
        torch.cuda.synchronize()
    began = clock()
    if isinstance(layer, Products):
        layer(x)
    else:
        take(layer, x, pull)
    if x.is_cuda:
        torch.cuda.synchronize()
    return clock() - began


def check(everyone: dict[str, Any], x: Tensor, pull: Tensor) -> None:
    """All compute the same.

    Raises:
        AssertionError: naming who does not.
    """
    first: list[Tensor] = []
    for name, layer in everyone.items():
        out = take(layer, x, pull)
        assert x.grad is not None
        found = [out.detach(), x.grad.clone(), *layer.gradients()]
        first = first or [one.clone() for one in found]
        for number, (mine, theirs) in enumerate(zip(first, found, strict=True)):
            off = float((mine - theirs).norm() / mine.norm())
            assert off < TOLERANCE[x.dtype], f"{name} differs by {off:.2g} in result {number}"


def measure(size: Size, rounds: int, device: str) -> list[Row]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    everyone = contenders(size, device, dtype)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size.tokens, size.hidden, generator=generator).to(device, dtype).requires_grad_()
    pull = torch.randn(size.tokens, size.hidden, generator=generator).to(device, dtype)
    check(everyone, x, pull)
    moe = everyone[OURS].moe
    chosen = route(moe.router(x), moe.settings)[1].flatten()
    everyone[PRODUCTS] = Products(size, chosen.bincount(minlength=size.experts).tolist(), device, dtype)
    speeds: dict[str, list[float]] = {name: [] for name in everyone}
    for index in range(rounds + 1):
        # In another order each time: what the one before left in caches and of free pages is nobody's gain for long.
        for name, layer in random.Random(index).sample(list(everyone.items()), len(everyone)):
            taken = seconds(layer, x, pull)
            if index:  # the first round warms up
                speeds[name].append(size.tokens / taken)
    rows = []
    for name in list(everyone)[1:]:
        target = next((ratio for start, ratio in TARGETS.items() if name.startswith(start)), None)
        rows.append(Row.from_turns(f"MoE, {size}", "tokens/s", speeds[OURS], speeds[name], name, target=target))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--name", help="the results file; default: moe, moe-cuda on a GPU")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    rows = [row for size in SIZES[args.device] for row in measure(size, args.rounds, args.device)]
    for row in rows:
        print(f"{row.name}: {row.ours:,.0f} {row.unit}, {row.peer_name} {row.peer:,.0f} ({row.ratio:.2f}x)")
    dtype = "bf16" if args.device == "cuda" else "fp32"
    settings = {"rounds": args.rounds, "device": args.device, "threads": 1, "dtype": dtype}
    name = args.name or results_name("moe", args.device)
    print(f"wrote {Report.of(name, settings, rows).write(args.output)}")


if __name__ == "__main__":
    main()
