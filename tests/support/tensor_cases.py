"""One training step of a decoder divided among ranks, compared with the whole decoder's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from forked import run_ranks

from resilin.keys import Keys
from resilin.models.decoder import Decoder
from resilin.models.decoder_plan import decoder_plan
from resilin.models.decoder_settings import DecoderSettings, MoESettings
from resilin.nouns import Batch, Mean
from resilin.objective.next_token import NextToken
from resilin.parallel.group import Group
from resilin.parallel.tensor import parallelise

SMALL = {"vocab_size": 40, "hidden_size": 16, "layers": 2, "heads": 4, "mlp_size": 24}
B = 3


@dataclass(frozen=True)
class Case:
    """One comparison."""

    settings: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, Any] = field(default_factory=dict)
    moe: dict[str, Any] | None = None
    sequence: bool = False
    packed: bool = False
    weighted: bool = False
    vocabulary_multiple: int = 1
    autocast: bool = False
    tokens: int = 12

    def decoder(self) -> Decoder:
        moe = None if self.moe is None else MoESettings(**self.moe)
        model = Decoder(DecoderSettings(**{**SMALL, **self.settings, "moe": moe}), seed=3)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():  # biases and scales that are not what they are at first
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.1 * noise if parameter.ndim > 1 else 0.3 * noise)
        return model


def batch(case: Case) -> Batch:
    g, T = torch.Generator().manual_seed(1), case.tokens
    vocabulary = case.settings.get("vocab_size", SMALL["vocab_size"])
    tokens = torch.randint(vocabulary, (B, T), generator=g)
    labels = torch.randint(vocabulary, (B, T), generator=g)
    labels[torch.rand(B, T, generator=g) < 0.25] = -100
    fields = {"tokens": tokens, "labels": labels}
    if case.packed:
        documents = torch.tensor([[0] * 5 + [1] * 7, [0] * 12, [0] * 3 + [1] * 3 + [2] * 4 + [-1] * 2])
        fields |= {"documents": documents, "positions": torch.arange(T).expand(B, T).clone()}
        fields["labels"] = labels.where(documents >= 0, -100)
    if case.weighted:
        fields["weights"] = torch.rand(B, T, generator=g)
    return Batch(torch.arange(B), fields)


def step(
    model: Any, case: Case, divide: Callable[[Batch], Batch] = lambda whole: whole
) -> tuple[float, dict[str, float]]:
    """Forward and backward; the loss and its logs."""
    objective = NextToken(**case.objective).build()
    with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
        loss = objective(model, divide(batch(case)), Keys(5, 2, torch.arange(B)))
    loss.sum.backward()
    return float(loss.sum.detach()), {name: log.value() for name, log in loss.logs.items() if isinstance(log, Mean)}


def compare(case: Case, group: Group) -> str | None:
    """What differs on this rank, if anything."""
    whole = case.decoder()
    model = copy.deepcopy(whole)
    local = parallelise(model, decoder_plan(whole.settings, case.vocabulary_multiple), group, sequence=case.sequence)
    wanted, wanted_logs = step(whole, case)
    found, logs = step(local.module, case)
    local.sum_gradients()
    rate = 3e-2 if case.autocast else 1e-5
    wrong = []
    if abs(found - wanted) > rate * abs(wanted):
        wrong.append(f"loss {found} for {wanted}")
    for name in wanted_logs:
        if abs(logs[name] - wanted_logs[name]) > rate * max(1, abs(wanted_logs[name])) and not case.autocast:
            wrong.append(f"{name} {logs[name]} for {wanted_logs[name]}")
    counted = 0.0
    norm = sum(float(p.grad.double().square().sum()) for p in whole.parameters())  # type: ignore[union-attr]
    least = 1e-3 * norm**0.5  # a smaller gradient is what is left of larger ones, with their rounding
    for (name, ours), (same, theirs) in zip(local.module.named_parameters(), whole.named_parameters(), strict=True):
        assert name == same
        assert theirs.grad is not None
        part = local.part(name, theirs.grad)
        assert ours.grad is not None, name
        if ours.grad.shape != part.shape:
            wrong.append(f"{name}: {list(ours.grad.shape)} for {list(part.shape)}")
        elif (ours.grad - part).norm() > rate * max(float(theirs.grad.norm()), least):
            wrong.append(f"{name}: {float((ours.grad - part).norm())} of {float(theirs.grad.norm())}")
        if local.parameters[name].first:
            counted += float(ours.grad.double().square().sum())
    total = torch.tensor(counted, dtype=torch.float64)
    torch.distributed.all_reduce(total, group=group.process_group)
    if abs(float(total) - norm) > 3 * rate * norm:
        wrong.append(f"squared norm {float(total)} for {norm}")
    return f"{case}: {'; '.join(wrong)}" if wrong else None


def all_compared(rank: int, cases: list[Case]) -> list[str]:
    group = Group.of()
    return [found for case in cases if (found := compare(case, group)) is not None]


def check(ranks: int, cases: list[Case]) -> None:
    for rank, wrong in enumerate(run_ranks(ranks, all_compared, cases)):
        assert not wrong, f"rank {rank} of {ranks}:\n" + "\n".join(wrong)
