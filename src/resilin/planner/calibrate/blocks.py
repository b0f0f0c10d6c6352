"""What a real model's passes reach of what single products and copies do: times of small decoders, and a fit to them.

The time of a pass is taken as a sum: operations over (share of peak x peak), bytes over (share of bandwidth x
bandwidth), and a constant for each operation. The three are what the runs of several shapes say, none below zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt
import torch

from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings
from resilin.nouns import Batch
from resilin.objective.next_token import NextToken
from resilin.parallel.settings import ParallelSettings
from resilin.planner.calibrate.compute import seconds_of
from resilin.planner.cost import RESILIN, Arrangement, Workload
from resilin.planner.cost.blocks import Pricing, block_times, ends_times
from resilin.planner.cost.seconds import Seconds
from resilin.planner.hardware import Cluster

Matrix = npt.NDArray[np.float64]
SHAPES = ((128, 4, 2, 64), (128, 4, 8, 128), (256, 4, 4, 128), (384, 3, 2, 128), (384, 3, 8, 64), (512, 2, 4, 256))
"""(hidden size, blocks, rows, tokens) of the decoders that are timed."""
_VOCABULARY = 1024


@dataclass(frozen=True, slots=True)
class Timed:
    """A decoder's forward and backward pass.

    Attributes:
        work: model and rows.
        micro: rows of the pass.
        seconds: that it took.
    """

    work: Workload
    micro: int
    seconds: float


def time_decoders(device: torch.device, shapes: Sequence[tuple[int, int, int, int]] = SHAPES) -> list[Timed]:
    """Times forward and backward passes with the loss, in float32."""
    found, scale, objective = [], 8 if device.type == "cuda" else 1, NextToken().build()
    for hidden, layers, rows, tokens in shapes:
        model = DecoderSettings(vocab_size=_VOCABULARY, hidden_size=hidden * scale, layers=layers, heads=4)
        decoder = Decoder(model, seed=0).to(device)
        drawn = torch.randint(0, _VOCABULARY, (rows, tokens + 1), device=device)
        batch = Batch(torch.arange(rows), {"tokens": drawn[:, :-1], "labels": drawn[:, 1:]})

        def work(decoder: Decoder = decoder, batch: Batch = batch) -> None:
            objective(decoder, batch, None).sum.backward()

        def wait() -> None:
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        found.append(Timed(Workload(model, tokens, rows), rows, seconds_of(work, wait)))
    return found


def _parts(timed: Timed, cluster: Cluster) -> Seconds:
    """The pass as the cost model sees it."""
    plan = Arrangement(ParallelSettings(data=1), timed.micro, "none", "fp32")
    pricing = Pricing(timed.work, plan, cluster, RESILIN)
    ends = ends_times(pricing, first=True, last=True)
    total = ends.forward + ends.backward
    for layer in range(timed.work.model.layers):
        block = block_times(pricing, layer)
        total = total + block.forward + block.backward
    return total


def fit(timed: Sequence[Timed], cluster: Cluster) -> Cluster:
    """The machine with the shares of peak and bandwidth, and the time of an operation, that explain the passes best.

    Args:
        timed: at least three passes.
        cluster: with its measured peak and bandwidth; what it says of the three is not looked at.

    Raises:
        ValueError: fewer than three passes.
    """
    if len(timed) < 3:
        raise ValueError(f"three numbers cannot be fitted to {len(timed)} passes")
    bare = _with(cluster, 1.0, 1.0, 0.0)
    one = _with(cluster, 1.0, 1.0, 1e-6)
    rows = []
    for each in timed:
        without, with_launch = _parts(each, bare), _parts(each, one)
        rows.append((without.products + without.attention, without.traffic, with_launch.total - without.total))
    taken = np.array([each.seconds for each in timed])
    products, traffic, launch = least_squares(np.array(rows) / taken[:, None], np.ones(len(taken)))
    return _with(cluster, 1 / max(products, 1.0), 1 / max(traffic, 1.0), launch * 1e-6)


def least_squares(rows_NK: Matrix, wanted_N: Matrix) -> tuple[float, ...]:
    """(K,) factors, none below zero, that bring the rows nearest to what is wanted; for few of them."""
    count = rows_NK.shape[1]
    best: tuple[float, ...] = (0.0,) * count
    least = float(wanted_N @ wanted_N)
    for size in range(1, count + 1):
        for chosen in combinations(range(count), size):
            found = np.linalg.lstsq(rows_NK[:, chosen], wanted_N, rcond=None)[0]
            left = float(((rows_NK[:, chosen] @ found - wanted_N) ** 2).sum())
            if (found >= 0).all() and left < least:
                least = left
                best = tuple(float(found[chosen.index(k)]) if k in chosen else 0.0 for k in range(count))
    return best


def _with(cluster: Cluster, products: float, bandwidth: float, launch: float) -> Cluster:
    shares = {"products": products, "attention": products, "bandwidth": bandwidth}
    return cluster.model_copy(
        update={
            "efficiency": cluster.efficiency.model_copy(update=shares),
            "device": cluster.device.model_copy(update={"launch": launch}),
        }
    )
