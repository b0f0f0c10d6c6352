"""How many bytes the fullest rank needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from resilin.models.memory import TensorRanks, activation_bytes
from resilin.objective.cross_entropy import chunk_rows
from resilin.parallel.pipeline import METHODS, Schedule, peak_in_flight
from resilin.parallel.pipeline.schedule import B, F, W
from resilin.parallel.reduction import BUCKET_BYTES
from resilin.planner.cost.arrangement import Arrangement, Workload
from resilin.planner.cost.device_time import BYTES
from resilin.planner.cost.parameters import LocalParameters
from resilin.planner.cost.stack import RESILIN, Stack

MOST_ACTIONS = 4_000
"""Of schedules along which activations and sums of gradients are counted together."""
WHOLE_LOGITS = 10
"""Bytes for each logit that is held whole: 16 bits from the product, float32, and the gradient."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        weights: of its part of the model.
        gradients: of it.
        states: of the optimizer, and an owner's copies.
        gathered: weights and gradients that FSDP has put together for a time.
        activations: of the micro-batches under way, and the logits.
        buffers: of messages.
    """

    weights: float
    gradients: float
    states: float
    gathered: float
    activations: float
    buffers: float = 0.0

    @property
    def total(self) -> float:
        """Of everything."""
        return self.weights + self.gradients + self.states + self.gathered + self.activations + self.buffers

    @property
    def largest(self) -> str:
        """Which of them is largest."""
        return max(self.__slots__, key=lambda name: float(getattr(self, name)))


def memory_of(
    work: Workload, plan: Arrangement, stack: Stack, device_type: str = "cuda", *, exact: bool = True
) -> Memory:
    """The memory of the fullest rank.

    Args:
        work: model and steps.
        plan: how it is divided.
        stack: by which system.
        device_type: decides how many logits the loss holds at once.
        exact: count activations along the pipeline's schedule; else by the closed form of its kind.

    Raises:
        ParallelError: it cannot be divided so.
    """
    return max(memory_of_ranks(work, plan, stack, device_type, exact=exact), key=lambda one: one.total)


def memory_of_ranks(
    work: Workload, plan: Arrangement, stack: Stack, device_type: str = "cuda", *, exact: bool = True
) -> list[Memory]:
    """The memory of a rank of each pipeline stage, the fullest of those that share it; see `memory_of`."""
    degrees = plan.degrees
    split, rank_of = plan.stages(work)
    parameters = work.local(degrees.tensor, degrees.expert)
    tied = work.model.tie_embeddings and degrees.pipeline > 1
    kept = [_kept_once(work, plan, stack, split.layers_of(stage), device_type) for stage in range(split.stages)]
    sizes = [each for each, _ in kept]
    if degrees.pipeline == 1:
        held: Sequence[float] = sizes
    elif exact:
        held = [float(peak) for peak in peak_in_flight(_short(plan, work), sizes)]
    else:
        held = [_closed(plan, work, rank) * _share(sizes, rank_of, rank) for rank in range(degrees.pipeline)]
    less = [0.0] * degrees.pipeline
    canonical = stack.name == RESILIN.name and plan.parallel.sharding == "zero1"
    if degrees.pipeline > 1 and exact and canonical and 2 * plan.micros(work) * split.stages <= MOST_ACTIONS:
        sums = [stack.gradients * sum(parameters.of_stage(split, stage, tied)) for stage in range(split.stages)]
        less = _less_at_once(plan, work, plan.schedule(work), sizes, sums)
    found = []
    for rank in range(degrees.pipeline):
        stages = [stage for stage, owner in enumerate(rank_of) if owner == rank]
        dense, experts, largest = 0, 0, 0
        for stage in stages:
            own, own_experts = parameters.of_stage(split, stage, tied)
            dense, experts = dense + own, experts + own_experts
            layers = split.layers_of(stage)
            largest = max([largest, *(sum(parameters.blocks[layer]) for layer in layers)])
        transient = max(once for stage, (_, once) in enumerate(kept) if stage in stages)
        found.append(
            _of_rank(work, plan, stack, parameters, (dense, experts, largest), held[rank] - less[rank] + transient)
        )
    return found


def host_bytes(work: Workload, plan: Arrangement) -> float:
    """Bytes of host memory that one device's worker fills: inputs of recomputed blocks that wait there."""
    if plan.offload != "host":
        return 0.0
    split, rank_of = plan.stages(work)
    layers = [0] * plan.degrees.pipeline
    for stage, owner in enumerate(rank_of):
        layers[owner] += len(split.layers_of(stage))
    held = max(_closed(plan, work, rank) * count for rank, count in enumerate(layers))
    stream = 1 / plan.degrees.tensor if plan.parallel.sequence else 1.0
    tokens = plan.micro * work.tokens / plan.degrees.context
    return held * tokens * work.model.hidden_size * stream * BYTES[plan.compute]


def _short(plan: Arrangement, work: Workload) -> Schedule:
    """The schedule of so few micro-batches that more would not be held at once."""
    p, micros = plan.degrees.pipeline, plan.micros(work)
    # At most 2 (p - 1) + (v - 1) p forwards of p v stages' chunks come before the first backward.
    few = 3 * p + micros % p
    if plan.parallel.schedule not in METHODS or plan.parallel.schedule == "gpipe" or micros <= few:
        return plan.schedule(work)
    return plan.schedule(work.with_batch(few * plan.replicas * plan.micro))


def _share(sizes: Sequence[float], rank_of: Sequence[int], rank: int) -> float:
    return sum(size for size, owner in zip(sizes, rank_of, strict=True) if owner == rank)


def _closed(plan: Arrangement, work: Workload, rank: int) -> float:
    """How many micro-batches a rank holds, in its whole share of one (Narayanan et al. 2021, section 2.2)."""
    p, v, micros = plan.degrees.pipeline, plan.parallel.chunks, plan.micros(work)
    name = plan.parallel.schedule
    if name == "gpipe":
        return micros
    if name in ("interleaved", "zb-interleaved") and v > 1:
        return min(micros * v, 2 * (p - rank - 1) + (v - 1) * p + 1) / v
    return min(micros, p if name == "zb-v" else p - rank)


def _kept_once(work: Workload, plan: Arrangement, stack: Stack, layers: range, device_type: str) -> tuple[float, float]:
    """`_kept`, found once for all stages and layouts that keep the same."""
    d = plan.degrees
    how = (plan.micro, plan.recompute, plan.offload, plan.compute, d.tensor, d.context, plan.parallel.sequence)
    kinds = tuple(work.kind_of(layer) for layer in layers)
    key = ("kept", how, stack, device_type, kinds, bool(layers) and layers[-1] == work.model.layers - 1)
    return work.once(key, lambda: _kept(work, plan, stack, layers, device_type))


def _kept(work: Workload, plan: Arrangement, stack: Stack, layers: range, device_type: str) -> tuple[float, float]:
    """Bytes that one micro-batch leaves at a stage until its backward pass, and those needed once beside them."""
    model = work.model.model_copy(update={"recompute": plan.recompute, "offload": plan.offload})
    ranks = TensorRanks(plan.degrees.tensor, plan.parallel.sequence, stack.regathers)
    value, context = BYTES[plan.compute], plan.degrees.context

    def of(settings: object, blocks: range | None) -> float:
        return (
            activation_bytes(
                settings,  # type: ignore[arg-type]
                plan.micro,
                work.tokens,
                value_bytes=value,
                logit_rows=0,
                blocks=blocks,
                ranks=ranks,
            )
            / context
        )

    whole = of(model, layers)
    if plan.recompute == "selective" and stack.recomputed:
        least = of(model.model_copy(update={"recompute": "block"}), layers)
        whole = (1 - stack.recomputed) * whole + stack.recomputed * least
    if not stack.fused_attention and plan.recompute != "block":
        scores = plan.micro * work.tokens**2 * model.heads / plan.degrees.tensor / context
        whole += len(layers) * scores * 5  # 16 bits before and after the softmax, and a mask
    once = 0.0
    if plan.recompute == "block":
        bare = model.model_copy(update={"recompute": "none", "offload": "none"})
        once = of(bare, range(layers[0], layers[0] + 1)) if len(layers) else 0.0
        if not stack.fused_attention:
            once += plan.micro * work.tokens**2 * model.heads / plan.degrees.tensor / context * 5
        ends = 3 * model.hidden_size * plan.micro * work.tokens * value / context
        whole = max(whole - once, 0.0) + min(ends, once)
    if len(layers) and layers[-1] == model.layers - 1:
        tokens = plan.micro * work.tokens / context
        if stack.whole_logits:
            once += tokens * model.vocab_size / plan.degrees.tensor * WHOLE_LOGITS
        else:
            rows = min(tokens, chunk_rows(model.vocab_size, device_type))
            once += 2 * rows * model.vocab_size / plan.degrees.tensor * 4
    return whole, once


def _of_rank(
    work: Workload,
    plan: Arrangement,
    stack: Stack,
    parameters: LocalParameters,
    counts: tuple[int, int, int],
    activations: float,
) -> Memory:
    dense, experts, largest = counts
    degrees = plan.degrees
    sharing = degrees.replicate * degrees.data * degrees.context
    copies = max(sharing // degrees.expert, 1)
    if plan.parallel.sharding == "fsdp":
        shards, expert_shards = degrees.data * degrees.context, max(degrees.data * degrees.context // degrees.expert, 1)
        local = dense / shards + experts / expert_shards
        if plan.parallel.gathers_by_step(degrees.pipeline):
            gathered = (dense + experts) * (stack.sent_weight + stack.gradients)
        else:
            # The block at work and the next one are gathered, the gradients of one are summed; embedding and head
            # belong to the root, which stays gathered.
            ends = parameters.embedding + parameters.head
            gathered = (2 * largest + ends) * stack.sent_weight + (largest + ends) * stack.sent_gradient
        return Memory(stack.weights * local, stack.gradients * local, stack.states * local, gathered, activations)
    divided = plan.states_divided
    states = stack.states * (dense / (sharing if divided else 1) + experts / (copies if divided else 1))
    beside = stack.beside * (dense / sharing + experts / copies) if sharing > 1 and stack.beside else 0.0
    sums = _sums_held(plan, work) if stack.name == RESILIN.name else 1
    # Two buckets are under way, each sent and received but for the part that stays.
    buffers = 4 * BUCKET_BYTES * (sharing - 1) / sharing if stack.beside else 0.0
    return Memory(
        stack.weights * (dense + experts),
        sums * stack.gradients * (dense + experts),
        states + beside,
        0.0,
        activations,
        min(buffers, 4.0 * 4 * (dense + experts)),
    )


def _sums_while(micro: int) -> int:
    """How many sums of gradients there are while one micro-batch is taken back (`canonical.GradientSum`).

    Odd ones are added to the even ones before them; of the pairs before, the canonical tree holds one sum for each bit
    of their number.
    """
    return (micro // 2).bit_count() + 1


def _sums_held(plan: Arrangement, work: Workload) -> int:
    """The most of them in a step."""
    return ((plan.micros(work) - 1) // 2 + 1).bit_length()


def _less_at_once(
    plan: Arrangement, work: Workload, schedule: Schedule, kept: Sequence[float], gradients: Sequence[float]
) -> list[float]:
    """By how many bytes each rank's activations and sums together stay below the most of each.

    Sums are most late in a step, when schedules that hold all activations (GPipe) have given most of them up.

    Args:
        plan: of one system whose sums are canonical.
        work: model and steps.
        schedule: of all micro-batches.
        kept: bytes that a micro-batch leaves at each stage.
        gradients: bytes of one sum at each stage.
    """
    most, found = _sums_held(plan, work), []
    peaks = [float(peak) for peak in peak_in_flight(schedule, list(kept))]
    for rank, row in enumerate(schedule.actions):
        sums = dict.fromkeys(schedule.stages_of(rank), 0)
        held = peak = 0.0
        for action in row:
            if action.kind is F:
                held += kept[action.stage]
            elif action.kind is not W:
                sums[action.stage] = _sums_while(action.micro)
            peak = max(peak, held + sum(count * gradients[stage] for stage, count in sums.items()))
            if action.kind in (B, W):
                held -= kept[action.stage]
        found.append(peaks[rank] + most * sum(gradients[stage] for stage in sums) - peak)
    return found
