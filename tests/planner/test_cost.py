"""What a layout is said to cost agrees with closed forms, with the runtime's own cutting, and with built models."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings, MoESettings
from resilin.models.flops import parameter_counts, train_flops_per_token
from resilin.models.memory import TensorRanks, activation_bytes
from resilin.models.step_flops import step_flops_per_token
from resilin.parallel.canonical import GradientSum
from resilin.parallel.degrees import Degrees
from resilin.parallel.part import cutting_of
from resilin.parallel.pipeline import peak_in_flight
from resilin.parallel.settings import ParallelSettings
from resilin.parallel.world import World
from resilin.planner.cost import Arrangement, Workload, memory_of, predict
from resilin.planner.cost.blocks import Pricing, block_times
from resilin.planner.cost.links import Span, all_to_all_seconds, gather_seconds, message_seconds, span_of
from resilin.planner.cost.memory import _short, _sums_held, _sums_while, memory_of_ranks
from resilin.planner.cost.stack import MEGATRON_2021, RESILIN
from resilin.planner.hardware import load_cluster

A100 = load_cluster("dgx-a100-80")
DENSE = DecoderSettings(vocab_size=96, hidden_size=32, layers=6, heads=4, kv_heads=2, tie_embeddings=True)
MOE = DecoderSettings(
    vocab_size=96, hidden_size=32, layers=4, heads=4, moe=MoESettings(experts=4, expert_size=24, dense_layers=(0,))
)
LARGE = DecoderSettings(vocab_size=51200, hidden_size=4096, layers=32, heads=32, gated=False, mlp_size=16384)


def arranged(micro: int = 1, **parallel: object) -> Arrangement:
    return Arrangement(ParallelSettings.model_validate({"data": 1, **parallel}), micro)


@pytest.mark.parametrize("model", [DENSE, MOE])
def test_counts_are_those_of_the_built_model(model: DecoderSettings) -> None:
    built, work = Decoder(model, seed=0), Workload(model, 16, 8)
    local = work.local(1, 1)
    total = sum(map(sum, local.blocks)) + local.embedding + local.head + local.norm
    assert total == sum(p.numel() for p in built.parameters()) == parameter_counts(model).total
    step = predict(work, arranged(), A100)
    assert step.parameters() == total
    flops = step.flops_per_device * step.seconds
    assert flops == pytest.approx(16 * 8 * step_flops_per_token(built, 16))
    assert flops == pytest.approx(16 * 8 * train_flops_per_token(model, 16))


@pytest.mark.parametrize("degrees", [Degrees(pipeline=2, tensor=2), Degrees(data=4, tensor=2, expert=2)])
def test_the_fullest_rank_has_what_the_runtime_gives_it(degrees: Degrees) -> None:
    model = MOE if degrees.expert > 1 else DENSE
    work = Workload(model, 16, 16)
    plan = arranged(1, data=degrees.data, pipeline=degrees.pipeline, tensor=degrees.tensor, expert=degrees.expert)
    world = World(degrees)
    specs = cutting_of(plan.parallel, world, work.outline, 16).specs
    held = [0] * degrees.workers
    for spec in specs.values():
        mesh = degrees.expert_mesh if any(cut.axis == "ep" for cut in spec.cuts) else degrees.mesh
        for rank, shape in enumerate(spec.local_shapes(mesh)):
            held[rank] += 0 if shape is None else math.prod(shape)
    assert max(one.weights for one in memory_of_ranks(work, plan, RESILIN)) == 4 * max(held)


def test_activations_follow_the_schedule_of_the_runtime() -> None:
    work = Workload(LARGE, 2048, 64)
    for schedule, chunks in (("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zb-h1", 1)):
        plan = arranged(1, pipeline=4, schedule=schedule, chunks=chunks)
        kept = activation_bytes(LARGE, 1, 2048, value_bytes=2, logit_rows=0, blocks=range(8 // chunks))
        held = max(peak_in_flight(plan.schedule(work)))
        plain = replace(RESILIN, name="one sum of gradients")
        found = max(one.activations for one in memory_of_ranks(work, plan, plain))
        assert found == pytest.approx(float(held) * kept, rel=0.15), schedule


@pytest.mark.parametrize("micros", [1, 2, 3, 4, 7, 8, 15, 16])
def test_sums_of_gradients_are_those_that_the_runtime_holds(micros: int) -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    sums, most = GradientSum([parameter], micros), 0
    for micro in range(micros):
        parameter.grad = torch.ones(2) if parameter.grad is None else parameter.grad + 1
        held = len(sums._tree._nodes) + 1
        assert held == _sums_while(micro)
        most = max(most, held)
        sums.collect()
    assert most == _sums_held(arranged(1), Workload(DENSE, 16, micros))


def test_what_is_held_and_summed_is_never_more_than_the_most_of_both() -> None:
    work = Workload(LARGE, 2048, 8)
    for schedule in ("gpipe", "1f1b"):
        plan = arranged(1, pipeline=2, schedule=schedule)
        exact, bound = (memory_of(work, plan, RESILIN, exact=one) for one in (True, False))
        assert exact.total < bound.total if schedule == "gpipe" else exact.total <= bound.total


def test_a_short_schedule_holds_as_much_as_the_whole_one() -> None:
    for schedule, chunks in (("1f1b", 1), ("interleaved", 2), ("interleaved", 4), ("zb-h1", 1), ("zb-v", 1)):
        for micros in (3, 12, 17, 40):
            work = Workload(DENSE.model_copy(update={"layers": 16}), 16, micros)
            plan = arranged(1, pipeline=4, schedule=schedule, chunks=chunks)
            kept = [one.activations for one in memory_of_ranks(work, plan, RESILIN)]
            sizes = [1.0] * len(plan.stages(work)[1])
            whole, short = (peak_in_flight(one, sizes) for one in (plan.schedule(work), _short(plan, work)))
            assert whole == short, (schedule, chunks, micros)
            assert len(kept) == 4


def test_closed_form_and_schedule_agree_about_memory_and_time() -> None:
    work = Workload(LARGE, 2048, 64)
    for schedule, chunks in (("1f1b", 1), ("interleaved", 4)):
        plan = arranged(1, pipeline=4, data=2, schedule=schedule, chunks=chunks)
        exact, quick = predict(work, plan, A100), predict(work, plan, A100, exact=False)
        assert quick.seconds == pytest.approx(exact.seconds, rel=0.05)
        assert exact.memory.total <= quick.memory.total * 1.001
        assert quick.memory.total == pytest.approx(exact.memory.total, rel=0.13)


def test_a_long_step_is_replayed_in_part_without_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Workload(LARGE, 2048, 210)
    plan = arranged(1, pipeline=4, schedule="interleaved", chunks=2)
    whole = predict(work, plan, A100)
    monkeypatch.setattr("resilin.planner.cost.step.MOST_ACTIONS", 500)
    assert predict(work, plan, A100).seconds == pytest.approx(whole.seconds, rel=1e-9)


def test_without_other_ranks_nothing_is_sent_and_nobody_waits() -> None:
    step = predict(Workload(LARGE, 2048, 8), arranged(2), A100)
    assert step.bubble == step.reduction == step.messages == step.busiest.tensor == 0.0


def test_a_pipeline_waits_as_its_paper_says() -> None:
    """Narayanan et al. 2021, section 2.2: the bubble is (p - 1) / m of the ideal time, and a v-th of it interleaved."""
    even = LARGE.model_copy(update={"vocab_size": 1})  # a head would make the last stage slower
    free = A100.model_copy(
        update={"levels": tuple(level.model_copy(update={"bandwidth": 1e18, "latency": 0.0}) for level in A100.levels)}
    )
    for chunks in (1, 2, 4):
        name = "interleaved" if chunks > 1 else "1f1b"
        plan = arranged(1, pipeline=4, schedule=name, chunks=chunks, layers=(32 // (4 * chunks),) * 4 * chunks)
        step = predict(Workload(even, 2048, 16), plan, free)
        assert step.bubble / step.busiest.total == pytest.approx(3 / (16 * chunks), rel=0.01)


@settings(max_examples=40, deadline=None)
@given(size=st.sampled_from([1, 2, 3, 4, 8, 16, 64]), stride=st.sampled_from([1, 2, 8, 16]), count=st.floats(1, 1e10))
def test_more_ranks_and_more_bytes_never_take_less(size: int, stride: int, count: float) -> None:
    one = gather_seconds(A100, Span(size, stride), count)
    assert gather_seconds(A100, Span(2 * size, stride), count) >= one
    assert gather_seconds(A100, Span(size, stride), 2 * count) >= one
    assert (one == 0) is (size == 1)


def test_volumes_are_those_of_rings() -> None:
    speed = 300e9 * A100.efficiency.links
    assert gather_seconds(A100, Span(8), 8e9) == pytest.approx(7e9 / speed + 7 * 5e-6)
    assert all_to_all_seconds(A100, Span(8), 8e9) == pytest.approx(7e9 / speed + 5e-6)
    # Across nodes the 8 devices of each send together over 8 adapters.
    outside = 25e9 * A100.efficiency.links
    assert gather_seconds(A100, Span(16), 16e9) == pytest.approx(15e9 / (8 * outside), rel=1e-2)
    assert message_seconds(A100, 8, 1e9) == pytest.approx(1e9 / outside + 10e-6)
    assert message_seconds(A100, 4, 1e9) < message_seconds(A100, 8, 1e9)


def test_a_group_s_distance_is_that_of_the_runtime_s_mesh() -> None:
    degrees = Degrees(pipeline=2, replicate=2, data=3, context=2, tensor=4)
    world = World(degrees)
    for axes in (("tp",), ("cp",), ("dp",), ("rep",), ("pp",)):
        ranks = next(iter(world.members(*axes)))
        assert span_of(degrees, *axes) == Span(len(ranks), ranks[1] - ranks[0])
    assert span_of(degrees, "dp", "cp") == Span(6, 4)


def test_tensor_parallelism_costs_more_once_it_leaves_the_node() -> None:
    work = Workload(LARGE, 2048, 16)
    seconds = [predict(work, arranged(1, tensor=t), A100).busiest.tensor for t in (2, 4, 8, 16)]
    assert seconds[0] < seconds[1] < seconds[2]
    assert seconds[3] > 1.4 * seconds[2]


def test_four_directions_of_the_frontier_study() -> None:
    """Dash et al. 2023, section 4: what raising one degree does to the throughput of each device."""
    frontier = load_cluster("frontier")
    even = LARGE.model_copy(update={"vocab_size": 1024})  # a large head would make the last of many stages the slowest

    def rate(batch: int, **parallel: int) -> float:
        step = predict(Workload(even, 2048, batch), arranged(1, **parallel), frontier)
        return step.flops_per_device

    tensor = [rate(64, tensor=t) for t in (1, 2, 4, 8, 16)]
    assert tensor == sorted(tensor, reverse=True)
    more = [rate(batch, pipeline=8) for batch in (8, 16, 32, 64, 128)]
    assert more == sorted(more)
    stages = [rate(32, pipeline=p) for p in (2, 4, 8, 16)]
    assert stages == sorted(stages, reverse=True)
    alike = [rate(8 * p, pipeline=p) for p in (2, 4, 8)]
    assert max(alike) / min(alike) < 1.1


def test_recomputing_saves_memory_and_costs_time() -> None:
    work = Workload(LARGE, 2048, 16)
    found = [predict(work, replace(arranged(4), recompute=kind), A100) for kind in ("none", "selective", "block")]
    assert [one.memory.activations for one in found] == sorted([o.memory.activations for o in found], reverse=True)
    assert [one.seconds for one in found] == sorted(one.seconds for one in found)
    assert found[2].seconds / found[0].seconds == pytest.approx(4 / 3, rel=0.08)


def test_sequence_parallelism_divides_what_tensor_parallelism_leaves() -> None:
    """Korthikanti et al. 2022, table 2: without it norms' inputs stay whole on every rank."""
    bare = activation_bytes(LARGE, 1, 2048, logit_rows=0)
    plain = activation_bytes(LARGE, 1, 2048, logit_rows=0, ranks=TensorRanks(8, sequence=False))
    parts = activation_bytes(LARGE, 1, 2048, logit_rows=0, ranks=TensorRanks(8, regathers=True))
    assert bare / 8 < parts < plain < bare
    assert parts == pytest.approx(bare / 8, rel=0.1)


def test_experts_cost_more_where_their_rows_are_uneven() -> None:
    work = Workload(MOE.model_copy(update={"hidden_size": 1024}), 2048, 32)
    plan = arranged(4, data=4, expert=4)
    even, uneven = (predict(work, plan, A100, imbalance=factor) for factor in (1.0, 2.0))
    assert uneven.busiest.expert == pytest.approx(2 * even.busiest.expert, rel=0.05)
    assert uneven.busiest.products > even.busiest.products


def test_offloaded_inputs_leave_the_device_and_wait_for_slow_disks() -> None:
    work = Workload(LARGE, 8192, 8)
    plan = replace(arranged(1), recompute="block")
    slow = A100.model_copy(update={"disk": A100.disk.model_copy(update={"read": 1e6, "write": 1e6})})  # type: ignore[union-attr]
    here, disk = predict(work, plan, slow), predict(work, replace(plan, offload="disk"), slow)
    assert disk.memory.activations < here.memory.activations
    assert disk.busiest.offload > here.busiest.offload == 0.0


def test_adam_takes_the_published_bytes_a_parameter() -> None:
    """Megatron-LM, theoretical_memory_usage.py: 16 for fp16, of which ZeRO-1 leaves 4 + 12 / d."""
    count = parameter_counts(LARGE).total
    for data, per in ((1, 16), (4, 4 + 12 / 4)):
        memory = memory_of(Workload(LARGE, 2048, 8), arranged(1, data=data), MEGATRON_2021)
        assert memory.weights + memory.gradients + memory.states == pytest.approx(per * count)


def test_an_attention_block_s_backward_is_twice_its_forward() -> None:
    times = block_times(Pricing(Workload(LARGE, 2048, 8), arranged(4), A100, RESILIN), 0)
    assert times.backward.products == pytest.approx(2 * times.forward.products, rel=0.1)


def test_where_memory_is_shared_data_parallelism_sends_nothing() -> None:
    laptop = load_cluster("laptop")
    (level,) = laptop.levels
    assert (level.shared, level.devices) == (True, 4)
    slow, apart, both = (
        laptop.model_copy(update={"levels": (level.model_copy(update=update),)})
        for update in ({"bandwidth": 1e6}, {"shared": False}, {"bandwidth": 1e6, "shared": False})
    )
    work, plan = Workload(DENSE, 64, 8), replace(arranged(1, data=4), compute="fp32")
    shared, shared_slow, sent, sent_slow = (predict(work, plan, one).reduction for one in (laptop, slow, apart, both))
    assert 0 < shared == shared_slow
    assert 10 * sent < sent_slow
    wide = replace(arranged(1, data=8), compute="fp32")  # more workers than one machine has cores
    outer = level.model_copy(update={"name": "network", "devices": 0, "shared": False})
    two, cut = (laptop.model_copy(update={"levels": (one, outer)}) for one in (level, apart.levels[0]))
    assert predict(work, wide, two).reduction == predict(work, wide, cut).reduction
    assert predict(work, plan, two).reduction == shared
