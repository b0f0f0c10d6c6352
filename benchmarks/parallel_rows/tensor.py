"""Forward and backward passes under tensor parallelism: ours, and transformers' Llama cut by torch."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from parallel_rows.turns import in_turns, row
from resilin.bench.results import Row
from resilin.keys import Keys
from resilin.models.decoder import Decoder
from resilin.models.huggingface import load_pretrained
from resilin.nouns import Batch
from resilin.objective.next_token import NextToken
from resilin.parallel.group import Group, of_all
from resilin.parallel.messages import tell_all
from resilin.parallel.tensor import parallelise

SEED, SAME = 0, 1e-3  # relative, of losses and of the gradient of the last norm
PEER = "torch's parallelize_module, transformers' Llama"


@dataclass(frozen=True)
class Case:
    """A Llama, and the batch that all ranks compute together.

    Attributes:
        hidden: width of the stream.
        layers: blocks.
        heads: of attention, and of its keys.
        mlp: width of the feed-forward.
        vocabulary: tokens.
        rows: of the batch.
        tokens: of a row.
        rounds: steps that are timed of each contender.
    """

    hidden: int
    layers: int
    heads: int
    mlp: int
    vocabulary: int
    rows: int
    tokens: int
    rounds: int

    def __str__(self) -> str:
        return f"{self.layers} blocks of width {self.hidden}, {self.rows}x{self.tokens} tokens"

    def llama(self) -> nn.Module:
        """The same on every rank."""
        import transformers

        torch.manual_seed(SEED)
        config = transformers.LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.mlp,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            bos_token_id=None,
            eos_token_id=None,
        )
        made: nn.Module = transformers.LlamaForCausalLM(config)
        return made

    def batch(self, device: torch.device) -> Batch:
        draw = torch.Generator().manual_seed(SEED)
        rows = torch.randint(0, self.vocabulary, (self.rows, self.tokens + 1), generator=draw)
        fields = {"tokens": rows[:, :-1].contiguous(), "labels": rows[:, 1:].contiguous()}
        return Batch(torch.arange(self.rows), fields).to(device)


class Ours:
    """Our decoder with the Llama's weights."""

    def __init__(self, llama: nn.Module, group: Group, device: torch.device, *, sequence: bool) -> None:
        with tempfile.TemporaryDirectory() as folder:
            llama.save_pretrained(folder)  # type: ignore[operator]
            first = tell_all(folder, group)[0]  # transformers lets the first rank write only
            model = load_pretrained(Path(first)).to(device)
            tell_all("read", group)
        assert isinstance(model, Decoder)
        self.model = parallelise(model, model.tensor_plan(), group, sequence=sequence).module
        self.norm, self.objective = model.norm.weight, NextToken().build()
        self.group, self.sequence = group, sequence

    def __call__(self, batch: Batch) -> float:
        self.model.zero_grad(set_to_none=True)
        loss = self.objective(self.model, batch, Keys(SEED, 0, batch.slots_B))
        loss.sum.backward()
        return float(loss.sum.detach())

    def gradient(self) -> Tensor:
        assert self.norm.grad is not None
        return self.norm.grad


class Torchs:
    """The Llama with its matrices cut as torch's tutorial of tensor parallelism cuts them."""

    def __init__(self, llama: nn.Module, device: torch.device) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Replicate
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        self.model = llama.to(device)
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        inner: nn.Module = self.model.model  # type: ignore[assignment]
        plan = {
            "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
            "lm_head": ColwiseParallel(output_layouts=Replicate()),
        }
        for number in range(len(inner.layers)):  # type: ignore[arg-type]
            layer = f"model.layers.{number}"
            plan |= {f"{layer}.self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
            plan |= {f"{layer}.mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")}
            plan |= {f"{layer}.self_attn.o_proj": RowwiseParallel(), f"{layer}.mlp.down_proj": RowwiseParallel()}
        parallelize_module(self.model, mesh, plan)
        self.norm: nn.Parameter = inner.norm.weight  # type: ignore[union-attr, assignment]

    def __call__(self, batch: Batch) -> float:
        self.model.zero_grad(set_to_none=True)
        logits = self.model(input_ids=batch["tokens"], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten(), reduction="sum")
        loss.backward()
        return float(loss.detach())

    def gradient(self) -> Tensor:
        assert self.norm.grad is not None
        return self.norm.grad


def rows_of(case: Case, device: torch.device) -> list[Row]:
    """Seconds of forward and backward passes over a batch."""
    group, batch = of_all(), case.batch(device)
    torchs, ours = Torchs(case.llama(), device), Ours(case.llama(), group, device, sequence=False)
    mine, theirs = ours(batch), torchs(batch)
    apart = abs(mine - theirs) / theirs
    apart = max(apart, float((ours.gradient() - torchs.gradient()).abs().max() / torchs.gradient().abs().max()))
    failed = "" if max(tell_all(apart, group)) < SAME else f"the two are {apart:.1g} apart"
    label = f"tensor parallelism of {group.size}, {case}"
    made = {"ours": lambda _: ours(batch), "torch": lambda _: torchs(batch)}
    times = in_turns(made, case.rounds, device, label=label)
    return [row(label, times["ours"], times["torch"], PEER, 1.0, failed=failed)]
