"""How long one micro-batch takes at one block, at the embedding and at the head, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from resilin.models.decoder_settings import DecoderSettings
from resilin.models.flops import keys_seen
from resilin.planner.cost.arrangement import Arrangement, Workload
from resilin.planner.cost.device_time import BYTES, Product, attention_seconds, product_seconds, traffic_seconds
from resilin.planner.cost.links import Span, all_reduce_seconds, all_to_all_seconds, message_seconds, span_of
from resilin.planner.cost.seconds import Seconds
from resilin.planner.cost.stack import Stack
from resilin.planner.hardware import Cluster

BACKWARD_OF_ATTENTION = 2.5
"""Fused attention computes its scores again: five products for two (Dao 2023, arXiv 2307.08691, section 3)."""
QUANTISED_PASSES = 6.0
"""Values moved to quantise a product's two inputs to 8 bits, for each value: read for the maximum, read, written."""


NOTHING = Seconds()


@dataclass(frozen=True, slots=True)
class PassTimes:
    """Of one micro-batch.

    Attributes:
        forward: pass.
        input: half of the backward pass that gives the gradient of the input.
        weight: half of it that gives the gradients of weights.
    """

    forward: Seconds = NOTHING
    input: Seconds = NOTHING
    weight: Seconds = NOTHING

    @property
    def backward(self) -> Seconds:
        """Both halves."""
        return self.input + self.weight

    def __add__(self, other: PassTimes) -> PassTimes:
        return PassTimes(self.forward + other.forward, self.input + other.input, self.weight + other.weight)

    def __mul__(self, count: float) -> PassTimes:
        return PassTimes(self.forward * count, self.input * count, self.weight * count)


@dataclass(frozen=True)
class Pricing:
    """What prices one arrangement.

    Attributes:
        work: model and steps.
        arrangement: how it is divided.
        cluster: on what.
        stack: by which system.
        imbalance: rows of the busiest expert rank over the mean.
    """

    work: Workload
    arrangement: Arrangement
    cluster: Cluster
    stack: Stack
    imbalance: float = 1.0

    @property
    def rows(self) -> float:
        """Tokens of a micro-batch at one rank, before tensor parallelism."""
        return self.arrangement.micro * self.work.tokens / self.arrangement.degrees.context

    @property
    def value(self) -> int:
        """Bytes of an activation."""
        return BYTES[self.arrangement.compute]

    @property
    def stream_share(self) -> float:
        """The part of the stream that a rank of tensor parallelism has."""
        return 1 / self.arrangement.degrees.tensor if self.arrangement.parallel.sequence else 1.0

    def span(self, *axes: str) -> Span:
        """A group of ranks."""
        return span_of(self.arrangement.degrees, *axes)

    def products(self, products: Sequence[Product]) -> tuple[Seconds, Seconds, Seconds]:
        """Forward, by the input, by the weights."""
        compute = self.arrangement.compute
        ahead = sum(product_seconds(self.cluster, one, compute) for one in products)
        left = sum(product_seconds(self.cluster, one.backward[0], compute) for one in products)
        right = sum(product_seconds(self.cluster, one.backward[1], compute) for one in products)
        extra = 0.0
        if compute == "fp8":
            moved = sum((one.rows * one.inner + one.inner * one.columns) * one.count for one in products)
            extra = traffic_seconds(self.cluster, QUANTISED_PASSES * moved)
        return (
            Seconds(products=ahead, traffic=extra),
            Seconds(products=left, traffic=extra),
            Seconds(products=right),
        )


def block_times(pricing: Pricing, layer: int) -> PassTimes:
    """Of one block, what is computed again included."""
    work, plan, stack = pricing.work, pricing.arrangement, pricing.stack
    model, t = work.model.at(layer), plan.degrees.tensor
    query, key = model.heads * model.head_width, model.key_heads * model.head_width
    rows, hidden = pricing.rows, model.hidden_size
    dense = [Product(rows, hidden, (query + 2 * key) / t), Product(rows, query / t, hidden)]
    widths, experts = _feed_forward(pricing, model, layer)
    ahead, left, right = pricing.products([*dense, *experts])
    attend, attend_back = _attention(pricing, model, layer, query / t)
    values = stack.stream * hidden * pricing.stream_share + stack.rotated * (query + 2 * key) / t
    moved = rows * pricing.value * (values + stack.feed_forward * widths / t)
    passing = traffic_seconds(pricing.cluster, moved) + stack.operations * pricing.cluster.device.launch
    tensor = _tensor_seconds(pricing, 2)
    expert = _expert_seconds(pricing, model, layer)
    forward = ahead + attend + Seconds(traffic=passing, tensor=tensor, expert=expert)
    forward = forward + Seconds(context=_context_seconds(pricing, query, key))
    back = left + attend_back + Seconds(traffic=2 * passing, tensor=tensor, expert=expert)
    back = back + Seconds(context=2 * forward.context)
    if stack.regathers and plan.parallel.sequence:
        back = back + Seconds(tensor=tensor / 2)  # regions' inputs are put together again
    if plan.recompute == "block":
        back = back + forward
    elif plan.recompute == "selective":
        back = back + Seconds(products=stack.recomputed * ahead.products, traffic=passing)
    return PassTimes(forward, back, right) * len(work.model.trajectory)


def _feed_forward(pricing: Pricing, model: DecoderSettings, layer: int) -> tuple[float, list[Product]]:
    """The hidden widths that a token meets, and the products."""
    rows, hidden, t = pricing.rows, model.hidden_size, pricing.arrangement.degrees.tensor
    branches = 2 if model.gated else 1
    if model.moe is None or not model.is_moe_layer(layer):
        width = model.feed_forward_size
        return width * branches / 2, [
            Product(rows, hidden, branches * width / t),
            Product(rows, width / t, hidden),
        ]
    moe, ep = model.moe, pricing.arrangement.degrees.expert
    local = moe.experts / ep
    each = rows * moe.experts_per_token * pricing.imbalance / local
    found = [
        Product(rows, hidden, moe.experts),
        Product(each, hidden, branches * moe.expert_size / t, local),
        Product(each, moe.expert_size / t, hidden, local),
    ]
    if moe.shared_size:
        found += [
            Product(rows, hidden, branches * moe.shared_size / t),
            Product(rows, moe.shared_size / t, hidden),
        ]
    # Rows are put in the experts' order and back again: twice the hidden size, read and written.
    widths = moe.experts_per_token * (moe.expert_size + 4 * hidden * t / max(pricing.stack.feed_forward, 1))
    return (widths + moe.shared_size) * branches / 2, found


def _attention(pricing: Pricing, model: DecoderSettings, layer: int, width: float) -> tuple[Seconds, Seconds]:
    """Forward and backward of scores and the mix of values, by heads of so much width at one rank."""
    tokens, rows, cluster = pricing.work.tokens, pricing.rows, pricing.cluster
    seen = keys_seen(tokens, model.window_of(layer))
    context = pricing.arrangement.degrees.context
    if not pricing.stack.balanced:
        seen *= (2 * context - 1) / context  # whoever has the end of a row sees all of it, and the others wait
    if pricing.stack.fused_attention:
        flops = 4 * rows * seen * width
        ahead = attention_seconds(cluster, flops, pricing.arrangement.compute)
        back = attention_seconds(cluster, BACKWARD_OF_ATTENTION * flops, pricing.arrangement.compute)
        return Seconds(attention=ahead), Seconds(attention=back)
    # Batched products over all keys, masked afterwards.
    count = rows / tokens * width / model.head_width
    scores, mix = Product(tokens, model.head_width, tokens, count), Product(tokens, tokens, model.head_width, count)
    one = sum(product_seconds(cluster, product, pricing.arrangement.compute) for product in (scores, mix))
    moved = traffic_seconds(cluster, pricing.stack.scores * pricing.value * count * tokens**2)
    return Seconds(attention=one, traffic=moved), Seconds(attention=2 * one, traffic=2 * moved)


def _tensor_seconds(pricing: Pricing, sums: float) -> float:
    """Of so many sums of the stream over tensor parallelism (a gather and a scattered sum count as one)."""
    count = pricing.rows * pricing.work.model.hidden_size * pricing.value
    span = pricing.span("tp")
    return sums * all_reduce_seconds(pricing.cluster, span, count) * (1 - pricing.stack.hidden_tensor)


def _context_seconds(pricing: Pricing, query: float, key: float) -> float:
    """Of one attention over positions that ranks of context parallelism have parts of."""
    degrees = pricing.arrangement.degrees
    if degrees.context == 1:
        return 0.0
    rows, t, span = pricing.rows, degrees.tensor, pricing.span("cp")
    if pricing.arrangement.parallel.context_kind == "ulysses":
        count = rows * (2 * query + 2 * key) / t * pricing.value
        return all_to_all_seconds(pricing.cluster, span, count)
    step = message_seconds(pricing.cluster, span.stride, rows * 2 * key / t * pricing.value)
    return (degrees.context - 1) * step


def _expert_seconds(pricing: Pricing, model: DecoderSettings, layer: int) -> float:
    """Of sending every token to its experts and its results back."""
    degrees = pricing.arrangement.degrees
    if degrees.expert == 1 or model.moe is None or not model.is_moe_layer(layer):
        return 0.0
    count = pricing.rows * model.moe.experts_per_token * model.hidden_size * pricing.value * pricing.imbalance
    span = Span(degrees.expert, degrees.tensor)
    return 2 * all_to_all_seconds(pricing.cluster, span, count)


def ends_times(pricing: Pricing, *, first: bool, last: bool) -> PassTimes:
    """Of the embedding where a stage is the first, and of final norm, head and loss where it is the last."""
    found = PassTimes()
    model, t, rows = pricing.work.model, pricing.arrangement.degrees.tensor, pricing.rows
    cluster, value = pricing.cluster, pricing.value
    if first:
        moved = traffic_seconds(cluster, 2 * rows * model.hidden_size * value)
        summed = _tensor_seconds(pricing, 1)
        found = found + PassTimes(Seconds(traffic=moved, tensor=summed), Seconds(), Seconds(traffic=2 * moved))
    if last:
        head = [Product(rows, model.hidden_size, model.vocab_size / t)]
        compute = "bf16" if pricing.arrangement.compute == "fp8" else pricing.arrangement.compute  # heads stay so
        plain = replace(pricing, arrangement=replace(pricing.arrangement, compute=compute))
        ahead, left, right = plain.products(head)
        moved = traffic_seconds(cluster, rows * model.vocab_size / t * 4 * pricing.stack.logits / 2)
        summed = _tensor_seconds(pricing, 1) / 2
        found = found + PassTimes(
            ahead + Seconds(traffic=moved, tensor=summed), left + Seconds(traffic=moved, tensor=summed), right
        )
    return found
