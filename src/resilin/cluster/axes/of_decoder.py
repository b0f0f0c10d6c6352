"""What the blocks of a decoder cost: by what they compute, scaled to what a run has measured where it has."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

from resilin.cluster.axes.layers import Layers, PlanError
from resilin.models.decoder import Decoder
from resilin.models.flops import block_flops_per_token, head_flops_per_token
from resilin.models.memory import activation_bytes
from resilin.parallel.pipeline import Kind, Split, Timeline

_BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")
STATES = 12  # bytes for each parameter: float32 weights and two moments of AdamW


def layers_of(decoder: Decoder, micro: int, tokens: int, flops_per_second: float = 1.0) -> Layers:
    """Costs of a decoder's blocks for one micro-batch.

    Args:
        decoder: on any device, the meta device too.
        micro: rows of a micro-batch.
        tokens: of a row.
        flops_per_second: of a member; with 1 `seconds` are floating-point operations, which is enough to compare.
    """
    settings = decoder.settings
    rows = 3 * micro * tokens / flops_per_second  # the backward pass computes twice what the forward pass does
    parameters: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    for name, parameter in decoder.named_parameters():
        found = _BLOCK.search(name)
        if found is not None:
            block = parameters[int(found.group(1))]
            block[0] += parameter.nbytes
            block[1] += parameter.numel()
    layers = range(settings.layers)
    return Layers(
        seconds=tuple(rows * block_flops_per_token(settings, layer, tokens) for layer in layers),
        head=rows * head_flops_per_token(settings),
        weights=tuple(float(parameters[layer][0]) for layer in layers),
        states=tuple(float(STATES * parameters[layer][1]) for layer in layers),
        activations=tuple(
            float(activation_bytes(settings, micro, tokens, logit_rows=0, blocks=range(layer, layer + 1)))
            for layer in layers
        ),
    )


def measured(layers: Layers, timeline: Timeline, split: Split) -> Layers:
    """The same layers with a run's own times: every stage's passes are shared out over its layers as these cost.

    Args:
        layers: their costs in proportion, such as `layers_of` gives.
        timeline: passes of one step of full micro-batches (`parallel.trace`).
        split: the layers that each stage had then.

    Raises:
        PlanError: a stage has no pass in the timeline.
    """
    took: dict[int, list[list[float]]] = defaultdict(lambda: [[], []])
    for record in timeline.records:
        took[record.action.stage][record.action.kind is not Kind.F].append(float(record.end - record.start))
    if missing := [stage for stage in range(split.stages) if not all(took[stage])]:
        raise PlanError(f"stage {missing[0]} has no forward or no backward among the {len(timeline.records)} passes")
    halves = [(_mean(took[stage][0]), sum(took[stage][1]) / len(took[stage][0])) for stage in range(split.stages)]
    factors = [
        (front + back) / float(cost) if cost else 0.0
        for (front, back), cost in zip(halves, layers.of_stages(split), strict=True)
    ]
    forward = sum(front for front, _ in halves) / sum(front + back for front, back in halves)
    return Layers(
        tuple(float(layers.seconds[layer]) * factors[split.stage_of(layer)] for layer in range(split.layers)),
        float(layers.embedding) * factors[0],
        float(layers.head) * factors[-1],
        forward,
        layers.weights,
        layers.states,
        layers.activations,
    )


def _mean(values: Iterable[float]) -> float:
    given = list(values)
    return sum(given) / len(given)
