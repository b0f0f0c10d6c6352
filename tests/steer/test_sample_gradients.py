"""All samples' gradients in one pass are those of each sample alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from resilin.adapt.adapted import Adapted
from resilin.adapt.settings import AdapterSettings
from resilin.models.decoder_settings import MoESettings
from resilin.models.settings import ModelContext
from resilin.nouns import Batch, Loss
from resilin.objective.next_token import NextToken
from resilin.steer.sample_gradients import sample_gradients, trainable
from resilin.steer.token_losses import sample_losses

OBJECTIVE = NextToken().build()


def batch_of(rows: int = 5, T: int = 40, **more: Any) -> Batch:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 16, (rows, T), generator=generator)
    labels = torch.randint(0, 16, (rows, T), generator=generator)
    labels[1, 5:] = -100
    labels[2] = -100  # a sample without a single unit
    return Batch(torch.arange(rows), {"tokens": tokens, "labels": labels, **more})


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"tie_embeddings": True},
        {"qk_norm": "rms", "qkv_bias": True, "mlp_bias": True, "out_bias": True, "norm": "layer"},
        {"qk_norm": "layer", "logit_softcap": 3.0, "kv_heads": 1, "layers": 2, "gated": False},
        {"attention_backend": "eager", "sliding_window": 4},
    ],
    ids=["plain", "tied", "biases", "softcap", "eager"],
)
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_one_pass_gives_the_gradients_of_the_loop(kit: Any, more: dict[str, Any], reduce: Any) -> None:
    model = kit.tiny_model(**more)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    batch = batch_of()
    batched = sample_gradients(model, OBJECTIVE, batch, reduce=reduce, way="batched")
    loop = sample_gradients(model, OBJECTIVE, batch, reduce=reduce, way="loop")
    assert list(batched) == list(loop) == list(trainable(model))
    for name, expected in loop.items():
        assert batched[name].shape == (5, *dict(model.named_parameters())[name].shape)
        torch.testing.assert_close(batched[name], expected, rtol=1e-4, atol=1e-5)
        assert float(expected[0].abs().max()) > 0
        assert float(batched[name][2].abs().max()) == 0  # nothing to learn: no gradient


def test_the_mean_over_samples_is_the_gradient_of_the_mean(kit: Any) -> None:
    model, batch = kit.tiny_model(), batch_of()
    found = sample_gradients(model, OBJECTIVE, batch, reduce="sum")
    OBJECTIVE(model, batch, None).sum.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name].sum(0), parameter.grad, rtol=1e-4, atol=1e-4)


def test_only_trainable_parameters_are_asked_for(kit: Any) -> None:
    model = kit.tiny_model(layers=2)
    model.requires_grad_(False)
    model.blocks[1].attention.q.weight.requires_grad_(True)
    model.norm.weight.requires_grad_(True)
    found = sample_gradients(model, OBJECTIVE, batch_of(), way="batched")
    assert sorted(found) == ["blocks.1.attention.q.weight", "norm.weight"]
    torch.testing.assert_close(found, sample_gradients(model, OBJECTIVE, batch_of(), way="loop"))


def test_documents_stay_apart(kit: Any) -> None:
    documents = torch.zeros(5, 40, dtype=torch.int32)
    documents[:, 20:] = 1
    documents[3, 30:] = -1
    batch, model = batch_of(documents=documents), kit.tiny_model()
    torch.testing.assert_close(
        sample_gradients(model, OBJECTIVE, batch, way="batched"),
        sample_gradients(model, OBJECTIVE, batch, way="loop"),
        rtol=1e-4,
        atol=1e-6,
    )


class Scaled(torch.nn.Module):
    """A module with a parameter of its own that no special case knows."""

    def __init__(self, inner: torch.nn.Module, width: int) -> None:
        super().__init__()
        self.inner = inner
        self.scale = torch.nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.inner(x) * torch.tanh(self.scale)
        return y


@pytest.mark.slow  # torch.func imports all of torch.compile
def test_an_unknown_module_goes_through_its_own_pull_back(kit: Any) -> None:
    model = kit.tiny_model()
    model.blocks[0].mlp = Scaled(model.blocks[0].mlp, 16)
    batched = sample_gradients(model, OBJECTIVE, batch_of(), way="batched")
    loop = sample_gradients(model, OBJECTIVE, batch_of(), way="loop")
    torch.testing.assert_close(batched, loop, rtol=1e-4, atol=1e-6)
    assert float(batched["blocks.0.mlp.scale"].abs().max()) > 0


@pytest.mark.parametrize("method", ["miss", "bat_row", "lora", "dora"])
def test_adapters_alone_are_asked_for_in_one_pass(kit: Any, method: str) -> None:
    settings = kit.tiny_model().settings
    adapted = Adapted(model=settings, adapters={"default": AdapterSettings(method=method, rank=4)})
    model = adapted.build(ModelContext(0, None))
    for number, parameter in enumerate(model.parameters()):
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    batched = sample_gradients(model, OBJECTIVE, batch_of(), way="batched")
    loop = sample_gradients(model, OBJECTIVE, batch_of(), way="loop")
    assert all(".adapters.default." in name for name in batched)
    torch.testing.assert_close(batched, loop, rtol=1e-4, atol=1e-6)
    assert all(float(gradient[0].abs().max()) > 0 for gradient in batched.values())


def test_a_parameter_that_no_module_is_seen_to_use_is_named(kit: Any) -> None:
    model = kit.tiny_model()
    model.extra = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=r"parameter 'extra' is not used through a module; use way='loop'"):
        sample_gradients(model, OBJECTIVE, batch_of(), way="batched")
    assert float(sample_gradients(model, OBJECTIVE, batch_of())["extra"].abs().max()) == 0


def test_experts_fall_back_to_the_loop_and_say_so_when_asked(kit: Any) -> None:
    model = kit.tiny_model(moe=MoESettings(experts=4, expert_size=8))
    found = sample_gradients(model, OBJECTIVE, batch_of())
    torch.testing.assert_close(found, sample_gradients(model, OBJECTIVE, batch_of(), way="loop"))
    with pytest.raises(ValueError, match=r"does not see samples and tokens.*way='loop'"):
        sample_gradients(model, OBJECTIVE, batch_of(), way="batched")


class Squares:
    def __call__(self, model: Any, batch: Batch, keys: Any) -> Loss:
        hidden = model(batch["tokens"]).hidden_BTD
        return Loss(hidden.square().sum(), torch.tensor(float(hidden.shape[0] * 4)))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        return None


def test_any_other_objective_is_asked_sample_by_sample(kit: Any) -> None:
    model, batch = kit.tiny_model(), batch_of()
    found = sample_gradients(model, Squares(), batch)
    one = Squares()(model, batch.rows(3, 4), None)
    (expected,) = torch.autograd.grad(one.sum / one.units, [model.embed.weight])
    torch.testing.assert_close(found["embed.weight"][3], expected)
    losses = sample_losses(model, Squares(), batch)
    torch.testing.assert_close(losses[3], (one.sum / one.units).detach())


def test_sample_losses_are_the_objectives_own(kit: Any) -> None:
    model, batch = kit.tiny_model(), batch_of()
    losses = sample_losses(model, OBJECTIVE, batch)
    for row in (0, 1, 3):
        one = OBJECTIVE(model, batch.rows(row, row + 1), None)
        assert float(losses[row]) == pytest.approx(float(one.sum.detach() / one.units), rel=1e-5)
    assert float(losses[2]) == 0.0
