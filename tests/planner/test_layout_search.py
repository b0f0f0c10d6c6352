"""The search finds what brute force finds, keeps what is fixed, and says what is missing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from resilin.config import UserError
from resilin.models.chain_settings import ChainSettings
from resilin.models.decoder_settings import DecoderSettings, MoESettings
from resilin.parallel.part import cutting_of
from resilin.parallel.world import World
from resilin.planner.cost import RESILIN, Workload, predict
from resilin.planner.cost.memory import host_bytes
from resilin.planner.hardware import load_cluster
from resilin.planner.search import Fixed, arrangements, find, missing
from resilin.planner.search.find import pareto, usable
from resilin.planner.search.request import LayoutRequest, answer_layout, overrides_of, settings_of
from resilin.planner.search.shapes import known_shapes, load_shape

A100 = load_cluster("dgx-a100-40")
MODEL = DecoderSettings(vocab_size=50304, hidden_size=2048, layers=12, heads=16, gated=False, mlp_size=8192)
WORK = Workload(MODEL, 2048, 32)
CHAINS = MODEL.model_copy(update={"chains": ChainSettings(sizes=(8, 8))})
MOE = DecoderSettings(vocab_size=32000, hidden_size=512, layers=4, heads=8, moe=MoESettings(experts=8))


def asked(**more: object) -> LayoutRequest:
    given = {"cluster": "dgx-a100-40", "workers": 8, "tokens": 1e9, "model": "gpt-1.3b"}
    return LayoutRequest(**{**given, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize("work", [WORK, Workload(MOE, 32_768, 16), Workload(CHAINS, 2048, 32)])
def test_every_layout_can_be_cut_by_the_runtime(work: Workload) -> None:
    found = list(arrangements(work, A100, 8))
    assert len({(str(one), one.degrees) for one in found}) == len(found)
    kinds: set[object] = set()
    for one in found:
        assert one.degrees.workers == 8
        assert work.batch % (one.replicas * one.micro) == 0
        key = (one.degrees, one.parallel.chunks, one.parallel.schedule)
        if key not in kinds:
            kinds.add(key)
            cutting_of(one.parallel, World(one.degrees), work.outline, work.tokens)
    assert {one.degrees.expert for one in found} == ({1, 2, 4, 8} if work.model.moe else {1})
    assert any(one.degrees.tensor > 1 for one in found) is (work.model.chains is None)
    assert any(one.degrees.context > 1 for one in found) is (work.tokens > 16_384)


def test_the_best_is_that_of_pricing_everything() -> None:
    found = find(WORK, A100, [8], 1e9)
    every = [predict(WORK, plan, A100) for plan in arrangements(WORK, A100, 8)]
    fitting = [step for step in every if step.memory.total <= usable(A100)]
    least = min(step.seconds for step in fitting)
    assert found.best[0].step.seconds == pytest.approx(least, rel=1e-9)
    assert found.tried == len(every)
    assert found.best[0].seconds == pytest.approx(1e9 / WORK.step_tokens * least)


def test_what_is_fixed_stays() -> None:
    fixed = Fixed(parallel={"tensor": 2, "sharding": "zero1"}, micro=2, recompute="block", compute="fp32")
    for one in find(WORK, A100, [8], 1e9, fixed).best:
        assert (one.step.plan.degrees.tensor, one.step.plan.micro) == (2, 2)
        assert (one.step.plan.recompute, one.step.plan.compute) == ("block", "fp32")
        assert one.step.plan.parallel.sharding == "zero1"


def test_nobody_in_the_pareto_set_is_beaten() -> None:
    found = find(WORK, A100, [4, 8], 1e9)
    kept = [(one.seconds, one.step.workers, one.step.memory.total) for one in found.pareto]
    assert len(kept) > 1
    for one in kept:
        assert not any(other != one and all(a <= b for a, b in zip(other, one, strict=True)) for other in kept)
    assert pareto(found.pareto) == found.pareto


def test_cheapest_and_quickest_are_not_the_same_where_fewer_may_be_used() -> None:
    few = {"workers": 16, "fewer": True, "overrides": ("parallel.pipeline=1", "train.batch_size=64")}
    quick = answer_layout(asked(**few)).found.best[0]
    cheap = answer_layout(asked(**few, objective="cost")).found.best[0]
    frugal = answer_layout(asked(**few, objective="energy")).found.best[0]
    assert quick.cost is not None
    assert cheap.cost is not None
    assert cheap.cost < quick.cost
    assert quick.seconds < cheap.seconds
    assert frugal.joules is not None
    assert quick.joules is not None
    assert frugal.joules <= quick.joules


def test_a_model_that_fits_nowhere_gets_the_smallest_cluster_that_would_do() -> None:
    big = replace(
        WORK, model=MODEL.model_copy(update={"hidden_size": 8192, "mlp_size": 32768, "layers": 48, "heads": 64})
    )
    found = find(big, A100, [8], 1e9)
    assert not found.best
    assert found.smallest is not None
    gone = missing(big, A100, 8, found.smallest)
    assert gone.needed.total > gone.limit == usable(A100)
    assert gone.workers is not None
    small = Fixed(micro=1, recompute="block")
    assert find(big.with_batch(gone.batch), A100, [gone.workers], 1e9, small).best
    fewer = gone.workers - A100.node
    assert not find(big.with_batch(-(-32 // fewer) * fewer), A100, [fewer], 1e9, small).best


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"overrides": ("parallel.tensor=3",)}, "8 workers cannot be divided|does not divide"),
        ({"overrides": ("parallel.tensor=2", "parallel.data=2", "parallel.pipeline=2", "parallel.context=2")}, "16"),
        ({"overrides": ("parallel.pipeline=32",), "workers": 64}, "more stages than the model's 24 blocks"),
        ({"overrides": ("parallel.tensor=32",), "workers": 64}, "more than the model's 16 heads"),
        ({"overrides": ("parallel.expert=2",)}, "no experts"),
        ({"overrides": ("parallel.replicate=2",)}, "replicate has a meaning with sharding"),
        ({"overrides": ("train.micro_batch_size=5",)}, "does not divide the 512 rows"),
        ({"overrides": ("precision.compute=fp8",)}, "no peak for fp8"),
        ({"overrides": ("model.offload=host", "model.recompute=none")}, "contradicts model.recompute=none"),
        ({"overrides": ("model.offload=host",), "cluster": "laptop", "workers": 4}, "is that of the host"),
        ({"overrides": ("model.offload=disk",), "cluster": "frontier"}, r"has no table \[disk\]"),
        ({"overrides": ("parallel.tensr=2",)}, "did you mean 'tensor'"),
        ({"tokens": 10.0}, "how long is the run"),
        ({"tokens": None}, "how long is the run"),
        ({"workers": 0}, "say --workers"),
        ({"workers": 31}, "use a batch that 31 divides"),
        ({"model": "gpt-13"}, "did you mean 'gpt-13b'"),
        ({"model": None}, "a layout needs a model"),
        ({"cluster": "laptop", "workers": 8}, "more than the 4 devices"),
    ],
)
def test_what_contradicts_itself_is_refused(more: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        answer_layout(asked(**more))


def test_known_shapes_have_the_parameters_that_their_names_say() -> None:
    for name in known_shapes():
        shape = load_shape(name)
        size = name.rsplit("-", 1)[1]
        if "x" in size:
            continue
        wanted = float(size[:-1]) * (1e12 if size.endswith("t") else 1e9)
        step = Workload(shape.model, shape.tokens, 1)
        total = sum(map(sum, step.local(1, 1).blocks)) + step.local(1, 1).embedding + step.local(1, 1).head
        assert total == pytest.approx(wanted, rel=0.04), name
        assert shape.source


def test_a_plan_counts_on_less_than_all_memory() -> None:
    assert usable(A100) == pytest.approx(40e9 * (1 - RESILIN.headroom))


def test_inputs_of_recomputed_blocks_may_wait_in_host_memory() -> None:
    found = list(arrangements(WORK, A100, 8))
    assert {one.recompute for one in found if one.offload == "host"} == {"block"}
    assert all(one.offload == "none" for one in arrangements(WORK, load_cluster("laptop"), 4))
    fixed = list(arrangements(WORK, A100, 8, Fixed(offload="disk")))
    assert {(one.recompute, one.offload) for one in fixed} == {("block", "disk")}


def test_offloading_needs_less_memory_and_what_the_host_cannot_hold_is_left_out() -> None:
    fixed = Fixed(parallel={"data": 8, "tensor": 1, "pipeline": 1}, micro=4, recompute="block")
    kept, away = (find(WORK, A100, [8], 1e9, replace(fixed, offload=one)).best[0].step for one in ("none", "host"))
    assert away.memory.total < kept.memory.total
    assert away.seconds >= kept.seconds
    # 12 blocks, of 4 rows of 2,048 tokens of 2,048 values in 2 bytes
    assert host_bytes(WORK, away.plan) == 12 * 4 * 2048 * 2048 * 2
    assert host_bytes(WORK, kept.plan) == 0
    assert A100.host is not None
    small = A100.model_copy(update={"host": A100.host.model_copy(update={"memory": 1e8})})
    assert not find(WORK, small, [8], 1e9, replace(fixed, offload="host")).best


def test_settings_that_offload_say_so() -> None:
    data = ("source.use=resilin.data.packed:Shards", "source.path=/data/tokens")
    answer = answer_layout(asked(overrides=(*data, "model.offload=host")))
    step = answer.found.best[0].step
    assert 'offload = "host"' in settings_of(answer, step)
    assert "model.offload=host" in overrides_of(step)
