"""Stages of a pipeline compute a budget's part of the model: also of the stream, which goes from one to the next."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from chain_cases import chain_settings
from forked import run_ranks
from nested_cases import TOKENS

from resilin.keys import Keys
from resilin.models.decoder_settings import DecoderSettings, MoESettings
from resilin.models.settings import ModelContext
from resilin.nested import Budget, budget
from resilin.nouns import Batch, Loss
from resilin.objective.next_token import NextToken
from resilin.optim.sgd import SGD
from resilin.parallel.assemble import assemble
from resilin.parallel.local_model import cut_out
from resilin.parallel.part import divide_decoder
from resilin.parallel.settings import ParallelSettings
from resilin.parallel.step import OneProcess
from resilin.parallel.world import World

SEED, SLOTS, CPU = 3, 4, torch.device("cpu")
PLAIN: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "layers": 4, "heads": 4, "kv_heads": 2, "mlp_size": 24, "init_std": 0.3,
    "dropout": 0.1,
}  # fmt: skip
EXPERTS = MoESettings(experts=4, experts_per_token=2, expert_size=24, shared_size=8, dense_layers=(1,))
CASES: dict[str, tuple[DecoderSettings, list[Budget]]] = {
    "plain": (
        DecoderSettings(**PLAIN),
        [Budget(hidden=8), Budget(hidden=12, ffn=(3, 24, 7, 9)), Budget(hidden=8, heads=2, kv_heads=1, skip=(1, 2))],
    ),
    "tied": (DecoderSettings(**PLAIN, tie_embeddings=True), [Budget(hidden=8), Budget(hidden=12, skip=(0,))]),
    "experts": (
        DecoderSettings(**{**PLAIN, "dropout": 0.0}, moe=EXPERTS),
        [Budget(hidden=8, experts=3), Budget(hidden=12, ffn=5, experts=(None, None, (0, 3), 2), top_k=1)],
    ),
    "normed over width": (
        DecoderSettings(**PLAIN, qk_norm="rms", qk_norm_over="width"),
        [Budget(hidden=8, heads=2, kv_heads=1)],
    ),
    "chains": (chain_settings(sizes=(2, 2)), [Budget(chains=1)]),
}
LAYOUTS: list[Any] = [
    (2, {"pipeline": 2}, True),
    pytest.param(2, {"pipeline": 2, "schedule": "zb-h1"}, True, marks=pytest.mark.slow),
    (4, {"pipeline": 2, "tensor": 2}, False),
]
"""Workers, settings, and whether the bits are those of one process."""


class At:
    """Next tokens, predicted by what a budget selects."""

    def __init__(self, wanted: Budget) -> None:
        self.wanted, self.inner = wanted, NextToken().build()

    def __call__(self, model: torch.nn.Module, batch: Batch, keys: Keys | None) -> Loss:
        with budget(model, self.wanted):
            return self.inner(model, batch, keys)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def rows_of(slots: range) -> Batch:
    tokens = torch.stack([(TOKENS[slot % 2] + slot) % 37 for slot in slots])
    return Batch(torch.tensor(list(slots)), {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]})


def optimizer() -> SGD:
    return SGD(lr=0.3, momentum=0.9)


def alone(settings: DecoderSettings, wanted: Budget) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Loss, norm, and weights after a step."""
    model = settings.build(ModelContext(SEED))
    stepping = optimizer().build(model, 1)
    engine = OneProcess(model, At(wanted), micro_batch_size=1, clip_norm=0.05, device=CPU, autocast=nullcontext)
    stepping.zero_grad()
    found = engine.gradient(rows_of(range(SLOTS)), Keys(SEED, 0, torch.arange(SLOTS)), SLOTS)
    stepping.step(0)
    return found.loss, found.norm, {name: p.detach().clone() for name, p in model.named_parameters()}


def staged(rank: int, workers: int, parallel: dict[str, Any], bits: bool, names: list[str]) -> list[str]:
    torch.set_num_threads(1)
    chosen, wrong = ParallelSettings(**parallel), []
    world = World(chosen.degrees(workers), rank)
    for name in names:
        settings, budgets = CASES[name]
        for wanted in budgets:
            part = divide_decoder(
                chosen, world, settings.build(ModelContext(SEED)), At(wanted), tokens=6, keep_whole=set(), device=CPU,
                autocast=nullcontext,
            )  # fmt: skip
            made = assemble(
                world, part.passes, part.blueprint,
                lambda owned, o=settings.outline(ModelContext(SEED)): optimizer().build_owned(o, 1, owned),
                objective=At(wanted), micro_batch_size=1, clip_norm=0.05, exact=bits, device=CPU, autocast=nullcontext,
                facts=part.facts,
            )  # fmt: skip
            batch = rows_of(made.engine.slots(SLOTS, 0))
            made.optimizer.zero_grad()
            found = made.engine.gradient(batch, Keys(SEED, 0, batch.slots_B), SLOTS)
            made.optimizer.step(0)
            loss, norm, whole = alone(settings, wanted)
            if not (found.loss == loss and found.norm == norm if bits else abs(found.loss / loss - 1) < 1e-5):
                wrong.append(f"{name}, {wanted}: loss {found.loss} for {loss}, norm {found.norm} for {norm}")
            for chunk in part.passes.chunks:
                for key, mine in chunk.named_parameters():
                    mesh = part.blueprint.mesh(part.blueprint.reduction_of(key))
                    theirs = cut_out(part.blueprint.specs[key], mesh, rank, whole[key])
                    gap = float((mine.detach() - theirs).abs().max()) if mine.numel() else 0.0
                    if gap > (0.0 if bits else 2e-5 * float(theirs.abs().max())):
                        wrong.append(f"{name}, {wanted}: {key} is {gap:.2g} off")
    return wrong


@pytest.mark.parametrize(("workers", "parallel", "bits"), LAYOUTS, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_stages_compute_what_a_budget_selects(workers, parallel, bits):
    names = [name for name in CASES if not (parallel.get("tensor") and name == "chains")]
    for wrong in run_ranks(workers, staged, workers, parallel, bits, names):
        assert not wrong
