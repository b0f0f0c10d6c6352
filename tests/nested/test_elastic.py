"""Nemotron Elastic: masks, router, costs, and the loss."""

from __future__ import annotations

import copy
import json
from itertools import pairwise, product

import pytest
import torch
from elastic_cases import DENSE, KINDS, TOKENS, batch, elastic, whole
from hypothesis import given, settings
from hypothesis import strategies as st

from resilin.keys import Keys
from resilin.models.cut import running
from resilin.models.loop_settings import LoopSettings
from resilin.nested import Budget, BudgetError, budget, cost, extract, sub_model
from resilin.nested.elastic import NemotronElastic, Phase, cost_of, drawn, moment, selected, write_chosen
from resilin.nested.elastic_space import ElasticSpace, axes_of, budget_of
from resilin.nested.router import gumbel, gumbel_softmax
from resilin.objective.settings import ObjectiveContext

CPU = torch.device("cpu")


def logits(decoder):
    return decoder.logits(decoder(TOKENS).hidden_BTD)


def one_hot(axes, chosen):
    return {
        axis.name: torch.nn.functional.one_hot(torch.tensor(chosen[axis.name]), axis.choices).double() for axis in axes
    }


@st.composite
def choices(draw, axes):
    return {axis.name: [draw(st.integers(0, axis.choices - 1)) for _ in range(axis.rows)] for axis in axes}


@torch.no_grad()
@settings(max_examples=20, deadline=None)
@given(st.data())
def test_hard_masks_compute_what_the_slices_compute_and_cost_what_they_cost(data):
    kind, norm = data.draw(st.sampled_from(KINDS)), data.draw(st.sampled_from(["rms", "layer"]))
    more = {} if kind == "hybrid" else {"qk_norm": data.draw(st.sampled_from(["none", "rms"])), "qkv_bias": True}
    if more.get("qk_norm") == "rms":
        more["qk_norm_over"] = data.draw(st.sampled_from(["head", "width"]))
    model = elastic(
        kind,
        whole(kind, norm=norm, **more),
        space={"heterogeneous": data.draw(st.booleans())},
        measure=data.draw(st.sampled_from(["parameters", "non_embedding", "flops", "cache"])),
    )
    chosen = data.draw(choices(model.axes))
    wanted = budget_of(model.settings, model.elastic.space, model.axes, chosen, model.order)
    shares = one_hot(model.axes, chosen)
    with running(model.decoder, model.masks.cut(model.settings, model.axes, shares)):
        masked = logits(model.decoder)
    with budget(model.decoder, wanted):
        sliced = logits(model.decoder)
    torch.testing.assert_close(masked, sliced, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(logits(extract(model, wanted)), sliced, rtol=1e-9, atol=1e-9)
    expected = model.costs.expected(model.axes, shares, model.masks.kept(shares))
    told, full = cost(model.settings, wanted), cost(model.settings, Budget())
    length = model.settings.max_positions
    value = {
        "cache": (told.kv_bytes * length + told.state_bytes) / (full.kv_bytes * length + full.state_bytes),
    }.get(model.elastic.measure) or getattr(told, model.elastic.measure) / getattr(full, model.elastic.measure)
    assert float(expected) == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_is_the_plain_model_and_soft_masks_fall_along_the_rank(kind):
    model = elastic(kind)
    ones = one_hot(model.axes, model.chosen(2))
    with torch.no_grad(), running(model.decoder, model.masks.cut(model.settings, model.axes, ones)):
        torch.testing.assert_close(logits(model.decoder), logits(whole(kind)), rtol=1e-12, atol=1e-12)
    shares = {
        axis.name: torch.full((axis.rows, axis.choices), 1 / axis.choices, dtype=torch.float64) for axis in model.axes
    }
    cut = model.masks.cut(model.settings, model.axes, shares)
    assert (cut.stream_D.diff() <= 0).all()
    assert ((cut.kept_L > 0) & (cut.kept_L <= 1 + 1e-12)).all()
    assert cut.kept_L[1] == cut.kept_L.max()  # the most important layer
    for block in cut.blocks:
        if "mlp.down" in block.inside:
            assert (block.inside["mlp.down"].diff() <= 0).all()


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_smaller_targets_are_parts_of_larger_ones(data):
    kind = data.draw(st.sampled_from(KINDS))
    model = elastic(kind, space={"heterogeneous": data.draw(st.booleans())})
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    with torch.no_grad():
        for parameter in model.router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    found = [sub_model(model.settings, model.budget_of(target)) for target in range(3)]
    for small, large in pairwise(found):
        assert small.hidden <= large.hidden
        larger = {one.layer: one for one in large.layers}
        for one in small.layers:
            for size in ("heads", "key_heads", "ffn", "mamba_heads", "mamba_head_size", "state_size"):
                assert getattr(one, size) <= getattr(larger[one.layer], size)
    assert model.budget_of(2) == Budget()


@torch.no_grad()
@settings(max_examples=12, deadline=None)
@given(st.data())
def test_chosen_sizes_cost_what_the_target_says_and_are_the_likeliest_of_those(data):
    """Against all combinations, one by one."""
    kind, by_layer = data.draw(st.sampled_from(KINDS)), data.draw(st.booleans())
    model = elastic(kind, space={"heterogeneous": by_layer}, within=data.draw(st.sampled_from([0.02, 0.1, 0.3])))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    for parameter in model.router.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    target = data.draw(st.sampled_from([0, 1]))
    most, likely = model.chosen(target + 1), {k: v.double().log_softmax(-1) for k, v in model.router(target).items()}
    places = [(axis.name, row) for axis in model.axes for row in range(axis.rows)]
    found, wanted = [], model.elastic.targets[target]
    for sizes in product(*(range(most[name][row] + 1) for name, row in places)):
        picked: dict[str, list[int]] = {}
        for (name, _), size in zip(places, sizes, strict=True):
            picked.setdefault(name, []).append(size)
        shares = one_hot(model.axes, picked)
        off = abs(float(model.costs.expected(model.axes, shares, model.masks.kept(shares))) / wanted - 1)
        found.append((off, sum(float(likely[name][row, s]) for (name, row), s in zip(places, sizes, strict=True))))
    mine = abs(cost_of(model, target) / wanted - 1)
    chosen = model.chosen(target)
    likelihood = sum(float(likely[name][row, chosen[name][row]]) for name, row in places)
    within, cell = model.elastic.within, model.elastic.within / 4
    sure = [chance for off, chance in found if off <= within - cell]  # whatever the grid rounds
    if sure:
        assert mine <= within + 1e-9
        assert likelihood >= max(sure) - 1e-9
    else:
        assert mine <= min(off for off, _ in found) + cell
    before = model.chosen(target)
    bias = model.router.axes[places[0][0]].down.bias
    bias += torch.randn(bias.shape, generator=generator)
    assert model.chosen(target) is not before  # of the router as it is now


def test_as_the_temperature_falls_soft_choices_become_hard():
    z = torch.tensor([[0.3, 1.0, 0.2]], dtype=torch.float64)
    noise = gumbel(Keys.of_step(0, 0), z)
    hard = torch.nn.functional.one_hot((z + noise).argmax(-1), 3).double()
    gaps = [float((gumbel_softmax(z, t, 1.0, noise) - hard).abs().max()) for t in (1.0, 0.3, 0.1, 0.001)]
    assert all(after < before for before, after in pairwise(gaps))
    assert gaps[-1] < 1e-9
    assert torch.equal(gumbel_softmax(z, 1.0, 2.0, None), (2 * z).softmax(-1))
    forward = selected({"ffn": gumbel_softmax(z, 1.0, 1.0, noise)}, {"ffn": z}, "straight-through")["ffn"]
    torch.testing.assert_close(forward, hard)


def test_gumbel_noise_is_gumbel():
    drawn_ = gumbel(Keys.of_step(1, 2), torch.zeros(20000, dtype=torch.float64))
    assert float(drawn_.mean()) == pytest.approx(0.5772, abs=0.03)
    assert float(drawn_.var()) == pytest.approx(torch.pi**2 / 6, abs=0.1)


def built(model, **more):
    """The objective in a run of 20 steps whose initial model is this one."""
    context = ObjectiveContext(0, CPU, None, lambda: elastic_copy(model), None, 20)
    return NemotronElastic.model_validate(more).build(context)


def elastic_copy(model):
    return copy.deepcopy(model).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", ["straight-through", "soft", "logit"])
def test_the_router_learns_and_the_kd_of_the_whole_is_nothing(kind, mask):
    model = elastic(kind)
    objective = built(model, mask=mask, phases=[Phase(weights=(1, 1, 0))])
    loss = objective(model, batch(), Keys(0, 3, torch.arange(4)))
    loss.sum.backward()
    for name, parameter in model.router.named_parameters():
        assert parameter.grad is not None, name
    assert any(parameter.grad.abs().max() > 0 for parameter in model.router.parameters())
    assert {"loss_at_0.5", "cost_at_0.5", "router", "temperature"} <= set(loss.logs)
    only_whole = built(model, phases=[Phase(weights=(0, 0, 1))])
    loss = only_whole(model, batch(), Keys(0, 3, torch.arange(4)))
    assert float(loss.sum) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("teacher", ["frozen", "full", "none"])
def test_how_a_batch_is_split_changes_no_gradient(teacher):
    found = []
    for parts in ([range(4)], [range(1), range(1, 4)]):
        model = elastic("dense")
        objective = built(model, teacher=teacher, ce_weight=0.5, router_until=0.5)
        for rows in parts:
            part = batch().rows(rows.start, rows.stop)
            objective(model, part, Keys(0, 4, torch.arange(4)).rows(rows.start, rows.stop)).sum.backward()
        found.append([p.grad for p in model.parameters()])
    for one, other in zip(*found, strict=True):
        if one is None or other is None:
            assert one is other
        else:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_once_the_router_has_learned_sub_models_are_slices_and_it_stays():
    model = elastic("hybrid")
    objective = built(model, router_until=0.5, phases=[Phase(weights=(1, 0, 0))])
    loss = objective(model, batch(), Keys(0, 10, torch.arange(4)))
    loss.sum.backward()
    assert all(parameter.grad is None for parameter in model.router.parameters())
    with budget(model.decoder, model.budget_of(0)):
        want = objective.inner(model, batch(), None)
    assert float(loss.sum) == pytest.approx(float(want.sum), rel=1e-12)


def test_one_target_with_labels_is_ordinary_training_of_the_pruned_model():
    model = elastic("dense")
    small = extract(model, model.budget_of(0))
    objective = built(model, teacher="none", router_until=0.0, phases=[Phase(weights=(1, 0, 0))])
    mine = objective(model, batch(), Keys(0, 0, torch.arange(4)))
    theirs = objective.plain(small, batch(), None)
    assert float(mine.sum) == pytest.approx(float(theirs.sum), rel=1e-12)


def test_evaluation_reads_every_target_by_itself():
    model = elastic("hybrid")
    objective = built(model)
    with torch.no_grad():
        loss = objective(model, batch(), None)
    for target, share in enumerate(("0.5", "0.75", "1")):
        with budget(model.decoder, model.budget_of(target)):
            alone = objective.plain(model, batch(), None)
        assert loss.logs[f"loss_at_{share}"].value() == pytest.approx(alone.logs["nll"].value())
        told = cost(model.settings, model.budget_of(target)).parameters / cost(model.settings, Budget()).parameters
        assert loss.logs[f"cost_at_{share}"].value() == pytest.approx(told)
    assert loss.logs["kl_at_1"].value() == pytest.approx(0, abs=1e-9)


def test_moments_follow_the_run():
    chosen = NemotronElastic(
        router_until=0.5, phases=(Phase(until=0.6), Phase(weights=(0.2, 0.3, 0.5))), temperatures=(1.0, 0.05)
    )
    first, middle, late = (moment(chosen, step, 100, 3) for step in (0, 49, 60))
    assert (first.learns, first.temperature, first.scale, first.weights) == (True, 1.0, 1.0, (1.0, 1.0, 1.0))
    assert middle.learns
    assert (middle.temperature, middle.scale) == pytest.approx((0.05, 10.0))
    assert (late.learns, late.weights) == (False, (0.2, 0.3, 0.5))
    with pytest.raises(BudgetError, match="3 weights for 2 targets"):
        moment(chosen, 99, 100, 2)


@given(st.lists(st.just(0.0) | st.floats(0.1, 5), min_size=2, max_size=4).filter(sum), st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_targets_are_drawn_as_often_as_they_weigh(weights, seed):
    uniform = Keys(seed, 0, torch.arange(4000)).uniform((1,)).flatten()
    found = torch.bincount(torch.tensor(drawn(tuple(weights), uniform)), minlength=len(weights)) / 4000
    torch.testing.assert_close(found, torch.tensor(weights) / sum(weights), rtol=0, atol=0.05)


def test_chosen_sizes_are_written_as_budgets(tmp_path):
    model = elastic("hybrid")
    write_chosen(model, tmp_path)
    told = json.loads((tmp_path / "elastic.json").read_text())
    assert told["targets"]["0.5"]["cost"] == pytest.approx(cost_of(model, 0))
    assert Budget.read(tmp_path / "budget-0.5.json") == model.budget_of(0)


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({"ffn": (0.5,)}, "the last of its sizes is the whole"),
        ({"ffn": (1.0, 0.5, 1.0)}, "sizes ascend"),
        ({"mamba": ((0.5, 1), (1, 0.5), 1)}, "sizes ascend"),
        ({"mamba": (0.4, 1)}, "no whole number"),
        ({"heads": (0.3, 1)}, "no whole number"),
    ],
    ids=str,
)
def test_sizes_that_do_not_come_out_are_refused(space, words):
    with pytest.raises(ValueError, match=words):
        axes_of(whole("hybrid").settings, ElasticSpace(**space))


def test_axes_that_a_model_has_not_are_refused():
    with pytest.raises(BudgetError, match="no Mamba-2 layers"):
        axes_of(whole("dense").settings, ElasticSpace(mamba=(0.5, 1)))
    with pytest.raises(BudgetError, match="plain decoders or hybrids"):
        axes_of(DENSE.model_copy(update={"loop": LoopSettings(times=2)}), ElasticSpace())
    with pytest.raises(BudgetError, match="elastic_model:Elastic"):
        built(elastic("dense"))(whole("dense"), batch(), None)
