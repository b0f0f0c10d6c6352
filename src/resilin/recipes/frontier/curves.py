"""One choice at a time, as the cost model has it for 22 billion parameters; and scaling of the published models."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from resilin.models.decoder_settings import DecoderSettings
from resilin.parallel.settings import ParallelSettings
from resilin.planner.cost import STACKS, Arrangement, Prediction, Stack, Workload, predict
from resilin.planner.cost.arrangement import Recompute
from resilin.planner.hardware import load_cluster
from resilin.recipes.frontier.machine import MACHINE, STACK

TOKENS, VOCABULARY, FEW = 2048, 51200, 1024
TENSORS, MICROS, STAGES = (1, 2, 4, 8, 16), (4, 8, 16, 32, 64, 128), (1, 2, 4, 8, 16)
SHAPES = {"22B": (6144, 48, 48), "175B": (12288, 96, 96), "1T": (25600, 128, 160)}
"""Hidden size, layers, heads of models of the published sizes."""
REPLICAS = {"175B": (4, 16, 640, 1024), "1T": (8, 64, 1600, 3072)}
"""Tensor degree, stages and micro-batches of one replica, and the dies that it is scaled to: choices of this recipe."""


def _model(name: str, vocabulary: int) -> DecoderSettings:
    hidden, layers, heads = SHAPES[name]
    return DecoderSettings(
        vocab_size=vocabulary,
        hidden_size=hidden,
        layers=layers,
        heads=heads,
        mlp_size=4 * hidden,
        gated=False,
        norm="layer",
        tie_embeddings=True,
    )


@cache
def _work(name: str, vocabulary: int) -> Workload:
    return Workload(_model(name, vocabulary), TOKENS, 1)


@cache
def step(
    name: str,
    tensor: int = 1,
    pipeline: int = 1,
    data: int = 1,
    micros: int = 64,
    micro: int = 1,
    chunks: int = 1,
    recompute: Recompute = "block",
    fused: bool = True,
    divided: bool = True,
    vocabulary: int = VOCABULARY,
) -> Prediction:
    """A step of a model in a layout, on as many dies as that takes; memory is not looked at."""
    stack: Stack = replace(STACKS[STACK], fused_attention=fused)
    layers = SHAPES[name][1]
    even = (layers // (pipeline * chunks),) * (pipeline * chunks) if pipeline > 1 else ()
    parallel = ParallelSettings(
        data=data,
        tensor=tensor,
        pipeline=pipeline,
        chunks=chunks,
        schedule="interleaved" if chunks > 1 else "1f1b",
        layers=even,
        sequence=False,
    )
    plan = Arrangement(parallel, micro, recompute, "fp16", states_divided=divided)
    work = _work(name, vocabulary).with_batch(micros * micro * data)
    return predict(work, plan, load_cluster(MACHINE), stack, exact=False)


def tflops(one: Prediction) -> float:
    """A die's, as Megatron counts them."""
    return one.megatron_flops_per_device() / 1e12


def rate(one: Prediction) -> float:
    """Tokens a second of a die."""
    return one.tokens_per_second / one.workers


def tensor_curve() -> list[float]:
    """Tokens a second of a die against the tensor degree: of two dies of a card, a node of eight, two nodes."""
    return [rate(step("22B", tensor=tensor, pipeline=4)) for tensor in TENSORS]


def micros_curve() -> list[float]:
    """Against the number of micro-batches, of eight stages."""
    return [rate(step("22B", tensor=2, pipeline=8, micros=micros)) for micros in MICROS]


def stages_curve(ratio: int | None = None) -> list[float]:
    """Against the number of stages, of 64 micro-batches, or of so many for each stage.

    The vocabulary is small: of few blocks in a stage, the head on the last one would be what is seen.
    """
    return [
        rate(step("22B", tensor=2, pipeline=p, micros=64 if ratio is None else ratio * p, vocabulary=FEW))
        for p in STAGES
    ]


def switches() -> dict[str, float]:
    """What each switch makes of the rate: with it over without it."""
    base = {"tensor": 2, "pipeline": 8, "data": 8, "micros": 16}
    plain = rate(step("22B", **base))
    return {
        "flash attention": plain / rate(step("22B", **base, fused=False)),
        "interleaving, 3 chunks": rate(step("22B", **base, chunks=3)) / plain,
        "recomputing blocks": plain / rate(step("22B", **base, recompute="none")),
        "ZeRO-1": plain / rate(step("22B", **base, divided=False)),
    }


def weak(name: str) -> list[tuple[int, float]]:
    """(dies, rate of a die over that of one replica) with as many rows for each replica."""
    tensor, pipeline, micros, most = REPLICAS[name]
    one = rate(step(name, tensor=tensor, pipeline=pipeline, micros=micros))
    each = tensor * pipeline
    return [
        (each * d, rate(step(name, tensor=tensor, pipeline=pipeline, data=d, micros=micros)) / one)
        for d in _replicas(each, most)
    ]


def strong(name: str) -> list[tuple[int, float, float]]:
    """(dies, rate of a die over that of one replica, what the bubble alone leaves) with as many rows in all."""
    tensor, pipeline, _, most = REPLICAS[name]
    each, counts = tensor * pipeline, _replicas(tensor * pipeline, most)
    rows = counts[-1] * (8000 // counts[-1])
    one = rate(step(name, tensor=tensor, pipeline=pipeline, micros=rows))
    found = []
    for d in counts:
        if rows % d:
            continue
        share = rate(step(name, tensor=tensor, pipeline=pipeline, data=d, micros=rows // d)) / one
        found.append((each * d, share, (1 + (pipeline - 1) / rows) / (1 + (pipeline - 1) * d / rows)))
    return found


def _replicas(each: int, most: int) -> list[int]:
    """Numbers of replicas, doubling, up to all dies."""
    last = most // each
    return [d for d in (1, 2, 4, 8, 16, 32) if d < last] + [last]
