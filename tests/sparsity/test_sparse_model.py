"""The model: which layers are masked, the straight-through gradient, SLoRB, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from resilin.config import SettingsError, parse_settings
from resilin.keys import Keys
from resilin.models.decoder import Decoder
from resilin.models.linear import Linear
from resilin.models.original import make_original
from resilin.models.plain import make_plain
from resilin.models.settings import ModelContext
from resilin.nouns import Batch
from resilin.objective.next_token import NextToken
from resilin.sparsity.linear import SparseLinear
from resilin.sparsity.low_rank import LowRankBoost, pooled, pooling_matrix
from resilin.sparsity.masks import sparse_layers
from resilin.sparsity.settings import Sparse, SparsityError
from resilin.sparsity.straight_through import masked


def layer(outputs: int = 6, inputs: int = 16, **fields: Any) -> SparseLinear:
    linear = Linear(inputs, outputs, dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        linear.weight.normal_(generator=generator)
        linear.bias.normal_(generator=generator)
    return SparseLinear(linear, **fields)


def batch() -> Batch:
    tokens_BT = torch.arange(24).view(2, 12) * 5 % 32
    return Batch(torch.arange(2), {"tokens": tokens_BT, "labels": tokens_BT.roll(-1, 1)})


def test_all_block_layers_and_nothing_else_are_masked_and_names_stay(sparse_model: Any) -> None:
    model, dense = sparse_model(), sparse_model(update_every=0)
    names = {name for name, _ in sparse_layers(model)}
    of_block = ["attention.q", "attention.k", "attention.v", "attention.o", "mlp.gate", "mlp.up", "mlp.down"]
    assert names == {f"blocks.{layer}.{name}" for layer in (0, 1) for name in of_block}
    assert isinstance(model, Decoder)
    assert not isinstance(model.head, SparseLinear)
    plain = parse_settings(Sparse, {"model": model.settings.model_dump()}, "x").model.build(ModelContext(0, None))
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert "blocks.0.attention.q.first_mask" not in dense.state_dict()


def test_every_group_of_four_of_the_plain_model_has_two_weights(sparse_model: Any) -> None:
    model = sparse_model()
    layers = [name for name, _ in sparse_layers(model)]
    plain = make_plain(model)
    for name in layers:
        linear = plain.get_submodule(name)
        assert type(linear) is Linear
        assert ((linear.weight != 0).view(linear.out_features, -1, 4).sum(-1) == 2).all()
        assert not torch.signbit(linear.weight[linear.weight == 0]).any()


def test_the_gradient_of_the_weight_is_that_of_a_free_effective_weight() -> None:
    sparse = layer()
    x = torch.randn(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sparse(x).square().sum().backward()
    free = sparse.effective_weight().detach().requires_grad_()
    nn.functional.linear(x, free, sparse.bias).square().sum().backward()
    assert torch.equal(sparse.weight.grad, free.grad)
    assert (sparse.weight.grad[~sparse.mask] != 0).all()


def test_the_straight_gradient_holds_per_sample_too() -> None:
    weight, mask = torch.randn(3, 4), torch.tensor([True, False, True, False]).expand(3, 4)
    x = torch.randn(5, 4)
    grads = torch.func.vmap(
        torch.func.grad(lambda w, m, row: (masked(w, m) @ row).square().sum()), in_dims=(None, None, 0)
    )(weight, mask, x)
    for row, grad in zip(x, grads, strict=True):
        expected = 2 * torch.outer((weight * mask) @ row, row)
        torch.testing.assert_close(grad, expected)


def test_masked_forward_is_the_plain_one_and_the_original_the_dense_one(sparse_model: Any) -> None:
    tokens = batch()["tokens"]
    model = sparse_model(slorb={"k": 8, "train_pooling": True})
    with torch.no_grad():
        found = model(tokens).hidden_BTD
        plain = make_plain(sparse_model(slorb={"k": 8, "train_pooling": True}))
        torch.testing.assert_close(plain(tokens).hidden_BTD, found)
        without = make_plain(sparse_model())
        assert torch.equal(without(tokens).hidden_BTD, sparse_model()(tokens).hidden_BTD)
        dense = make_original(sparse_model(slorb={"k": 8}))
        whole = sparse_model(n=4, update_every=0)  # keeps all
        assert torch.equal(dense(tokens).hidden_BTD, whole(tokens).hidden_BTD)
        assert not torch.equal(dense(tokens).hidden_BTD, found)
    assert not list(sparse_layers(dense))


@pytest.mark.parametrize("train_pooling", [False, True])
def test_the_mean_correction_keeps_each_group_s_mean_weight_and_is_exact_on_equal_inputs(train_pooling: bool) -> None:
    sparse = layer(boost=LowRankBoost(k=8, train_pooling=train_pooling))
    matrices = sparse.correction_matrices()
    assert matrices is not None
    effective = sparse.effective_weight() + matrices[0] @ matrices[1]
    difference = effective.view(6, 2, 8).mean(-1) - sparse.weight.view(6, 2, 8).mean(-1)
    assert difference.abs().max() < 1e-12
    x = torch.tensor([2.5, -1.25], dtype=torch.float64).repeat_interleave(8)
    dense = nn.functional.linear(x, sparse.weight, sparse.bias)
    assert (sparse(x) - dense).abs().max() < 1e-12
    bare = layer()
    assert (bare(x) - dense).abs().max() > 0.1
    assert sparse.correction.numel() == 6 * 16 // 8


def test_inits_of_the_correction() -> None:
    by_mean = layer(boost=LowRankBoost(k=4)).correction
    by_sum = layer(boost=LowRankBoost(k=4, init="sum")).correction
    torch.testing.assert_close(by_sum, 4 * by_mean)
    zero = layer(boost=LowRankBoost(k=4, init="zero"))
    x = torch.randn(3, 16, dtype=torch.float64)
    assert torch.equal(zero(x), layer()(x))
    drawn = [
        layer(boost=LowRankBoost(k=4, init="xavier", train_pooling=True), keys=Keys.of_step(seed, 0))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(drawn[0].pooling, drawn[1].pooling)
    assert not torch.equal(drawn[0].pooling, drawn[2].pooling)
    assert drawn[0].pooling.abs().max() <= (6 / 20) ** 0.5
    assert not drawn[0].correction.any()


def test_the_sum_over_groups_is_the_product_with_the_pooling_matrix() -> None:
    x = torch.randn(3, 5, 24, dtype=torch.float64)
    torch.testing.assert_close(pooled(x, 6), x @ pooling_matrix(24, 6).double().t())


def test_unstructured_keeps_the_larger_half_of_each_row(sparse_model: Any) -> None:
    for _, sparse in sparse_layers(sparse_model(density=0.5)):
        assert (sparse.mask.sum(1) == sparse.in_features // 2).all()
        kept = sparse.weight.abs().masked_fill(~sparse.mask, torch.inf).amin(1)
        gone = sparse.weight.abs().masked_fill(sparse.mask, 0).amax(1)
        assert (kept >= gone).all()


def test_inputs_that_m_does_not_divide(sparse_model: Any) -> None:
    with pytest.raises(
        SparsityError,
        match=r"blocks\.0\.attention\.q has 16 inputs, which m = 5 does not divide: 2:4 fits all layers; or .*'pad'",
    ):
        sparse_model(m=5)
    with pytest.raises(SparsityError, match=r"m = 12 does not divide: 6:8 fits all layers"):
        sparse_model(n=6, m=12)
    with pytest.raises(SparsityError, match=r"m = 20 does not divide: set remainder"):  # of 16 inputs none holds 17
        sparse_model(n=17, m=20)
    padded = dict(sparse_layers(sparse_model(m=5, remainder="pad")))["blocks.0.attention.q"]
    assert (padded.mask[:, :15].view(16, 3, 5).sum(-1) == 2).all()
    assert padded.mask[:, 15:].all()
    model = sparse_model(m=32, n=16, remainder="dense")
    assert {name.split(".")[-1] for name, _ in sparse_layers(model)} == {"down"}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"n": 5}, r"n \(5\) is larger than m \(4\).*use n = 1 to 4"),
        ({"slorb": {"init": "xavier"}}, "set train_pooling = true"),
        ({"density": 0}, "density"),
        ({"sloRB": {}}, "did you mean 'slorb'"),
    ],
)
def test_settings_that_make_no_sense_are_refused_when_they_load(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        parse_settings(Sparse, fields, "x.toml")


def test_models_that_do_not_fit_are_refused(sparse_model: Any) -> None:
    with pytest.raises(SparsityError, match=r"slorb\.k \(12\) does not divide the 16 inputs of .*: use 8 or 16"):
        sparse_model(slorb={"k": 12})
    with pytest.raises(SparsityError, match=r"match no linear layer.*names look like blocks\.0\.attention\.q"):
        sparse_model(targets=["layers.*"])
    with pytest.raises(SparsityError, match="has masks already"):
        sparse_model(model={"use": "resilin.sparsity.settings:Sparse", "model": {"vocab_size": 32}})


def test_another_split_into_micro_batches_gives_the_same_gradient(sparse_model: Any) -> None:
    grads = []
    for pieces in ([(0, 2)], [(0, 1), (1, 2)]):
        model = sparse_model(dtype=torch.float64, slorb={"k": 8})
        for start, stop in pieces:
            NextToken(chunk=0).build()(model, batch().rows(start, stop), None).sum.backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
