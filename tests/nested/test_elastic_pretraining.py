"""Elastic pre-training: exact properties of what a step computes, and of what is taken out afterwards."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from resilin.keys import Keys
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings, MoESettings
from resilin.models.moe import MoE
from resilin.nested import Budget, BudgetError, budget, extract, sub_model
from resilin.nested.deploy import deployable, layer_plans
from resilin.nested.elastic_pretraining import ElasticPretraining, elastic_in
from resilin.nested.elastic_record import ElasticRecord
from resilin.nested.expert_loads import expert_loads, stacked
from resilin.nested.expert_use import most_used
from resilin.nested.family import members_of
from resilin.nouns import Batch
from resilin.objective.next_token import NextToken

NEXT = {"load_balance": 0.0, "router_z_loss": 0.0}
OFF = {name: {"probability": 0.0} for name in ("depth", "width", "sparsity")}
ON = {name: {"probability": 1.0} for name in ("depth", "width", "sparsity")}


def settings(**moe) -> DecoderSettings:
    told = {"experts": 8, "experts_per_token": 4, "expert_size": 6, "balance": "bias"} | moe
    return DecoderSettings(
        vocab_size=40, hidden_size=16, layers=4, heads=2, moe=MoESettings(**told), init_std=0.4, max_positions=32
    )


def decoder(**moe) -> Decoder:
    model = Decoder(settings(**moe), seed=1).double()
    with torch.no_grad():
        for block in model.blocks:
            if block.moe.settings.balance == "bias":
                block.moe.balance_bias.normal_(std=0.05, generator=torch.Generator().manual_seed(block.layer))
    return model


def batch(rows: int = 4) -> Batch:
    tokens = torch.randint(0, 40, (rows, 11), generator=torch.Generator().manual_seed(3))
    return Batch(torch.arange(rows), {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]})


def keys(step: int) -> Keys:
    return Keys(5, step, torch.arange(4))


def gradients(model: Decoder, objective, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    model.zero_grad(set_to_none=True)
    loss = objective(model, batch(), keys(step))
    loss.sum.backward()
    return loss.sum.detach(), {name: p.grad for name, p in model.named_parameters()}


def elastic(**told):
    return ElasticPretraining(objective=NEXT, **told)


def test_without_reductions_it_is_plain_training_to_the_bit():
    model = decoder()
    mine = gradients(model, elastic(**OFF).build(), 3)
    theirs = gradients(model, NextToken(**NEXT).build(), 3)
    assert torch.equal(mine[0], theirs[0])
    for name, grad in theirs[1].items():
        assert (grad is None and mine[1][name] is None) or torch.equal(grad, mine[1][name])


def test_a_full_step_of_an_elastic_run_is_a_plain_one_to_the_bit():
    model, objective = decoder(), elastic().build()
    full = next(step for step in range(50) if objective.drawn_at(5, step, model.settings).full)
    assert torch.equal(gradients(model, objective, full)[0], gradients(model, NextToken(**NEXT).build(), full)[0])


@pytest.mark.parametrize("moe", [{}, {"routing": "sigmoid_topk"}, {"routing": "topk_softmax", "balance": "none"}])
def test_a_step_is_what_the_extracted_model_computes_and_has_no_gradient_elsewhere(moe):
    model, objective = decoder(**moe), elastic(**ON).build()
    for step in range(6):
        wanted = objective.drawn_at(5, step, model.settings)
        loss, grads = gradients(model, objective, step)
        small = extract(model, wanted)
        theirs = NextToken(**NEXT).build()(small, batch(), None).sum.detach()
        assert float(loss) == pytest.approx(float(theirs), rel=1e-9)
        kept = {one.layer: one for one in sub_model(model.settings, wanted).layers}
        for layer in range(4):
            for name, grad in grads.items():
                if not name.startswith(f"blocks.{layer}."):
                    continue
                if layer not in kept:
                    assert grad is None or not bool(grad.any())
                elif ".moe." in name:
                    absent = [e for e in range(8) if e not in kept[layer].experts]
                    assert absent
                    assert grad is not None
                    assert not bool(grad[absent].any()), name
        for layer, part in kept.items():  # the gate of a single choice is 1, whatever the router says
            assert part.top_k == 1 or bool(grads[f"blocks.{layer}.moe.router.weight"].any())


@pytest.mark.parametrize("moe", [{}, {"routing": "sigmoid_topk"}, {"routing": "topk_softmax", "balance": "none"}])
def test_absent_experts_are_those_whose_scores_are_minus_infinity_before_anything(moe):
    """Softmax, selection and gates come after; the gates of those that are left sum to 1."""
    model = decoder(**moe)
    mixture: MoE = model.blocks[0].moe
    kept, absent = (1, 2, 4, 6, 7), (0, 3, 5)
    x = torch.randn(9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    logits = mixture.router(x).detach()
    logits[:, absent] = -torch.inf
    routing = model.settings.moe.routing
    affinity = {"softmax_topk": lambda s: s.softmax(-1), "sigmoid_topk": torch.sigmoid, "topk_softmax": lambda s: s}
    score = affinity[routing](logits)
    preferred = score + (mixture.balance_bias.detach() if model.settings.moe.balance == "bias" else 0.0)
    preferred[:, absent] = -torch.inf
    chosen = preferred.topk(3).indices
    gates = score.gather(-1, chosen)
    gates = gates.softmax(-1) if routing == "topk_softmax" else gates / gates.sum(-1, keepdim=True)
    torch.testing.assert_close(gates.sum(-1), torch.ones(9, dtype=torch.float64))
    experts = mixture.experts
    expected = torch.zeros_like(x)
    for row in range(9):
        for gate, number in zip(gates[row], chosen[row], strict=True):
            hidden = torch.nn.functional.silu(experts.gate[number] @ x[row]) * (experts.up[number] @ x[row])
            expected[row] += gate * (experts.down[number] @ hidden)
    from resilin.nested.regions import cut_for

    cut = cut_for(model.settings, Budget(experts=(kept, 8, 8, 8), top_k=3)).blocks[0]
    torch.testing.assert_close(mixture(x[None], cut)[0][0], expected)


def test_absent_experts_are_not_counted_in_the_mean_load_and_do_not_move():
    model, wanted = decoder(), Budget(experts=((0, 2, 3, 7), None, None, None), top_k=(2, None, None, None))
    loads = stacked(expert_loads(model, [batch()], wanted))[0]
    assert loads[[1, 4, 5, 6]].tolist() == [0] * 4
    assert int(loads.sum()) == 40 * 2
    with budget(model, wanted):
        NextToken(**NEXT).build()(model, batch(), None).sum.backward()
    grad = model.blocks[0].moe.balance_bias.grad
    kept = [0, 2, 3, 7]
    assert torch.sign(grad[kept]).tolist() == torch.sign(loads[kept] - loads[kept].double().mean()).tolist()
    assert not bool(grad[[1, 4, 5, 6]].any())


def test_held_out_data_is_read_at_each_budget():
    model, texts = decoder(), ("top_k=1", "experts=4", "skip=1", "experts=4,skip=1,top_k=1")
    loss = elastic(evaluated=texts).build()(model, batch(), None)
    assert torch.equal(loss.sum, NextToken(**NEXT).build()(model, batch(), None).sum)
    for text in texts:
        with budget(model, Budget.parse(text)):
            alone = NextToken(**NEXT).build()(model, batch(), None)
        assert loss.logs[f"loss_at_{text}"].value() == float(alone.sum) / float(alone.units)


def test_the_sizes_of_a_step_are_logged():
    model, objective = decoder(), elastic(**ON).build()
    part = sub_model(model.settings, objective.drawn_at(5, 0, model.settings)).layers
    logs = objective(model, batch(), keys(0)).logs
    assert logs["layers"].value() == len(part)
    assert (logs["experts"].value(), logs["top_k"].value()) == (4, part[0].top_k)


@pytest.mark.parametrize("evaluated", [["fulls"], ["experts=x"], ["widht=3"]])
def test_budgets_that_are_none_are_refused(evaluated):
    with pytest.raises(ValidationError):
        elastic(evaluated=evaluated)


def test_what_does_not_fit_is_refused_before_anything_is_computed():
    with pytest.raises(BudgetError, match="the model has none"):
        elastic().build().check(Decoder(settings().model_copy(update={"moe": None})))
    with pytest.raises(BudgetError, match="use at most 8"):
        elastic(evaluated=["experts=9"]).build().check(decoder())


def test_it_is_found_inside_other_objectives():
    inner = elastic()
    assert elastic_in(inner) is inner
    assert elastic_in(NextToken()) is None


def test_the_family_of_an_elastic_run():
    told = settings()
    record = ElasticRecord.of(elastic())
    rungs = record.rungs(told)
    assert rungs[-1] == ("full", Budget())
    assert [b for _, b in rungs] == [
        Budget(skip=(1, 2), experts=4, top_k=1),
        Budget(skip=(1,), experts=4, top_k=1),
        Budget(experts=4, top_k=1),
        Budget(top_k=1),
        Budget(top_k=2),
        Budget(),
    ]
    members = members_of(told, record)
    assert {one.kind for one in members} == {"trained"}
    assert {Budget(experts=4), Budget(skip=(1,)), Budget(skip=(1, 2))} <= {one.wanted for one in members}
    objective = elastic(**ON).build()
    assert all(record.kind(told, objective.drawn_at(0, step, told)) == "trained" for step in range(50))


@pytest.mark.parametrize(
    "wanted",
    [
        Budget(ffn=3),
        Budget(heads=1),
        Budget(hidden=8),
        Budget(skip=(0,)),
        Budget(experts=3),
        Budget(experts=(4, None, None, None)),
        Budget(top_k=(1, 2, 2, 2)),
    ],
)
def test_what_no_step_computes_is_untrained(wanted):
    assert ElasticRecord.of(elastic()).kind(settings(), wanted) == "untrained"
    off = ElasticRecord.of(elastic(**OFF))
    assert off.kind(settings(), Budget(top_k=1)) == off.kind(settings(), Budget(experts=4)) == "untrained"
    assert off.rungs(settings()) == [("full", Budget())]


def test_plans_of_layers_to_choose_among():
    assert layer_plans(4, 3) == [(0, 1, 3), (0, 2, 3), (0, 1, 2)]
    assert layer_plans(4, 4) == [(0, 1, 2, 3)]
    many = layer_plans(20, 10, most=8)
    assert len(set(many)) == 8
    assert all(len(set(plan)) == 10 for plan in many)
    with pytest.raises(BudgetError, match="5 of 4 layers"):
        layer_plans(4, 5)


def test_what_is_deployed_has_the_most_used_experts_and_the_best_layers():
    model, read = decoder(), [batch()]
    found = deployable(model, read, layers=3, experts=4, top_k=2)
    assert [one.quality.loss for one in found] == sorted(one.quality.loss for one in found)
    for one in found:
        loads = expert_loads(model, read, Budget(skip=one.wanted.skip))
        for part in sub_model(model.settings, one.wanted).layers:
            assert part.experts == most_used(loads[part.layer], 4)
            assert part.top_k == 2
    small = extract(model, found[0].wanted)
    assert (small.settings.layers, small.settings.moe.experts, small.settings.moe.experts_per_token) == (3, 4, 2)
    assert not small.settings.sizes_differ
    loss = NextToken(**NEXT).build()(small, batch(), None)
    assert float(loss.sum) / float(loss.units) == pytest.approx(found[0].quality.loss, rel=1e-9)
    with pytest.raises(BudgetError, match="no text"):
        deployable(model, [], layers=3)
    with pytest.raises(BudgetError, match="keep 3 layers each"):
        deployable(model, read, layers=3, plans=[(0, 3)])
