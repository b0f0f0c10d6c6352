"""What a budget costs: parameters, operations, cache, and seconds on this machine."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import nn

from resilin.inference.scoring import evaluating
from resilin.models.cache import KVCache
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.flops import forward_flops_per_token, parameter_counts
from resilin.models.hybrid_settings import HybridSettings
from resilin.nested.budgets import Budget
from resilin.nested.in_place import budget, decoder_in
from resilin.nested.sub_model import sub_model, sub_settings


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of a sub-model: exactly that of an ordinary model of its size.

    Attributes:
        parameters: all of them, embedding and head included.
        active: those that a token meets.
        non_embedding: `parameters` without embedding and head.
        flops: operations of the forward pass, for a token of a text of the given length.
        kv_bytes: of the keys and values of one token.
        state_bytes: of what Mamba-2 layers remember of a text, however long: their states in float32, and the last
            inputs of their convolutions.
    """

    parameters: int
    active: int
    non_embedding: int
    flops: float
    kv_bytes: int
    state_bytes: int = 0


def _state_bytes(small: DecoderSettings, value_bytes: int) -> int:
    if not isinstance(small, HybridSettings):
        return 0
    sizes = [small.at(layer).mamba for layer in small.layers_of("mamba")]
    inputs = sum((one.conv_size - 1) * (one.width + 2 * one.state_width) for one in sizes)
    return inputs * value_bytes + sum(one.width * one.state_size for one in sizes) * max(4, value_bytes)


def cost(
    settings: DecoderSettings, wanted: Budget, *, sequence_length: int | None = None, value_bytes: int = 4
) -> Cost:
    """What a sub-model costs, without building it.

    Args:
        settings: of the full model.
        wanted: what of it is used.
        sequence_length: of the texts that operations are averaged over; None: the model's positions.
        value_bytes: of one number in the cache.

    Raises:
        BudgetError: the budget does not fit.
    """
    small = sub_settings(settings, wanted)
    counts = parameter_counts(small)
    part = sub_model(settings, wanted)
    keys = sum(layer.key_heads for layer in part.layers) * len(part.trajectory)
    return Cost(
        counts.total,
        counts.active,
        counts.non_embedding,
        forward_flops_per_token(small, sequence_length or settings.max_positions),
        2 * keys * settings.head_width * value_bytes,
        _state_bytes(small, value_bytes),
    )


@dataclass(frozen=True, slots=True)
class Latency:
    """Seconds on this machine, the median of some repeats.

    Attributes:
        prompt: to read the prompt.
        token: to add one token behind it.
    """

    prompt: float
    token: float


def latency(
    model: nn.Module, wanted: Budget, *, rows: int = 1, prompt: int = 64, repeats: int = 5, warm_up: int = 1
) -> Latency:
    """How long a sub-model takes in place, reading a prompt and adding single tokens.

    Args:
        model: with its weights, where it is to run.
        wanted: what of it is used.
        rows: texts side by side.
        prompt: tokens of each.
        repeats: of which the median counts.
        warm_up: rounds before them that do not.
    """
    decoder = decoder_in(model)
    device = decoder.embed.weight.device
    tokens_BT = torch.arange(rows * (prompt + 1), device=device).view(rows, -1) % decoder.settings.vocab_size
    reading, adding = [], []
    with evaluating(decoder), budget(decoder, wanted):
        for number in range(warm_up + repeats):
            cache = KVCache.of(decoder, rows, prompt + 1)
            times = [_now(device)]
            for part_BT in (tokens_BT[:, :prompt], tokens_BT[:, prompt:]):
                decoder.logits(_states(decoder, part_BT, cache)[:, -1])
                times.append(_now(device))
            if number >= warm_up:
                reading.append(times[1] - times[0])
                adding.append(times[2] - times[1])
    return Latency(statistics.median(reading), statistics.median(adding))


def _states(decoder: Decoder, tokens_BT: torch.Tensor, cache: KVCache) -> torch.Tensor:
    states: torch.Tensor = decoder(tokens_BT, cache=cache).hidden_BTD
    return states


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
