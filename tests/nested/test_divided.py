"""Ranks that divide a model's matrices leave out, each of its own part, what a budget leaves out of the whole."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from forked import run_ranks
from nested_cases import TOKENS, decoder

from resilin.models.decoder_settings import DecoderSettings
from resilin.nested import Budget, budget
from resilin.nouns import Batch
from resilin.objective.next_token import NextToken
from resilin.parallel.group import Group
from resilin.parallel.tensor.parallelise import parallelise, plan_of

SETTINGS = DecoderSettings(vocab_size=40, hidden_size=16, layers=3, heads=4, mlp_size=24, init_std=0.3)
BUDGETS = [
    Budget(ffn=3),
    Budget(ffn=12),
    Budget(ffn=13),
    Budget(ffn=(1, 24, 7), skip=(1,)),
    Budget(skip=(0,)),
    Budget(heads=1),
    Budget(heads=(3, 4, 2), ffn=5),
    Budget(hidden=8),
    Budget(hidden=12, heads=2, ffn=6, skip=(2,)),
]
GROUPED = [Budget(heads=4), Budget(heads=2, kv_heads=1), Budget(heads=4, kv_heads=2, hidden=8)]
"""Of eight heads that share two key heads."""
KINDS: list[tuple[dict[str, Any], list[Budget]]] = [
    ({}, BUDGETS),
    ({"gated": False, "mlp_bias": True, "qkv_bias": True, "out_bias": True}, BUDGETS),
    ({"tie_embeddings": True, "qk_norm": "rms"}, BUDGETS),
    ({"heads": 8, "kv_heads": 2, "qk_norm": "layer"}, GROUPED),
    ({"qk_norm": "rms", "qk_norm_over": "width"}, BUDGETS),
    ({"heads": 8, "kv_heads": 2, "qk_norm": "layer", "qk_norm_over": "width"}, GROUPED),
    ({"heads": 8, "kv_heads": 2, "qk_norm": "transplant", "qk_norm_over": "width"}, GROUPED),
]
BATCH = Batch(torch.arange(2), {"tokens": TOKENS[:, :-1], "labels": TOKENS[:, 1:]})


def differences(rank: int, ranks: int) -> list[str]:
    wrong, group = [], Group.of()
    for changes, budgets in KINDS:
        for sequence in (False, True) if changes.get("qk_norm_over") != "width" else (False,):
            whole = decoder(DecoderSettings.model_validate({**SETTINGS.model_dump(), **changes}))
            local = parallelise(copy.deepcopy(whole), plan_of(whole), group, sequence=sequence)
            for wanted in budgets:
                losses = []
                for model in (whole, local.module):
                    model.zero_grad(set_to_none=True)
                    with budget(model, wanted):
                        loss = NextToken().build()(model, BATCH, None)
                    loss.sum.backward()
                    losses.append(float(loss.sum.detach()))
                local.sum_gradients()
                if abs(losses[0] - losses[1]) > 1e-9 * abs(losses[0]):
                    wrong.append(f"{changes}, {wanted}: loss {losses[1]} for {losses[0]}")
                for (name, mine), (_, theirs) in zip(
                    local.module.named_parameters(), whole.named_parameters(), strict=True
                ):
                    expected = 0.0 if theirs.grad is None else local.part(name, theirs.grad)
                    found = 0.0 if mine.grad is None else mine.grad
                    if float((torch.as_tensor(found) - expected).abs().max()) > 1e-9:
                        wrong.append(f"{changes}, {wanted}: {name}")
    return wrong


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_divided_matrices_are_cut_where_the_whole_ones_are(ranks):
    """A rank may be left with no neuron at all."""
    for wrong in run_ranks(ranks, differences, ranks):
        assert not wrong
