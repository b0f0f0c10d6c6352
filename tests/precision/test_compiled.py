"""Compiling changes speed and nothing else."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.utils
from torch import nn

from resilin.keys import Keys
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.settings import ModelContext
from resilin.nouns import Batch
from resilin.objective.next_token import NextToken
from resilin.precision.compiled import compile_model


@pytest.mark.slow
def test_compiled_blocks_give_the_same_loss_and_gradients() -> None:
    settings = DecoderSettings(vocab_size=32, hidden_size=16, layers=3, heads=2, mlp_size=24)
    plain, compiled = (settings.build(ModelContext(1)) for _ in range(2))
    assert compile_model(compiled, "blocks", "default") is None
    tokens = torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(0))
    batch = Batch(torch.arange(2), {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]})
    objective = NextToken().build()
    losses = []
    for model in (plain, compiled):
        loss = objective(model, batch, Keys(0, 0, batch.slots_B))
        loss.sum.backward()
        losses.append(loss.sum.detach())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    for (name, mine), (_, other) in zip(compiled.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_alike_blocks_are_compiled_once_whatever_the_depth_and_the_step() -> None:
    graphs = []
    for layers in (1, 3):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = DecoderSettings(vocab_size=32, hidden_size=16, layers=layers, heads=2, mlp_size=24, dropout=0.1).build(
            ModelContext(1)
        )
        compile_model(model, "blocks", "default", "aot_eager")
        tokens = torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(0))
        batch = Batch(torch.arange(2), {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]})
        for step in range(3):
            NextToken().build()(model, batch, Keys(0, step, batch.slots_B)).sum.backward()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] > 0


def test_a_model_without_blocks_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="Linear has none: use true"):
        compile_model(nn.Linear(2, 2), "blocks", "default")


def test_nothing_is_compiled_unless_asked() -> None:
    model = nn.Linear(2, 2)
    assert compile_model(model, False, "default") is None
    assert compile_model(model, True, "default") is not None
