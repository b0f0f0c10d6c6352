"""How long a step takes: the pipeline's own schedule, replayed with what each stage's passes cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass

from resilin.models.flops import parameter_counts, train_flops_per_token
from resilin.parallel.pipeline import Costs, Schedule, simulate
from resilin.parallel.reduction import BUCKET_BYTES
from resilin.parallel.stages import splits_backward
from resilin.planner.cost.arrangement import Arrangement, Workload
from resilin.planner.cost.blocks import PassTimes, Pricing, block_times, ends_times
from resilin.planner.cost.device_time import traffic_seconds
from resilin.planner.cost.links import (
    Span,
    agreement_seconds,
    all_reduce_seconds,
    gather_seconds,
    in_one_memory,
    message_seconds,
)
from resilin.planner.cost.memory import Memory, memory_of
from resilin.planner.cost.parameters import LocalParameters
from resilin.planner.cost.seconds import Seconds
from resilin.planner.cost.stack import RESILIN, Stack
from resilin.planner.hardware import Cluster

MOST_ACTIONS = 8_000
"""Longer schedules are replayed with fewer micro-batches, twice, and the rest of them added: once a pipeline is full,
each further micro-batch takes as long as the one before it."""


@dataclass(frozen=True)
class Prediction:
    """A step as it would run.

    Attributes:
        work: model and steps.
        plan: how it is divided.
        seconds: of a step.
        busiest: what the busiest rank spends on its micro-batches in a step.
        bubble: seconds it waits for others.
        reduction: seconds of the sums of gradients, and of gathering what was updated.
        update: seconds of the optimizer.
        messages: seconds of one message between stages.
        memory: of the fullest rank.
    """

    work: Workload
    plan: Arrangement
    seconds: float
    busiest: Seconds
    bubble: float
    reduction: float
    update: float
    messages: float
    memory: Memory

    @property
    def workers(self) -> int:
        """How many."""
        return self.plan.degrees.workers

    @property
    def tokens_per_second(self) -> float:
        """Of all workers."""
        return self.work.step_tokens / self.seconds

    @property
    def flops_per_device(self) -> float:
        """FLOP/s of each device as MFU counts them: no recomputation, causal attention (`resilin.models.flops`)."""
        per_token = train_flops_per_token(self.work.model, self.work.tokens)
        return self.tokens_per_second * per_token / self.workers

    def megatron_flops_per_device(self) -> float:
        """The same as Narayanan et al. 2021 count: every key, and a second forward pass where blocks are recomputed."""
        model, s = self.work.model, self.work.tokens
        per_block = 24 * model.hidden_size**2 * (1 + s / (6 * model.hidden_size))
        factor = 4 if self.plan.recompute == "block" else 3
        flops = factor * model.layers * per_block + 6 * model.hidden_size * model.vocab_size
        return self.tokens_per_second * flops / self.workers

    @property
    def bound(self) -> str:
        """What most of the time beyond products goes to."""
        parts = {
            "bubble": self.bubble,
            "memory traffic": self.busiest.traffic,
            "tensor links": self.busiest.tensor,
            "context links": self.busiest.context,
            "expert links": self.busiest.expert,
            "data links": self.reduction + self.busiest.data,
            "attention": self.busiest.attention,
            "offloading": self.busiest.offload,
        }
        worst = max(parts, key=parts.__getitem__)
        return worst if parts[worst] > 0.1 * self.seconds else "products"

    def hours(self, tokens: float) -> float:
        """To train so many tokens."""
        return tokens / self.tokens_per_second / 3600

    def parameters(self) -> int:
        """Of the whole model."""
        return parameter_counts(self.work.model).total


def predict(
    work: Workload,
    plan: Arrangement,
    cluster: Cluster,
    stack: Stack = RESILIN,
    *,
    imbalance: float = 1.0,
    device_type: str = "cuda",
    cores: int | None = None,
    exact: bool = True,
    memory: Memory | None = None,
) -> Prediction:
    """The time and memory of a step.

    Args:
        work: model and steps.
        plan: how it is divided.
        cluster: on what.
        stack: by which system.
        imbalance: rows of the busiest rank of experts over the mean.
        device_type: decides how many logits the loss holds at once.
        cores: devices that all workers share, where there are fewer than workers: then their work is added up.
        exact: replay the pipeline's schedule; else its bubble is that of the closed form of its kind.
        memory: of the fullest rank, where it is known.

    Raises:
        ParallelError: it cannot be divided so.
    """
    pricing = Pricing(work, plan, cluster, stack, imbalance)
    split, rank_of = plan.stages(work)
    micros, degrees = plan.micros(work), plan.degrees
    parameters = work.local(degrees.tensor, degrees.expert)
    blocks: dict[Hashable, PassTimes] = {}
    stages = []
    for stage in range(split.stages):
        total = ends_times(pricing, first=stage == 0, last=stage == split.stages - 1)
        for kind, count in Counter(work.kind_of(layer) for layer in split.layers_of(stage)).items():
            if kind not in blocks:
                layer = next(one for one in split.layers_of(stage) if work.kind_of(one) == kind)
                blocks[kind] = block_times(pricing, layer)
            total = total + blocks[kind] * count
        stages.append(total)
    if plan.parallel.sharding == "fsdp" and not plan.parallel.gathers_by_step(degrees.pipeline):
        stages = [_with_gathers(pricing, parameters, one) for one in stages]
    if plan.offload != "none":
        stages = [_with_offload(pricing, one, len(split.layers_of(s))) for s, one in enumerate(stages)]
    message = _message(pricing) if degrees.pipeline > 1 else 0.0
    busiest = _busiest(stages, rank_of, micros)
    spent = busiest.total
    if degrees.pipeline == 1:
        passes = spent
    elif exact:
        passes = _replayed(plan, work, stages, message, stack)
    else:
        passes = spent * (1 + _bubble(plan, micros)) + 2 * micros * message * plan.parallel.chunks * stack.messages_wait
    memory = memory or memory_of(work, plan, stack, device_type, exact=exact)
    per_stage = [parameters.of_stage(split, s, work.model.tie_embeddings) for s in range(split.stages)]
    per_rank = [
        tuple(sum(per_stage[s][i] for s, owner in enumerate(rank_of) if owner == rank) for i in (0, 1))
        for rank in range(degrees.pipeline)
    ]
    dense, experts = max(per_rank, key=sum)
    reduction = _reduction(pricing, dense, experts)
    hidden = min(reduction * stack.hidden, 0.5 * spent)
    reduction -= hidden
    update = _update(pricing, dense, experts)
    if cores is not None and cores < degrees.workers:
        share = degrees.workers / cores
        passes = max(passes, _mean(stages, rank_of, micros) * share)
        reduction, update = reduction * share, update * share
    seconds = passes + reduction + update
    return Prediction(work, plan, seconds, busiest, max(passes - spent, 0.0), reduction, update, message, memory)


def _busiest(stages: list[PassTimes], rank_of: tuple[int, ...], micros: int) -> Seconds:
    """What the busiest rank spends on a step's micro-batches."""
    ranks: dict[int, Seconds] = {}
    for stage, owner in enumerate(rank_of):
        ranks[owner] = ranks.get(owner, Seconds()) + stages[stage].forward + stages[stage].backward
    return max(ranks.values(), key=lambda one: one.total) * micros


def _mean(stages: list[PassTimes], rank_of: tuple[int, ...], micros: int) -> float:
    return sum((one.forward + one.backward).total for one in stages) * micros / (max(rank_of) + 1)


def _bubble(plan: Arrangement, micros: int) -> float:
    """Idle over computing time, by the closed form of the schedule's kind."""
    p, name = plan.degrees.pipeline, plan.parallel.schedule
    chunks = plan.parallel.chunks if name in ("interleaved", "zb-interleaved") else 1
    less = {"zb-h1": 1 / 3, "zb-v": 0.1, "zb-interleaved": 1 / 3}.get(name, 1.0)
    return less * (p - 1) / (chunks * micros)


def _message(pricing: Pricing) -> float:
    """Of one message to the next stage."""
    degrees = pricing.arrangement.degrees
    count = pricing.rows * pricing.work.model.hidden_size * pricing.value
    apart = degrees.workers // degrees.pipeline
    whole = count
    if pricing.arrangement.parallel.sequence or pricing.stack.scattered:
        count /= degrees.tensor
    sent = message_seconds(pricing.cluster, apart, count)
    if pricing.stack.scattered and not pricing.arrangement.parallel.sequence:
        sent += gather_seconds(pricing.cluster, pricing.span("tp"), whole)
    return sent


def _replayed(plan: Arrangement, work: Workload, stages: list[PassTimes], message: float, stack: Stack) -> float:
    """Seconds from a step's first pass to its last, as its schedule orders them."""
    micros = plan.micros(work)
    most = max(MOST_ACTIONS // (2 * len(stages)), 3 * plan.degrees.pipeline)
    if micros <= most:
        return _makespan(plan.schedule(work), plan, stages, message, stack)
    # Whole rounds of the pipeline, so that interleaved groups are as they are.
    step = plan.degrees.pipeline
    few = max(most // 2 // step, 1) * step
    few += micros % step
    more = few + max(most // 2 // step, 1) * step
    lengths = []
    for count in (few, more):
        part = work.with_batch(count * plan.replicas * plan.micro)
        lengths.append(_makespan(plan.schedule(part), plan, stages, message, stack))
    return lengths[1] + (lengths[1] - lengths[0]) / (more - few) * (micros - more)


def _makespan(schedule: Schedule, plan: Arrangement, stages: list[PassTimes], message: float, stack: Stack) -> float:
    extra = message if stack.messages_wait else 0.0
    halves = splits_backward(plan.parallel.schedule)
    costs = Costs(
        forward=[one.forward.total + extra for one in stages],
        input=[one.input.total + extra for one in stages],
        weight=[one.weight.total for one in stages],
        backward=None if halves else [one.backward.total + extra for one in stages],
    )
    return float(simulate(schedule, costs, 0.0 if stack.messages_wait else message).makespan)


def _with_gathers(pricing: Pricing, parameters: LocalParameters, stage: PassTimes) -> PassTimes:
    """A pass with the part of FSDP's gathers and sums that computing does not hide."""
    plan, stack, cluster = pricing.arrangement, pricing.stack, pricing.cluster
    span = pricing.span("dp", "cp")
    dense = sum(own for own, _ in parameters.blocks) + parameters.embedding + parameters.head
    experts = sum(own for _, own in parameters.blocks)
    of_experts = pricing.span("dp", "cp")
    shards = max(of_experts.size // plan.degrees.expert, 1)
    spread = type(of_experts)(shards, of_experts.stride * plan.degrees.expert)

    def gathered(width: float) -> float:
        return gather_seconds(cluster, span, dense * width) + gather_seconds(cluster, spread, experts * width)

    ahead, back = gathered(stack.sent_weight), gathered(stack.sent_weight) + gathered(stack.sent_gradient)
    if plan.degrees.replicate > 1:
        back += all_reduce_seconds(cluster, pricing.span("rep"), dense / span.size * stack.sent_gradient)
    shown_ahead = max(ahead - stack.hidden * stage.forward.computing, ahead * (1 - stack.hidden))
    shown_back = max(back - stack.hidden * stage.backward.computing, back * (1 - stack.hidden))
    return PassTimes(stage.forward + Seconds(data=shown_ahead), stage.input + Seconds(data=shown_back), stage.weight)


def _with_offload(pricing: Pricing, stage: PassTimes, layers: int) -> PassTimes:
    """A pass with the time in which blocks' inputs go to host memory or disk and come back, beyond the computing."""
    plan, host, disk = pricing.arrangement, pricing.cluster.host, pricing.cluster.disk
    count = layers * pricing.rows * pricing.work.model.hidden_size * pricing.value * pricing.stream_share
    write = host.bandwidth if host is not None else float("inf")
    read = write
    if plan.offload == "disk" and disk is not None:
        write, read = disk.write, disk.read
    ahead = max(count / write - stage.forward.computing, 0.0)
    back = max(count / read - stage.backward.computing, 0.0)
    return PassTimes(stage.forward + Seconds(offload=ahead), stage.input + Seconds(offload=back), stage.weight)


def _reduction(pricing: Pricing, dense: int, experts: int) -> float:
    """Of the sums over data workers at the end of a step, and of gathering weights where their owners updated them."""
    plan, stack, cluster = pricing.arrangement, pricing.stack, pricing.cluster
    degrees = plan.degrees
    span = pricing.span("rep", "dp", "cp")
    if span.size == 1 or (plan.parallel.sharding == "fsdp" and not plan.parallel.gathers_by_step(degrees.pipeline)):
        return 0.0
    shards = max(span.size // degrees.expert, 1)
    spread = type(span)(shards, span.stride * degrees.expert)
    total = 0.0
    for group, count in ((span, dense), (spread, experts)):
        if stack.beside and plan.states_divided and in_one_memory(cluster, group):
            total += _in_one_memory(pricing, group, count)
            continue
        total += gather_seconds(cluster, group, count * stack.sent_gradient)
        back = stack.sent_weight if plan.states_divided else stack.sent_gradient
        total += gather_seconds(cluster, group, count * back)
    return total


def _in_one_memory(pricing: Pricing, span: Span, count: int) -> float:
    """The same where nothing is sent: what is packed, added up from there and taken is read and written."""
    if span.size == 1 or not count:
        return 0.0
    stack, others = pricing.stack, (span.size - 1) / span.size
    moved = count * (stack.sent_gradient * (2 + 3 * others) + 2 * stack.sent_weight)
    exchanges = -(-count * stack.sent_gradient // BUCKET_BYTES) + 1
    return traffic_seconds(pricing.cluster, moved) + exchanges * agreement_seconds(pricing.cluster, span)


def _update(pricing: Pricing, dense: int, experts: int) -> float:
    """Of the optimizer: every state, gradient and weight of an owner is read, and all but the gradient written."""
    plan, stack = pricing.arrangement, pricing.stack
    degrees = plan.degrees
    sharing = degrees.replicate * degrees.data * degrees.context
    if not (plan.states_divided or plan.parallel.sharding == "fsdp"):
        sharing = 1
    owned = dense / sharing + experts / max(sharing // degrees.expert, 1)
    moved = owned * (2 * stack.states + 2 * stack.weights + stack.gradients)
    # The gradient's norm is taken before.
    return traffic_seconds(pricing.cluster, moved + owned * stack.gradients)
