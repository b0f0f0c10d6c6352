from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from resilin.config import SettingsError, parse_settings
from resilin.keys import Keys
from resilin.nouns import Batch, Mean, Objective
from resilin.objective.next_token import NextToken

V, D, E, K = 11, 6, 4, 2


class Output(NamedTuple):
    hidden_BTD: Tensor
    router_logits: tuple[Tensor, ...] = ()


class Moe(NamedTuple):
    experts_per_token: int = K


class Options(NamedTuple):
    logit_softcap: float | None = None
    moe: Moe = Moe()


class Toy(nn.Module):
    """An embedding, a causal sum, routers that decide nothing, and a tied head: the decoder's interface."""

    def __init__(self, softcap: float | None = None, routers: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.settings = Options(softcap)
        self.embed = nn.Embedding(V, D, dtype=torch.float64)
        self.routers = nn.ModuleList(nn.Linear(D, E, bias=False, dtype=torch.float64) for _ in range(routers))

    @property
    def head_weight(self) -> Tensor:
        return self.embed.weight

    def logits(self, hidden: Tensor) -> Tensor:
        x, cap = hidden @ self.head_weight.T, self.settings.logit_softcap
        return x if cap is None else cap * torch.tanh(x / cap)

    def forward(
        self, tokens: Tensor, positions: Any = None, documents: Any = None, *, keys: Keys | None = None
    ) -> Output:
        hidden = self.embed(tokens).cumsum(1).tanh()
        return Output(hidden, tuple(router(hidden) for router in self.routers))


def make_batch(b: int, t: int, seed: int, masked: float = 0.3, weighted: bool = False) -> Batch:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(V, (b, t), generator=g)
    labels[torch.rand(b, t, generator=g) < masked] = -100
    fields = {"tokens": torch.randint(V, (b, t), generator=g), "labels": labels}
    documents = torch.zeros(b, t, dtype=torch.int32)
    documents[:, t - 1 :] = -1
    fields["documents"] = documents
    if weighted:
        fields["weights"] = torch.rand(b, t, generator=g, dtype=torch.float64)
    return Batch(torch.arange(b), fields)


def gradient(model: Toy, objective: Objective, *parts: Batch) -> tuple[list[Tensor], float, float]:
    model.zero_grad()
    total = units = 0.0
    for part in parts:
        loss = objective(model, part, None)
        loss.sum.backward()
        total, units = total + float(loss.sum.detach()), units + float(loss.units)
    return [p.grad.clone() for p in model.parameters() if p.grad is not None], total, units


@settings(deadline=None, max_examples=40)
@given(
    b=st.integers(1, 6),
    cuts=st.sets(st.integers(1, 5)),
    chunk=st.sampled_from([None, 0, 1, 3]),
    smoothing=st.sampled_from([0.0, 0.2]),
    weighted=st.booleans(),
    routers=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_any_split_into_micro_batches_gives_the_same_gradient(
    b: int, cuts: set[int], chunk: int | None, smoothing: float, weighted: bool, routers: int, seed: int
) -> None:
    batch = make_batch(b, 5, seed, weighted=weighted)
    model = Toy(routers=routers)
    tree = {"label_smoothing": smoothing, "z_loss": 1e-2, "load_balance": 0.5, "router_z_loss": 0.1}
    objective = NextToken(**tree, chunk=chunk).build()
    edges = [0, *sorted(c for c in cuts if c < b), b]
    parts = [batch.rows(i, j) for i, j in pairwise(edges)]
    whole, split = gradient(model, objective, batch), gradient(model, objective, *parts)
    assert whole[1:] == pytest.approx(split[1:], rel=1e-6)  # router losses are reduced in float32
    for a, c in zip(whole[0], split[0], strict=True):
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-6)


def test_the_micro_batch_form_of_load_balance_does_depend_on_the_split() -> None:
    batch, model = make_batch(4, 5, 0), Toy(routers=1)
    objective = NextToken(load_balance=0.5, load_balance_over="micro_batch").build()
    whole, split = gradient(model, objective, batch), gradient(model, objective, batch.rows(0, 2), batch.rows(2, 4))
    assert whole[1] != pytest.approx(split[1], rel=1e-4)


def test_sum_and_units_are_those_of_plain_cross_entropy() -> None:
    batch, model = make_batch(3, 7, 1), Toy()
    logits = model.logits(model(batch["tokens"]).hidden_BTD).detach()
    expected = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
    for chunk in (None, 0, 4):
        loss = NextToken(chunk=chunk).build()(model, batch, None)
        torch.testing.assert_close(loss.sum.detach(), expected)
        assert int(loss.units) == int((batch["labels"] != -100).sum())


@pytest.mark.parametrize("softcap", [None, 0.7])
def test_the_chunked_form_applies_the_model_s_soft_cap(softcap: float | None) -> None:
    batch, model = make_batch(3, 7, 1), Toy(softcap)
    chunked, whole = (NextToken(chunk=c).build()(model, batch, None) for c in (None, 0))
    torch.testing.assert_close(chunked.sum, whole.sum)


def test_logs_are_plain_whatever_is_added_to_the_loss() -> None:
    batch, model = make_batch(3, 7, 2), Toy()
    logits = model.logits(model(batch["tokens"]).hidden_BTD).detach().flatten(0, 1)
    labels = batch["labels"].flatten()
    kept = labels != -100
    log_z = torch.logsumexp(logits, -1)[kept]
    loss = NextToken(label_smoothing=0.3, z_loss=0.1).build()(model, batch, None)
    values = {name: log.value() for name, log in loss.logs.items()}
    assert values == pytest.approx(
        {
            "nll": float(F.cross_entropy(logits, labels)),
            "accuracy": float((logits.argmax(-1) == labels)[kept].double().mean()),
            "log_z": float(log_z.mean()),
            "z_loss": 0.1 * float((log_z**2).mean()),
        }
    )
    assert all(isinstance(log, Mean) and not log.sum.requires_grad for log in loss.logs.values())


def test_a_weight_of_zero_is_the_same_as_a_masked_label() -> None:
    batch, model, objective = make_batch(4, 6, 3, masked=0.0), Toy(), NextToken().build()
    drop = torch.rand(4, 6, generator=torch.Generator().manual_seed(5)) < 0.5
    masked = Batch(batch.slots_B, {**batch.fields, "labels": batch["labels"].masked_fill(drop, -100)})
    weighted = Batch(batch.slots_B, {**batch.fields, "weights": (~drop).double()})
    a, b = gradient(model, objective, masked), gradient(model, objective, weighted)
    assert a[1:] == pytest.approx(b[1:], rel=1e-12)
    torch.testing.assert_close(a[0], b[0])


def test_multiplying_all_weights_leaves_the_mean_unchanged() -> None:
    batch, model, objective = make_batch(4, 6, 3, weighted=True), Toy(), NextToken(z_loss=1e-3).build()
    scaled = Batch(batch.slots_B, {**batch.fields, "weights": 7 * batch["weights"]})
    _, total, units = gradient(model, objective, batch)
    _, total7, units7 = gradient(model, objective, scaled)
    assert total7 / units7 == pytest.approx(total / units)


def test_masked_positions_never_reach_the_head() -> None:
    batch, model = make_batch(4, 50, 4, masked=0.9), Toy()
    rows: list[int] = []
    model.logits = lambda hidden: rows.append(len(hidden)) or hidden @ model.head_weight.T  # type: ignore
    NextToken(chunk=0).build()(model, batch, None)
    assert rows == [int((batch["labels"] != -100).sum())]


@pytest.mark.parametrize("chunk", [None, 0])
def test_a_fully_masked_micro_batch_adds_nothing_and_can_still_be_differentiated(chunk: int | None) -> None:
    batch, model = make_batch(2, 5, 0, masked=1.1), Toy(routers=1)
    grads, total, units = gradient(model, NextToken(chunk=chunk).build(), batch)
    assert total == 0
    assert units == 0
    assert not any(g.any() for g in grads)


def test_a_model_that_returns_logits_can_be_trained_too() -> None:
    class Logits(Toy):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
            return self.logits(super().forward(*args, **kwargs).hidden_BTD)

    batch, objective = make_batch(3, 5, 0), NextToken(z_loss=1e-3, label_smoothing=0.1).build()
    a, b = gradient(Toy(), objective, batch), gradient(Logits(), objective, batch)
    torch.testing.assert_close(a[0], b[0])
    assert a[1] == pytest.approx(b[1])


def test_keys_reach_the_model() -> None:
    seen: list[Keys | None] = []

    class Watcher(Toy):
        def forward(self, tokens: Tensor, *rest: Any, keys: Keys | None = None) -> Output:
            seen.append(keys)
            return super().forward(tokens, *rest)

    batch, keys = make_batch(2, 5, 0), Keys(0, 3, torch.arange(2))
    NextToken().build()(Watcher(), batch, keys)
    NextToken().build()(Watcher(), batch, None)
    assert seen == [keys, None]


def test_a_gradient_penalty_can_be_trained_with_whole_logits() -> None:
    batch, model = make_batch(2, 5, 0), Toy()
    loss = NextToken(chunk=0).build()(model, batch, None).sum
    (grad,) = torch.autograd.grad(loss, model.embed.weight, create_graph=True)
    grad.square().sum().backward()
    assert model.embed.weight.grad is not None
    assert model.embed.weight.grad.any()


@pytest.mark.parametrize(
    ("key", "value"), [("label_smoothing", 1.0), ("z_loss", -1.0), ("chunk", -1), ("load_balance_over", "batch")]
)
def test_settings_out_of_range_are_named_when_they_load(key: str, value: Any) -> None:
    with pytest.raises(SettingsError, match=key):
        parse_settings(NextToken, {key: value}, "x.toml")


def test_the_objective_is_the_noun_and_has_no_state() -> None:
    objective = NextToken().build()
    assert isinstance(objective, Objective)
    assert objective.state_dict() == {}
    objective.load_state_dict({})
