"""What is planned after a change: every axis against brute force or by its definition, and all of them together."""

from __future__ import annotations

import itertools
import json
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilin.cluster.axes import (
    ASSIGNMENTS,
    Clocks,
    Layers,
    Machine,
    Pipeline,
    PlanError,
    Rules,
    absorb,
    assign,
    decide,
    repartition,
    step_of,
)
from resilin.cluster.axes import step as step_module
from resilin.cluster.axes.graph import moves
from resilin.cluster.axes.policies import ALL, DROPPED, GRAPH, INTACT, KEPT, RESHAPE, WHOLE, lose, policies
from resilin.cluster.changes import changed, first_view
from resilin.parallel.pipeline import (
    Action,
    Kind,
    Record,
    ScheduleError,
    Split,
    Timeline,
    check_rendezvous,
    even,
    lower_members,
    slots_of,
)

GPU = Clocks((Fraction(9, 10), Fraction(1), Fraction(11, 10), Fraction(6, 5)), Fraction(1), Fraction(1, 5))


def pipeline(layers: int = 16, stages: int = 4, replicas: int = 4, micros: int = 16, micro: int = 3) -> Pipeline:
    members = [range(stage * replicas, (stage + 1) * replicas) for stage in range(stages)]
    return Pipeline.of(even(layers, stages, 0, 0), members, micros, micro)


# ---- dataflow ------------------------------------------------------------------------------------------------------


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.data())
@settings(max_examples=60, deadline=None)
def test_every_slot_is_computed_once_at_every_stage_whatever_comes_and_goes(
    stages: int, replicas: int, each: int, micro: int, data: st.DataObject
) -> None:
    now = pipeline(stages, stages, replicas, replicas * each, micro)
    for _ in range(3):
        how = data.draw(st.sampled_from(ASSIGNMENTS))
        fresh = itertools.count(1 + max(number for stage in now.members for number in stage))
        members = []
        for stage in now.members:
            kept = data.draw(st.lists(st.sampled_from(stage), max_size=len(stage), unique=True))
            come = [next(fresh) for _ in range(data.draw(st.integers(0 if kept else 1, 2)))]
            members.append(sorted(kept) + come)
        try:
            tables = assign(now, members, how)
        except ScheduleError:  # so many members that some would have nothing
            assert max(map(len, members)) > min(now.slots // now.ticks, replicas * each)
            continue
        for table, stage in zip(tables, members, strict=True):
            assert table.replicas == tuple(stage)
            owned = [s for one in stage for micro_batch in table.micros(one) for s in slots_of(micro_batch)]
            assert sorted(owned) == list(range(now.slots))
        if how == "whole":
            for before, after in zip(now.tables, tables, strict=True):
                stay = set(before.replicas) & set(after.replicas)
                come = set(after.replicas) - set(before.replicas)
                if not come:
                    assert all(set(before.micros(one)) <= set(after.micros(one)) for one in stay)
        now = Pipeline(now.split, tables, now.micro, now.ticks)


def test_orphans_go_one_by_one_to_who_has_least_also_of_two_lost_at_once() -> None:
    now = pipeline(4, 1, 4, 8, 1)  # 0: 0 1, 1: 2 3, 2: 4 5, 3: 6 7
    (table,) = assign(now, [[0, 2]], "whole")
    assert [[slots_of(micro)[0] for micro in table.micros(one)] for one in (0, 2)] == [[0, 1, 2, 6], [3, 4, 5, 7]]


def test_reshaped_no_replica_has_more_ticks_but_larger_ones() -> None:
    now = pipeline()
    after = Pipeline(now.split, assign(now, lose(now.members, {2: [1]}), "reshape"), now.micro, now.ticks)
    assert {len(after.tables[2].micros(one)) for one in after.members[2]} == {4}
    assert after.loads() == (1, 1, Fraction(4, 3), 1)
    whole = Pipeline(now.split, assign(now, lose(now.members, {2: [1]}), "whole"), now.micro, now.ticks)
    assert whole.loads() == (1, 1, Fraction(6, 4), 1)  # ceil(16 / 3) of 4


# ---- graph -----------------------------------------------------------------------------------------------------------


def splits(layers: int, stages: int) -> list[Split]:
    found = itertools.combinations(range(1, layers), stages - 1)
    return [Split((0, *inner, layers)) for inner in found]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_layers_are_split_as_the_best_of_all_splits_that_fit(data: st.DataObject) -> None:
    count, stages = data.draw(st.integers(2, 12)), data.draw(st.integers(1, 4))
    stages = min(stages, count)
    cost = st.integers(0, 9) | st.fractions(0, 9, max_denominator=3)
    layers = Layers(
        tuple(data.draw(st.lists(cost, min_size=count, max_size=count))),
        data.draw(cost),
        data.draw(cost),
        weights=tuple(data.draw(st.lists(st.integers(0, 4), min_size=count, max_size=count))),
        states=tuple(data.draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))),
        activations=tuple(data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))),
    )
    machine = Machine(memory=data.draw(st.none() | st.integers(1, 80)))
    now = pipeline(count, stages, 3, 6, 2)
    lost = {stage: list(range(data.draw(st.integers(0, 2)))) for stage in range(stages)}
    now = Pipeline(
        data.draw(st.sampled_from(splits(count, stages))),
        assign(now, lose(now.members, lost), "whole"),
        now.micro,
        now.ticks,
    )
    counts = [len(stage) for stage in now.members]

    def held(split: Split) -> float:
        flights = [min(stages - stage, now.ticks) * load for stage, load in enumerate(now.loads())]
        parts = [split.layers_of(stage) for stage in range(stages)]
        return max(
            2 * sum(layers.weights[layer] for layer in part)
            + sum(layers.states[layer] for layer in part) / replicas
            + float(flight) * sum(layers.activations[layer] for layer in part)
            for part, replicas, flight in zip(parts, counts, flights, strict=True)
        )

    fitting = [split for split in splits(count, stages) if machine.memory is None or held(split) <= machine.memory]
    found = repartition(now, layers, machine)
    if not fitting:
        assert found is None
        return

    def key(split: Split) -> tuple[Fraction, int, tuple[int, ...]]:
        slowest = max(load * cost for load, cost in zip(now.loads(), layers.of_stages(split), strict=True))
        moved = sum(split.stage_of(layer) != now.split.stage_of(layer) for layer in range(count))
        return slowest, moved, split.bounds

    assert found is not None
    assert found.split == min(fitting, key=key)
    assert max(found.new) == key(found.split)[0]
    assert len(found.moves.layers) == key(found.split)[1]
    assert found.fits == (now.split in fitting)


def test_moving_a_layer_takes_its_slices_over_as_many_links_as_there_are_members() -> None:
    layers = Layers((1, 1, 1, 1), weights=(6, 6, 6, 6), states=(12, 12, 12, 12))
    machine = Machine(bandwidth=2.0, setup=0.5)
    four = moves(Split((0, 2, 4)), Split((0, 1, 4)), layers, machine, [4, 4])
    assert four.layers == ((1, 0, 1),)
    assert four.seconds == 0.5 + (6 + 12 / 4) / 2  # each of the four gets all weights and a quarter of the states
    uneven = moves(Split((0, 2, 4)), Split((0, 1, 4)), layers, machine, [2, 4])
    assert uneven.seconds == 0.5 + (6 * 4 / 2 + 12 / 2) / 2  # two send what four get
    assert moves(Split((0, 2, 4)), Split((0, 2, 4)), layers, machine, [4, 4]).seconds == 0


def test_layers_move_only_if_that_pays_within_the_horizon() -> None:
    now, layers = pipeline(), Layers((1,) * 16, weights=(1.0,) * 16)
    left = lose(now.members, {3: [0]})
    rules = Rules(("reshape",))

    def graph(machine: Machine, rules: Rules) -> dict[str, object]:
        return next(r for r in decide(now, left, layers, machine, rules).reasons if r["axis"] == "graph")

    free = graph(Machine(), rules)
    seconds: dict[str, float] = free["seconds"]  # type: ignore[assignment]
    gain = seconds["before"] - seconds["after"]
    assert free["decision"] == "move"
    assert gain > 0
    assert decide(now, left, layers, None, rules).pipeline.split.counts() == (4, 4, 5, 3)
    assert graph(Machine(setup=49.9 * gain), rules)["decision"] == "move"
    assert graph(Machine(setup=50.1 * gain), rules)["decision"] == "keep"
    assert graph(Machine(setup=50.1 * gain), Rules(("reshape",), horizon=51))["decision"] == "move"
    assert decide(now, left, layers, Machine(setup=50.1 * gain), rules).pipeline.split == now.split


def test_what_does_not_fit_moves_whatever_it_costs_and_what_never_fits_is_said() -> None:
    now = pipeline(8, 2, 2, 4, 2)
    layers = Layers((1,) * 8, states=(6.0,) * 8)  # two replicas hold 12 of 24 each; one alone would hold 24
    left = lose(now.members, {0: [1]})
    decision = decide(now, left, layers, Machine(memory=18, setup=1e9))
    assert decision.pipeline.split.counts() == (3, 5)
    assert max(decision.after.held) <= 18
    graph = next(reason for reason in decision.reasons if reason["axis"] == "graph")
    assert "do not fit" in graph["why"]
    with pytest.raises(PlanError, match=r"no split of 8 layers over stages of .* fits into 12 bytes"):
        decide(now, left, layers, Machine(memory=12))


def test_activations_beyond_1f1b_are_held_only_where_there_is_memory() -> None:
    now = pipeline()
    after = Pipeline(now.split, assign(now, lose(now.members, {1: [0]}), "whole"), now.micro, now.ticks)
    layers = Layers((1,) * 16, activations=(1.0,) * 16)
    roomy, tight = step_of(after, layers, Machine()), step_of(after, layers, Machine(memory=16))
    assert roomy is not None
    assert tight is not None
    assert max(roomy.held) > 16 >= max(tight.held)
    assert roomy.seconds < tight.seconds
    assert step_of(after, layers, Machine(memory=10)) is None


# ---- frequency -------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.fractions(0, 9, max_denominator=4), st.fractions(0, 3, max_denominator=4)), min_size=1),
    st.sets(st.integers(1, 30), min_size=1, max_size=6),
    st.booleans(),
    st.data(),
)
@settings(max_examples=80, deadline=None)
def test_clocks_are_the_smallest_that_reach_the_slowest_of_the_others(
    parts: list[tuple[Fraction, Fraction]], table: set[int], lower: bool, data: st.DataObject
) -> None:
    clocks = Clocks(tuple(map(Fraction, table)), Fraction(data.draw(st.sampled_from(sorted(table)))), lower=lower)
    slow = data.draw(st.sets(st.integers(0, len(parts) - 1)))
    from resilin.cluster.axes import StageTime

    stages = [StageTime(*part) for part in parts]
    found = absorb(stages, slow, clocks)
    at_base = [compute + memory for compute, memory in parts]
    others = [time for stage, time in enumerate(at_base) if stage not in slow]
    for stage, clock in enumerate(found):
        assert clock in clocks.table
        compute, memory = parts[stage]
        if not others:
            assert clock == clocks.base
            continue
        enough = [one for one in clocks.table if compute * clocks.base / one + memory <= max(others)]
        if stage in slow and at_base[stage] > max(others):
            assert clock == (min(enough) if enough else max(clocks.table))
            assert clock >= clocks.base
        else:
            assert clock == (min(enough) if lower and enough else clocks.base)


def test_what_waits_for_memory_is_not_quicker_at_any_clock() -> None:
    assert GPU.factor(Fraction(6, 5)) == Fraction(4, 5) * Fraction(5, 6) + Fraction(1, 5)
    stuck = Clocks(GPU.table, GPU.base, 1)
    assert stuck.factor(Fraction(6, 5)) == 1
    with pytest.raises(ValueError, match="the usual one"):
        Clocks((1, 2), 3)
    with pytest.raises(ValueError, match="between 0 and 1"):
        Clocks((1, 2), 1, 2)


# ---- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "replicas"), [(8, [1]), (16, [0, 1, 2, 3]), (32, [2])])
@pytest.mark.parametrize("stage", range(4))
def test_each_axis_adds_to_the_throughput_after_a_loss(layers: int, replicas: list[int], stage: int) -> None:
    """Four stages of four replicas, 16 micro-batches, one replica of one stage lost: the order of ElasWave's parts."""
    for replica in replicas:
        found = policies(pipeline(layers), {stage: [replica]}, Layers((1,) * layers), Machine(clocks=GPU))
        rate = {one.name: one.throughput for one in found}
        assert rate[INTACT] >= rate[ALL] >= rate[GRAPH] >= rate[RESHAPE] > rate[WHOLE] > rate[DROPPED]
        assert rate[WHOLE] >= rate[KEPT] > rate[DROPPED]
        assert rate[DROPPED] == rate[INTACT] * Fraction(3, 4)


def test_a_decision_says_what_it_cost_as_plain_values() -> None:
    now = pipeline(8)
    rules = Rules(ASSIGNMENTS)
    decision = decide(now, lose(now.members, {1: [2]}), Layers((Fraction(1, 3),) * 8), Machine(clocks=GPU), rules)
    told = json.loads(json.dumps(decision.json()))
    assert told["members"][1] == [4, 5, 7]
    assert [reason["axis"] for reason in told["reasons"]] == ["random", "dataflow", "graph", "frequency"]
    _, dataflow, graph, frequency = told["reasons"]
    assert dataflow["seconds"]["after"] == min(dataflow["tried"].values())
    assert set(dataflow["tried"]) == set(ASSIGNMENTS)
    assert graph["seconds"]["before"] == dataflow["seconds"]["after"]
    assert graph["decision"] == "keep"
    assert frequency["clocks"] == [1.0, 1.2, 1.0, 1.0]
    assert told["seconds"]["after"] == frequency["seconds"]["after"] < frequency["seconds"]["before"]


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_no_axis_makes_a_step_longer_and_whatever_is_decided_can_be_run(data: st.DataObject) -> None:
    stages, replicas = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 3))
    count = data.draw(st.integers(stages, 8))
    now = pipeline(count, stages, replicas, replicas * data.draw(st.integers(1, 3)), 2)
    layers = Layers(tuple(data.draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))))
    losses = {stage: list(range(data.draw(st.integers(0, replicas - 1)))) for stage in range(stages)}
    left = lose(now.members, losses)
    decision = decide(now, left, layers, Machine(clocks=GPU), Rules(ASSIGNMENTS))
    assert decision.pipeline.members == left
    assert {layer for stage in range(stages) for layer in decision.pipeline.split.layers_of(stage)} == set(range(count))
    seconds = [reason["seconds"] for reason in decision.reasons if "seconds" in reason]
    assert decision.after.seconds <= min(seconds[0]["after"], *(one["before"] for one in seconds[1:])) + 1e-9
    schedule = decision.after.schedule
    assert schedule is not None
    assert schedule.tables == decision.pipeline.tables
    check_rendezvous(lower_members(schedule))
    json.dumps(decision.json())


def test_nothing_changed_changes_nothing() -> None:
    now = pipeline()
    decision = decide(now, now.members, Layers((1,) * 16), Machine(clocks=GPU), Rules(ASSIGNMENTS))
    assert decision.pipeline == now
    assert set(decision.clocks) == {GPU.base}
    assert decision.before is not None
    assert decision.after.seconds == decision.before.seconds


def test_who_comes_back_gets_the_pipeline_back() -> None:
    now, layers = pipeline(), Layers((1,) * 16)
    lost = decide(now, lose(now.members, {3: [1]}), layers, rules=Rules(("reshape",)))
    assert lost.pipeline.split != now.split
    back = [*lost.pipeline.members[:3], (12, 14, 15, 99)]
    found = decide(lost.pipeline, back, layers, rules=Rules(("runs",)))
    assert found.pipeline.split == now.split
    assert found.after.seconds == Fraction(21) * Fraction(4, 3)


def test_a_step_too_long_to_replay_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    now, layers = pipeline(), Layers((1,) * 16)
    replayed = step_of(now, layers, Machine())
    monkeypatch.setattr(step_module, "MOST_ACTIONS", 10)
    estimated = step_of(now, layers, Machine())
    assert replayed is not None
    assert estimated is not None
    assert estimated.how == "estimated"
    assert estimated.seconds == replayed.seconds  # of an intact pipeline, exactly
    decision = decide(now, lose(now.members, {1: [0]}), layers, Machine(clocks=GPU))
    assert decision.after.how == "estimated"


def test_a_change_of_a_run_s_view_is_planned() -> None:
    view = first_view(range(8), dict.fromkeys(range(8), "here"), 2, (0, 8, 16))
    now = Pipeline.of_view(view, 16, 16, 3)
    assert now.members == ((0, 1, 2, 3), (4, 5, 6, 7))
    after = changed(view, gone=[5])
    decision = decide(now, [stage.members for stage in after.stages], Layers((1,) * 16), rules=Rules(("runs",)))
    assert decision.pipeline.members == ((0, 1, 2, 3), (4, 6, 7))
    assert decision.pipeline.split.counts() == (10, 6)  # 6 of 4 micro-batches each: 10 beside 1.5 * 6
    alone = Pipeline.of_view(first_view([3, 4], {3: "a", 4: "b"}), 16, 4, 1)
    assert alone.split.bounds == (0, 16)
    assert (
        decide(alone, [(4,)], Layers((1,) * 16)).after.seconds
        == 2 * decide(alone, [(3, 4)], Layers((1,) * 16)).after.seconds
    )


def test_what_cannot_be_planned_is_said() -> None:
    now = pipeline()
    for act, message in (
        (lambda: Layers(()), "at least one layer"),
        (lambda: Layers((1, 2), weights=(1.0,)), "weights are given for 1 layers, seconds for 2"),
        (lambda: Layers((1,), forward=2), "between 0 and 1"),
        (lambda: Machine(bandwidth=0), "cannot be negative"),
        (lambda: Rules(()), "given is none"),
        (lambda: Rules(("half",)), r"given is \['half'\]"),  # type: ignore[arg-type]
        (lambda: Rules(horizon=-1), "cannot be negative"),
        (lambda: Pipeline.of(Split((0, 1)), [[1, 2, 3]], 2, 1), "no more than the 2 micro-batches"),
        (lambda: Pipeline.of(Split((0, 1)), [[1], [2]], 2, 1), "2 slot tables are given for 1 stages"),
        (lambda: lose(now.members, {7: [0]}), "no stage 7; there are 4"),
        (lambda: lose(now.members, {0: [4]}), "stage 0 has replicas 0 to 3, and no 4"),
        (lambda: lose(now.members, {0: range(4)}), "stage 0 has lost all"),
        (lambda: decide(now, [range(40)] * 4, Layers((1,) * 16), rules=Rules(("runs",))), "a step cannot be dealt"),
        (lambda: decide(now, [range(4)] * 3, Layers((1,) * 16)), "members are given for 3 stages"),
        (lambda: policies(now, {}, Layers((1,) * 16, states=(1.0,) * 16), Machine(memory=0.5)), "too little memory"),
    ):
        with pytest.raises(PlanError, match=message):
            act()


# ---- costs -----------------------------------------------------------------------------------------------------------


def test_measured_passes_scale_what_layers_cost() -> None:
    from resilin.cluster.axes.of_decoder import measured

    split = Split((0, 2, 3))
    passes = [
        Record(Action(kind, stage, micro), stage, start, start + took)
        for stage, kind, took in ((0, Kind.F, 1.0), (0, Kind.B, 3.0), (1, Kind.F, 2.0), (1, Kind.B, 2.0))
        for micro, start in enumerate((10.0 * (kind is Kind.B), 20.0 + 10.0 * (kind is Kind.B)))
    ]
    layers = measured(Layers((1, 3, 1), head=1), Timeline.of(passes), split)
    assert layers.seconds == (1.0, 3.0, 2.0)
    assert layers.head == 2.0
    assert layers.of_stages(split) == (4.0, 4.0)
    assert layers.forward == 3 / 8
    with pytest.raises(PlanError, match="stage 1 has no forward or no backward"):
        measured(Layers((1, 3, 1)), Timeline.of(passes[:4]), split)


def test_a_decoder_s_blocks_cost_what_they_compute_and_hold() -> None:
    from resilin.cluster.axes.of_decoder import layers_of
    from resilin.models.decoder import Decoder
    from resilin.models.decoder_settings import DecoderSettings
    from resilin.models.flops import train_flops_per_token
    from resilin.models.settings import ModelContext

    settings_ = DecoderSettings(vocab_size=50, hidden_size=16, layers=3, heads=2, mlp_size=24)
    decoder = settings_.outline(ModelContext(0))
    assert isinstance(decoder, Decoder)
    found = layers_of(decoder, 2, 8, flops_per_second=10.0)
    assert sum(found.seconds) + found.head == pytest.approx(16 * train_flops_per_token(settings_, 8) / 10)
    block = sum(p.numel() for name, p in decoder.named_parameters() if name.startswith("blocks.1."))
    assert found.weights == (4.0 * block,) * 3
    assert found.states == (12.0 * block,) * 3
    assert min(found.activations) > 0
