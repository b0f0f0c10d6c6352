"""Losses of chains: what each scale learns, from one forward pass, and which chains it moves."""

from __future__ import annotations

import pytest
import torch
from chain_cases import chain_decoder, chain_settings
from pydantic import ValidationError
from split_steps import batch_of, check_micro_batches, check_two_workers, keys_at
from torch import nn

from resilin.config import UserError
from resilin.models.settings import ModelContext
from resilin.nested import Budget, BudgetError, budget
from resilin.nested.chain_models import ChainTuned
from resilin.nested.chain_objective import ChainLosses
from resilin.nested.chain_record import ChainRecord
from resilin.objective.next_token import NextToken
from resilin.optim.adamw import AdamW
from resilin.optim.muon import Muon
from resilin.optim.mup import learning_rate_scales

BATCH = batch_of(range(4))


def gradients(model, objective, keys=None):
    model.zero_grad(set_to_none=True)
    loss = objective(model, BATCH, keys)
    loss.sum.backward()
    return loss, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("weights", [(), (0.5, 2.0, 1.0), (1.0, 0.0, 0.0)])
@pytest.mark.parametrize("more", [{}, {"share_keys": True}, {"tie_embeddings": True}, {"dropout": 0.3}], ids=str)
def test_one_pass_gives_the_losses_of_all_scales(weights, more):
    """The sum and its gradients are those of the scales computed one by one, each from the tokens."""
    model = chain_decoder(chain_settings(**more))
    loss, found = gradients(model, ChainLosses(weights=weights).build(), keys_at(2))
    model.zero_grad(set_to_none=True)
    total = torch.zeros((), dtype=torch.float64)
    for chains, weight in enumerate(weights or (1.0, 1.0, 1.0), 1):
        with budget(model, Budget(chains=chains)):
            one = NextToken().build()(model, BATCH, keys_at(2))
        (weight * one.sum).backward()
        total = total + weight * one.sum.detach()
        assert loss.logs[f"loss_at_{chains}"].sum.item() == pytest.approx(one.sum.item())
    assert loss.sum.item() == pytest.approx(total.item())
    for name, parameter in model.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        got = torch.zeros_like(parameter) if found[name] is None else found[name]
        torch.testing.assert_close(got, expected, msg=name)


def test_the_model_is_called_once_a_batch():
    model, calls = chain_decoder(chain_settings()), []
    model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    ChainLosses().build()(model, BATCH, keys_at(0))
    ChainLosses().build()(model, BATCH, None)
    assert len(calls) == 2


def test_the_last_scale_alone_is_ordinary_training():
    model = chain_decoder(chain_settings())
    loss, mine = gradients(model, ChainLosses(loss="last").build(), keys_at(1))
    plain, theirs = gradients(model, NextToken().build(), keys_at(1))
    assert torch.equal(loss.sum, plain.sum)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert set(loss.logs) - set(plain.logs) == {"loss_at_3"}


def test_held_out_data_are_read_at_every_scale():
    model = chain_decoder(chain_settings())
    for chosen in (ChainLosses(), ChainLosses(loss="last")):
        loss = chosen.build()(model, BATCH, None)
        assert {"loss_at_1", "loss_at_2", "loss_at_3"} <= set(loss.logs)
        assert loss.sum.item() == pytest.approx(NextToken().build()(model, BATCH, None).sum.item())
    alone = ChainLosses(evaluate_all=False).build()(model, BATCH, None)
    assert "loss_at_1" not in alone.logs


def test_a_scale_of_weight_zero_moves_no_later_chain():
    model = chain_decoder(chain_settings())
    _, found = gradients(model, ChainLosses(weights=(1.0, 0.0, 0.0)).build(), keys_at(0))
    for name, gradient in found.items():
        assert (".chains.0." in name) == (gradient is not None and bool(gradient.any())), name


@pytest.mark.parametrize("trained", ["all", "head"])
@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_what_is_frozen_stays_to_the_bit_and_what_is_not_moves(frozen, trained):
    """Weight decay, clipping and momentum touch no frozen chain; its scales give the same bits as before."""
    chosen = chain_settings(chains={"sizes": (2, 2, 4), "frozen": frozen, "trained": trained})
    model = chain_decoder(chosen, torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with budget(model, Budget(chains=max(frozen, 1))), torch.no_grad():
        states = model(BATCH["tokens"]).hidden_BTD.clone()
    optimizer = AdamW(lr=0.05, weight_decay=0.5).build(model, 3)
    for step in range(3):
        optimizer.zero_grad()
        ChainLosses().build()(model, BATCH, keys_at(step)).sum.backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.1)
        optimizer.step(step)
    for name, parameter in model.named_parameters():
        chain = int(name.partition(".chains.")[2].partition(".")[0])
        moves = chain >= frozen and (trained == "all" or name.startswith("head."))
        assert torch.equal(parameter, before[name]) != moves, name
        assert parameter.requires_grad == moves
    if frozen or trained == "head":
        with budget(model, Budget(chains=max(frozen, 1))), torch.no_grad():
            assert torch.equal(model(BATCH["tokens"]).hidden_BTD, states)


def test_teaching_the_head_alone_makes_gradients_of_nothing_else():
    model = chain_decoder(chain_settings(chains={"sizes": (2, 2, 4), "trained": "head"}))
    _, found = gradients(model, ChainLosses().build(), keys_at(0))
    assert {name for name, gradient in found.items() if gradient is not None} == {
        f"head.chains.{chain}.weight" for chain in range(3)
    }


def test_chains_of_a_model_that_exists_can_be_frozen():
    tree = chain_settings().model_dump()
    model = ChainTuned(model=tree, frozen=1).build(ModelContext(0, 37))
    assert model.settings.chains.frozen == 1
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {
        name for name, _ in model.named_parameters() if ".chains.0." in name
    }
    outline = ChainTuned(model=tree, trained="head").outline(ModelContext(0, 37))
    assert {name.partition(".")[0] for name, p in outline.named_parameters() if p.requires_grad} == {"head"}
    with pytest.raises(BudgetError, match="3 of 3 chains"):
        ChainTuned(model=tree, frozen=3).build(ModelContext(0, 37))
    with pytest.raises(BudgetError, match="expand it first"):
        ChainTuned(model={"heads": 4}).build(ModelContext(0, 37))


def test_micro_batches_and_workers_change_nothing():
    chosen = chain_settings(dropout=0.2)
    check_micro_batches(lambda: chain_decoder(chosen), ChainLosses().build())


@pytest.mark.slow
def test_two_workers_have_the_bits_of_one():
    check_two_workers(chain_settings(), ChainLosses(), 3)


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValidationError, match="weights are for loss = 'multi'"):
        ChainLosses(loss="last", weights=(1.0,))
    with pytest.raises(ValidationError, match="all 0"):
        ChainLosses(weights=(0.0, 0.0))
    with pytest.raises(UserError, match="2 entries for 3 chains"):
        ChainLosses(weights=(1.0, 1.0)).build()(chain_decoder(chain_settings()), BATCH, None)
    plain = chain_decoder(chain_settings().model_copy(update={"chains": None}))
    with pytest.raises(UserError, match=r"set model\.chains\.sizes"):
        ChainLosses().build()(plain, BATCH, None)
    model = chain_decoder(chain_settings())
    with budget(model, Budget(chains=2)), pytest.raises(BudgetError, match="inside a budget of fewer chains"):
        ChainLosses().build()(model, BATCH, None)


def test_a_record_tells_which_scales_were_trained():
    chosen = chain_settings()
    both = ChainRecord.of(ChainLosses(weights=(1.0, 0.0, 1.0)), 3)
    names = [name for name, _ in both.rungs(chosen)]
    kinds = [both.kind(chosen, wanted) for _, wanted in both.rungs(chosen)]
    assert list(zip(names, kinds, strict=True)) == [
        ("1 chain", "trained"), ("2 chains", "untrained"), ("3 chains", "trained"),
    ]  # fmt: skip
    last = ChainRecord.of(ChainLosses(loss="last"), 3)
    assert [last.kind(chosen, wanted) for _, wanted in last.rungs(chosen)] == ["untrained", "untrained", "trained"]
    assert both.kind(chosen, Budget(chains=1, skip=(0,))) == "untrained"


def test_learning_rates_by_width_are_refused():
    with pytest.raises(ValueError, match=r"mup_base_width is not defined for chains"):
        learning_rate_scales(chain_decoder(chain_settings()), 8)


def test_muon_moves_neither_embedding_nor_head_of_any_chain():
    model = chain_decoder(chain_settings(), torch.float32)
    taken = Muon().takes(model)
    matrices = {name for name, p in model.named_parameters() if p.ndim == 2}
    assert matrices - taken == {f"{end}.chains.{chain}.weight" for end in ("embed", "head") for chain in range(3)}
