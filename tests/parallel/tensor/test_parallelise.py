"""What `parallelise` does to a model: how often ranks talk, what it refuses, and any small configuration."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forked import run_ranks
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from tensor_cases import Case, batch, compare, step
from torch import nn

from resilin.adapt.attach import attach
from resilin.adapt.settings import AdapterSettings
from resilin.layout import Mesh, layout_of, plan, specs_of
from resilin.layout import check as check_layout
from resilin.models.cache import KVCache
from resilin.models.decoder import Decoder
from resilin.models.decoder_plan import decoder_plan
from resilin.models.decoder_settings import DecoderSettings, MoESettings
from resilin.models.linear import Linear
from resilin.parallel import exchange
from resilin.parallel.decoder_specs import decoder_specs
from resilin.parallel.degrees import Degrees
from resilin.parallel.errors import ParallelError
from resilin.parallel.group import Group
from resilin.parallel.local_model import shapes_of
from resilin.parallel.sequence.shard import shard_sequence
from resilin.parallel.sequence.ulysses import ulysses
from resilin.parallel.tensor import parallelise, plan_of
from resilin.parallel.world import World
from resilin.posttrain.reward_model import RewardModel


class Counted:
    """Counts collectives and the elements that they take, by kind."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def __enter__(self) -> Counted:
        self._before = dist.all_reduce, exchange._all_gather, dist.all_to_all_single
        dist.all_reduce = self._of("all_reduce", dist.all_reduce)
        exchange._all_gather = self._of("all_gather", exchange._all_gather)
        dist.all_to_all_single = self._of("reduce_scatter", dist.all_to_all_single)  # what a CPU does in its place
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_reduce, exchange._all_gather, dist.all_to_all_single = self._before

    def _of(self, kind: str, call: Any) -> Any:
        def counted(*arguments: Any, **named: Any) -> Any:
            self.calls[kind] += 1
            return call(*arguments, **named)

        return counted


def talk(rank: int) -> dict[tuple[bool, int, str], dict[str, int]]:
    found = {}
    for sequence in (False, True):
        for layers in (1, 3):
            case = Case(settings={"layers": layers, "kv_heads": 2, "qkv_bias": True, "mlp_bias": True})
            model = case.decoder()
            local = parallelise(model, model.tensor_plan(), Group.of(), sequence=sequence)
            with Counted() as forward:
                hidden = local.module(batch(case)["tokens"]).hidden_BTD
            with Counted() as backward:
                hidden.sum().backward()
            with Counted() as both:
                step(local.module, case)
            found |= {
                (sequence, layers, name): dict(counted.calls)
                for name, counted in (("forward", forward), ("backward", backward), ("step", both))
            }
    return found


def test_a_layer_talks_twice_forwards_and_twice_backwards() -> None:
    (found, _) = run_ranks(2, talk)
    for name in ("forward", "backward"):
        one, three = (found[False, layers, name] for layers in (1, 3))
        assert three["all_reduce"] - one["all_reduce"] == 2 * 2
        assert set(one) == set(three) == {"all_reduce"}
        one, three = (found[True, layers, name] for layers in (1, 3))
        assert three["all_gather"] - one["all_gather"] == 2 * 2
        assert three["reduce_scatter"] - one["reduce_scatter"] == 2 * 2
        assert "all_reduce" not in three
    # The embedding's sum; in the loss a maximum, the sums, and the gradient of the hidden states.
    assert found[False, 1, "forward"]["all_reduce"] == 2 + 1
    assert found[False, 1, "step"]["all_reduce"] == 2 + 2 + 1 + 3


def refusals(rank: int) -> None:
    group = Group.of()
    model = Decoder(DecoderSettings(vocab_size=20, hidden_size=8, layers=1, heads=2, mlp_size=8))
    plan = model.tensor_plan()
    local = parallelise(copy.deepcopy(model), plan, group, sequence=True)
    with pytest.raises(ParallelError, match=r"divided among 2 ranks and takes no 'cache'"):
        local.module(torch.zeros(1, 4, dtype=torch.int64), cache=KVCache.of(local.module, 1, 8))  # type: ignore[arg-type]
    with pytest.raises(ParallelError, match="packed head"):
        local.module.logits(torch.zeros(1, 8), head=object())  # type: ignore[operator]

    strict = parallelise(copy.deepcopy(model), replace(plan, padding=()), group, sequence=True)
    with pytest.raises(ParallelError, match=r"rows of 5 positions .* multiple of 2, such as 4"):
        strict.module(torch.zeros(1, 5, dtype=torch.int64))

    extended = copy.deepcopy(model)
    extended.blocks[0].attention.register_parameter("more", nn.Parameter(torch.zeros(3)))
    with pytest.raises(ParallelError, match=r"blocks\.0\.attention\.more lies in a region"):
        parallelise(extended, plan, group, sequence=False)
    for added, message in (
        (
            AdapterSettings(method="miss", rank=2),
            r"adapters\.default\.block lies in a region .*lora and rslora",
        ),
        (AdapterSettings(method="lora", rank=2, dropout=0.1), r"adapters\.default has dropout"),
    ):
        adapted = copy.deepcopy(model)
        attach(adapted, {"default": added})
        with pytest.raises(ParallelError, match=message):
            parallelise(adapted, plan, group, sequence=False)
    extended = copy.deepcopy(model)
    extended.blocks[0].mlp.register_buffer("mask", torch.ones(3))
    with pytest.raises(ParallelError, match=r"blocks\.0\.mlp\.mask is a buffer"):
        parallelise(extended, plan, group, sequence=False)
    with pytest.raises(ParallelError, match=r"a Linear has no tensor_plan\(\)"):
        plan_of(Linear(2, 2))
    with pytest.raises(ParallelError, match="no module matches the plan's regions"):
        parallelise(Linear(2, 2), plan, group, sequence=False)
    with pytest.raises(
        ParallelError, match=r"embed\.weight: the plan names it as embedding or head, but no rule cuts it"
    ):
        parallelise(copy.deepcopy(model), replace(plan, rules=plan.rules[1:]), group, sequence=False)
    scaled = copy.deepcopy(model)
    scaled.embed = type("Scaled", (nn.Embedding,), {})(20, 8)
    with pytest.raises(ParallelError, match="embed: the plan's embedding should be a plain Embedding, not a Scaled"):
        parallelise(scaled, plan, group, sequence=False)
    biased = Decoder(DecoderSettings(vocab_size=20, hidden_size=8, layers=1, heads=2, out_bias=True))
    biased.blocks[0].attention.o.__class__ = type("Quantised", (Linear,), {})
    with pytest.raises(ParallelError, match=r"attention\.o: a Quantised cannot be told to add its bias"):
        parallelise(biased, plan, group, sequence=False)
    shared = copy.deepcopy(model)
    shared.head.weight = shared.embed.weight  # type: ignore[union-attr]
    with pytest.raises(ParallelError, match=r"head\.weight is the same parameter as embed\.weight"):
        parallelise(shared, plan, group, sequence=False)


def too_many(rank: int) -> None:
    group = Group.of()
    for more, message in (
        (
            {"heads": 2, "kv_heads": 1},
            r"blocks\.0\.attention\.q\.weight \[8, 8\] leaves rank 2 of 3 without anything \(heads",
        ),
        ({"heads": 4, "kv_heads": 2}, r"2 groups cannot be shared evenly by 3 ranks; use .*key heads"),
        ({"heads": 4, "vocab_size": 2}, r"embed\.weight \[2, 8\] leaves rank 2"),
    ):
        model = Decoder(DecoderSettings(**{"vocab_size": 20, "hidden_size": 8, "layers": 1, "mlp_size": 8, **more}))
        with pytest.raises(ParallelError, match=message):
            parallelise(model, model.tensor_plan(), group, sequence=False)
    model = Decoder(DecoderSettings(vocab_size=8, hidden_size=8, layers=1, heads=4))
    with pytest.raises(ParallelError, match=r"embed\.weight: rank 2 of 3 has 0 runs of the 8 tokens"):
        parallelise(model, model.tensor_plan(vocabulary_multiple=12), group, sequence=False)


def test_what_cannot_work_is_refused_by_name() -> None:
    run_ranks(2, refusals)


def test_more_ranks_than_heads_or_tokens_are_refused() -> None:
    run_ranks(3, too_many)


def test_one_rank_changes_nothing() -> None:
    model = Decoder(DecoderSettings(vocab_size=20, hidden_size=8, layers=1, heads=2, mlp_size=8))
    before = dict(model.named_parameters())
    local = parallelise(model, model.tensor_plan(), Group.alone(), sequence=True)
    assert local.module is model
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert not model._forward_pre_hooks
    assert not any(known.sum_over or known.spec.cuts for known in local.parameters.values())


@st.composite
def cases(draw: st.DrawFn) -> Case:
    heads, shared = draw(st.sampled_from([(2, 1), (4, 1), (4, 2), (6, 2), (4, 4), (8, 2)]))
    over_width = draw(st.booleans())
    decoder = {
        "layers": 1,
        "heads": heads,
        "kv_heads": heads // shared,
        "head_size": draw(st.sampled_from([2, 4])),
        "hidden_size": draw(st.integers(3, 9)),
        "mlp_size": draw(st.integers(4, 9)),
        "vocab_size": draw(st.integers(4, 14)),
        "gated": draw(st.booleans()),
        "norm": draw(st.sampled_from(["rms", "layer"])),
        "qk_norm": "rms" if over_width else draw(st.sampled_from(["none", "rms", "layer", "transplant"])),
        "qk_norm_over": "width" if over_width else "head",
        "qkv_bias": draw(st.booleans()),
        "out_bias": draw(st.booleans()),
        "tie_embeddings": draw(st.booleans()),
        "dropout": draw(st.sampled_from([0.0, 0.3])),
        "recompute": draw(st.sampled_from(["none", "block", "selective"])),
    }
    sparse = draw(st.booleans())
    moe = {"experts": 3, "expert_size": draw(st.integers(4, 7)), "shared_size": draw(st.sampled_from([0, 5]))}
    decoder["mlp_bias"] = not sparse and draw(st.booleans())
    return Case(
        settings=decoder,
        objective={"label_smoothing": draw(st.sampled_from([0.0, 0.1])), "chunk": draw(st.sampled_from([None, 7]))},
        moe=moe if sparse else None,
        sequence=draw(st.booleans()),
        packed=draw(st.booleans()),
        weighted=draw(st.booleans()),
        vocabulary_multiple=draw(st.sampled_from([1, 4])),
    )


def any_case(rank: int) -> list[str]:
    """The same examples on every rank; those that so few tokens or heads cannot be divided for are left out."""
    found, count, group = [], 0, Group.of()

    @seed(4)
    @settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(cases())
    def explore(case: Case) -> None:
        nonlocal count
        try:
            wrong = compare(case, group)
        except ParallelError:
            return
        count += 1
        if wrong is not None:
            found.append(wrong)

    explore()
    assert count > 10
    return found


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_any_small_decoder_computes_what_the_whole_one_does(ranks: int) -> None:
    for wrong in run_ranks(ranks, any_case, timeout=240):
        assert not wrong, "\n".join(wrong)


def with_context(rank: int) -> list[str]:
    """Two ranks share each matrix, and two such pairs each row."""
    world = World(Degrees(context=2, tensor=2), rank)
    pair, rows = world.group("tp"), world.group("cp")
    wrong = []
    for case in (
        Case(sequence=True, settings={"dropout": 0.2}),
        Case(sequence=False, settings={"dropout": 0.2, "kv_heads": 2}, packed=True),
        Case(sequence=True, settings={"dropout": 0.2}, packed=True),
    ):
        whole, model = case.decoder(), case.decoder()
        wanted, _ = step(whole, case)
        local = parallelise(model, model.tensor_plan(), pair, sequence=case.sequence)
        ulysses(local.module, rows)
        found, _ = step(local.module, case, lambda b: shard_sequence(b, rows))
        local.sum_gradients()
        total = torch.tensor(found, dtype=torch.float64)
        dist.all_reduce(total, group=rows.process_group)
        if abs(float(total) - wanted) > 1e-5 * wanted:
            wrong.append(f"{case}: loss {float(total)} for {wanted}")
        for (name, ours), theirs in zip(local.module.named_parameters(), whole.parameters(), strict=True):
            assert ours.grad is not None
            assert theirs.grad is not None
            dist.all_reduce(ours.grad, group=rows.process_group)
            if (ours.grad - local.part(name, theirs.grad)).norm() > 1e-5 * theirs.grad.norm():
                wrong.append(f"{case}: {name}")
    return wrong


def test_rows_divided_as_well_as_matrices() -> None:
    for wrong in run_ranks(4, with_context):
        assert not wrong, "\n".join(wrong)


def inside_another(rank: int) -> None:
    """A reward model: a decoder divided, in one that has a score beside it. And a copy of it."""
    group = Group.of()
    for sequence in (False, True):
        known = DecoderSettings(vocab_size=20, hidden_size=8, layers=1, heads=2, mlp_size=8)
        whole, model = (RewardModel(Decoder(known, seed=2)) for _ in range(2))
        for one in (whole, model):
            nn.init.normal_(one.score.weight, generator=torch.Generator().manual_seed(0))
        specs = specs_of(shapes_of(model), plan_of(model).whole_rules, strict=False)
        local = parallelise(model, plan_of(model), group, sequence=sequence)
        assert {name: known.spec.cuts for name, known in local.parameters.items()} == {
            name: spec.cuts for name, spec in specs.items()
        }
        tokens = torch.randint(20, (2, 7), generator=torch.Generator().manual_seed(1))
        for one in (whole, model):
            one(tokens).square().sum().backward()
        local.sum_gradients()
        for (name, ours), theirs in zip(model.named_parameters(), whole.parameters(), strict=True):
            if theirs.grad is not None:
                assert ours.grad is not None, name
                assert (ours.grad - local.part(name, theirs.grad)).norm() <= 1e-5 * theirs.grad.norm(), name
        torch.testing.assert_close(copy.deepcopy(model)(tokens), whole(tokens))
        hidden = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
        torch.testing.assert_close(copy.deepcopy(model).decoder.logits(hidden), whole.decoder.logits(hidden))


def test_a_divided_decoder_in_another_model_and_a_copy_of_it() -> None:
    run_ranks(2, inside_another)


def same_layout(rank: int) -> bool:
    moe = MoESettings(experts=4, expert_size=6, shared_size=5)
    known = DecoderSettings(vocab_size=27, hidden_size=8, layers=2, heads=4, kv_heads=2, mlp_size=9, moe=moe)
    outline, mesh = Decoder(known, seed=None, device="meta"), Mesh.of(tp=4)
    specs = decoder_specs(shapes_of(outline), known, mesh, vocabulary_multiple=8)
    local = parallelise(outline, decoder_plan(known, 8), Group.of(), sequence=False)
    shapes = {name: tuple(parameter.shape) for name, parameter in local.module.named_parameters()}
    assert shapes == {name: spec.local_shapes(mesh)[rank] for name, spec in specs.items()}
    ours, theirs = local.layout(mesh), layout_of(specs, mesh)
    check_layout(ours)
    return not any(plan(*pair).moved_bytes for pair in ((ours, theirs), (theirs, ours)))


def test_the_plan_cuts_as_the_layout_of_a_decoder_does() -> None:
    assert all(run_ranks(4, same_layout))
