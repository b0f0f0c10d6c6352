"""How a training system spends memory and traffic, as far as layouts do not decide it.

Resilin's own is `RESILIN`; the others are those of the papers whose tables are predicted. Bytes a parameter are of what
a rank keeps; values a token are of what passes between a device and its memory, beside matrix products, in one forward
pass of one block, in values of the format that is computed in. A backward pass moves twice as much.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Stack:
    """A training system.

    Attributes:
        name: for people.
        weights: bytes a parameter of weights, in every format in which all ranks of a replica keep them.
        gradients: bytes a parameter of gradients.
        states: bytes a parameter of what an optimizer keeps, which ZeRO divides.
        beside: bytes a parameter of an owner's copies of weights and gradients, where states are divided (ZeRO-1).
        sent_gradient: bytes a parameter of a gradient on its way.
        sent_weight: bytes a parameter of a weight on its way.
        fused_attention: attention keeps no matrix of scores and skips what is masked.
        stream: values a token moved for each of the hidden size: norms, residual sums, dropout.
        rotated: values a token for each of the widths of queries, keys and values.
        feed_forward: values a token for each of the feed-forward's hidden width: biases, activations.
        scores: values for each score of attention that is not fused.
        logits: values a token for each of the vocabulary, of 4 bytes, forward and backward together.
        operations: that one forward pass of a block launches.
        messages_wait: a rank does not compute while it sends to the next stage.
        scattered: ranks of tensor parallelism each send a part of what goes to the next stage.
        hidden: share of the sums of data parallelism that computing hides, at most (also of FSDP's gathers).
        hidden_tensor: share of tensor parallelism's sums that computing hides.
        regathers: with sequence parallelism the gathered input of a region is gathered again in the backward pass.
        whole_logits: all logits of a micro-batch are held, in float32.
        recomputed: share of products that selective recomputation computes again rather than keeps.
        balanced: context parallelism gives every rank the same number of keys to see (pieces from both ends).
        headroom: share of the memory that is not to be counted on: fragments, buffers of communication.
    """

    name: str
    weights: float = 4
    gradients: float = 4
    states: float = 8
    beside: float = 0
    sent_gradient: float = 4
    sent_weight: float = 4
    fused_attention: bool = True
    stream: float = 14
    rotated: float = 4
    feed_forward: float = 5
    scores: float = 6.5
    logits: float = 8
    operations: int = 24
    messages_wait: bool = False
    scattered: bool = False
    hidden: float = 0.0
    hidden_tensor: float = 0.0
    regathers: bool = False
    whole_logits: bool = False
    recomputed: float = 0.0
    balanced: bool = True
    headroom: float = 0.08


RESILIN = Stack("Resilin", beside=8)
"""Float32 masters, gradients and AdamW's moments; logits a chunk at a time; sums after the last backward pass."""

MEGATRON_2021 = Stack(
    "Megatron-LM, 2021",
    weights=2,
    gradients=2,
    states=12,
    sent_gradient=2,
    sent_weight=2,
    fused_attention=False,
    stream=11,
    rotated=2,
    feed_forward=2,
    operations=18,
    messages_wait=True,
    scattered=True,
    whole_logits=True,
)
"""fp16 with fused kernels for bias, dropout and masked softmax; blocking messages between stages, scattered."""

MEGATRON_CORE = Stack(
    "Megatron Core",
    weights=2,
    gradients=4,
    states=12,
    sent_gradient=4,
    sent_weight=2,
    stream=10,
    rotated=2,
    feed_forward=2,
    operations=14,
    scattered=True,
    hidden=0.9,
    hidden_tensor=0.7,
    regathers=True,
    whole_logits=True,
)
"""bf16, flash attention, distributed optimizer, communication overlapped."""

TORCHTITAN = Stack(
    "TorchTitan, eager",
    sent_gradient=4,
    sent_weight=2,
    stream=34,
    rotated=12,
    feed_forward=5,
    operations=45,
    hidden=0.9,
    regathers=True,
    whole_logits=True,
    recomputed=0.5,
    balanced=False,
)
"""bf16 over sharded float32 masters, FSDP2; operations of torch as they stand; every second product recomputed."""

TORCHTITAN_COMPILED = Stack(
    "TorchTitan, compiled",
    sent_gradient=4,
    sent_weight=2,
    stream=12,
    rotated=4,
    feed_forward=3,
    operations=14,
    hidden=0.9,
    regathers=True,
    whole_logits=True,
    recomputed=0.5,
    balanced=False,
)
"""The same with torch.compile for each block."""

NANOTRON = Stack(
    "nanotron",
    weights=2,
    gradients=4,
    states=12,
    sent_gradient=4,
    sent_weight=2,
    stream=24,
    rotated=8,
    feed_forward=5,
    operations=40,
    messages_wait=True,
    regathers=True,
    whole_logits=True,
)
"""bf16 with float32 gradients, flash attention, ZeRO-1."""

MEGATRON_DEEPSPEED = replace(MEGATRON_2021, name="Megatron-DeepSpeed", fused_attention=True, stream=14)
"""fp16 with flash attention, ZeRO-1; kernels translated for AMD."""

STACKS = {
    "resilin": RESILIN,
    "megatron-2021": MEGATRON_2021,
    "megatron-2021-unscattered": replace(MEGATRON_2021, scattered=False),
    "megatron-deepspeed": MEGATRON_DEEPSPEED,
    "megatron-core": MEGATRON_CORE,
    "torchtitan": TORCHTITAN,
    "torchtitan-compiled": TORCHTITAN_COMPILED,
    "torchtitan-async": replace(TORCHTITAN_COMPILED, hidden_tensor=0.5),
    "nanotron": NANOTRON,
}
"""By the name that tables of published runs use."""
