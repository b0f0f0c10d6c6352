"""Which regions of a decoder's parameters a budget uses: the one place where it is said what is cut.

Running in place, extracting, and what is tested of gradients all read what is said here.

With sizes d (hidden), m (neurons), and the kept heads' rows: embedding and head [V, :d]; norms [:d]; q, k, v [heads,
:d]; o [:d, heads]; gate and up [:m, :d]; down [:d, :m]; router [experts, :d], its bias and the
balance's [experts]; stacked experts
[experts, :m, :d] and [experts, :d, :m]. Rows of heads are one run where whole groups are kept, else one run for each
key head; experts that are named one by one are as many runs as they leave gaps. The shared expert keeps its neurons.
What a looped decoder's blocks are told is as wide as the stream. Of a Mamba-2 layer, with the kept channels of the kept
heads of each group: z, x [channels, :d], the convolution of x and the norm [channels], out [:d, channels]; B and C
[state, :d], the first numbers of each group; dt [heads, :d]; A_log, D, dt_bias [heads]. Of a decoder of chains, each of
which has parameters of its own, those of the first chains are used whole.
"""

from __future__ import annotations

import re
from functools import lru_cache
from types import MappingProxyType

from resilin.layout import Region
from resilin.models.chain_freeze import chain_of
from resilin.models.chain_settings import reach_of
from resilin.models.cut import BlockCut, Cut, Regions
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.hybrid_settings import HybridSettings
from resilin.nested.budgets import Budget
from resilin.nested.sub_model import LayerPart, sub_model

Runs = tuple[tuple[int, int], ...]
"""(first index, count) of what is used in one dimension."""
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


@lru_cache(maxsize=64)
def shapes_of(settings: DecoderSettings) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of a decoder, by name."""
    outline = settings.on_meta()
    return {name: tuple(parameter.shape) for name, parameter in outline.named_parameters()}


def _runs_of(numbers: tuple[int, ...]) -> Runs:
    """Ascending numbers as runs."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and sum(runs[-1]) == number:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((number, 1))
    return tuple(runs)


def _head_rows(settings: DecoderSettings, part: LayerPart) -> tuple[Runs, Runs]:
    """Rows of the query projection and of the key projection that are used."""
    own, width = settings.at(part.layer), settings.head_width
    group, kept = own.heads // own.key_heads, part.heads // part.key_heads
    keys = ((0, part.key_heads * width),)
    if kept == group:
        return ((0, part.heads * width),), keys
    return tuple((key * group * width, kept * width) for key in range(part.key_heads)), keys


def _joined(runs: Runs) -> Runs:
    """Runs that touch, as one."""
    found: list[tuple[int, int]] = []
    for first, count in runs:
        if found and sum(found[-1]) == first:
            found[-1] = (found[-1][0], found[-1][1] + count)
        else:
            found.append((first, count))
    return tuple(found)


def _mamba_runs(settings: HybridSettings, part: LayerPart, hidden: int, name: str) -> tuple[Runs | None, ...]:
    """As `_block_runs`, of a Mamba-2 layer."""
    mamba, d = settings.at(part.layer).mamba, ((0, hidden),)
    size, state, group = mamba.head_size, mamba.state_size, mamba.heads // mamba.groups
    kept = part.mamba_heads // mamba.groups
    heads = _joined(tuple((first * group, kept) for first in range(mamba.groups)))
    numbers = [first + number for first, count in heads for number in range(count)]
    channels = _joined(tuple((number * size, part.mamba_head_size) for number in numbers))
    states = _joined(tuple((number * state, part.state_size) for number in range(mamba.groups)))
    stem, _, kind = name.removeprefix("mamba.").rpartition(".")
    rows = {"z": channels, "x": channels, "B": states, "C": states, "dt": heads}
    if stem in rows:
        return rows[stem], d
    if stem.startswith("conv_"):
        own = rows[stem.removeprefix("conv_")]
        return (own, None, None) if kind == "weight" else (own,)
    if stem == "norm":
        return (channels,)
    if stem == "out":
        return d, channels
    return (heads,)


def _block_runs(settings: DecoderSettings, part: LayerPart, hidden: int, name: str) -> tuple[Runs | None, ...]:
    """What is used in each dimension of a block's parameter; None: all."""
    if name.startswith("mamba."):
        assert isinstance(settings, HybridSettings)
        return _mamba_runs(settings, part, hidden, name)
    stem, _, kind = name.rpartition(".")
    d, neurons = ((0, hidden),), ((0, part.ffn),)
    queries, keys = _head_rows(settings, part) if part.heads else ((), ())
    is_weight = kind == "weight"
    if stem in ("attention_norm", "mlp_norm", "norm"):
        return (d,)
    if stem in ("attention.q_norm", "attention.k_norm"):
        rows = queries if stem.endswith("q_norm") else keys
        return (rows,) if settings.qk_norm_over == "width" else (None,)
    if stem in ("attention.q", "attention.k", "attention.v"):
        rows = queries if stem.endswith("q") else keys
        return (rows, d) if is_weight else (rows,)
    if stem == "attention.o":
        return (d, queries) if is_weight else (d,)
    if stem in ("mlp.gate", "mlp.up"):
        return (neurons, d) if is_weight else (neurons,)
    if stem == "mlp.down":
        return (d, neurons) if is_weight else (d,)
    if stem == "modulation":  # four maps below each other
        whole = settings.hidden_size
        rows = tuple((number * whole, hidden) for number in range(4)) if hidden < whole else ((0, 4 * whole),)
        return (rows, d) if is_weight else (rows,)
    if stem == "moe.router":
        return (_runs_of(part.experts), d) if is_weight else (_runs_of(part.experts),)
    if name == "moe.balance_bias":
        return (_runs_of(part.experts),)
    if stem in ("moe.shared_gate", "moe.shared.gate", "moe.shared.up"):
        return (None, d)
    if stem == "moe.shared.down":
        return (d, None)
    if stem == "moe.experts":
        experts = _runs_of(part.experts)
        return (experts, d, neurons) if kind == "down" else (experts, neurons, d)
    raise AssertionError(f"nobody has said which region of {name} a budget uses")


def _boxes(shape: tuple[int, ...], runs: tuple[Runs | None, ...]) -> tuple[Region, ...]:
    """The boxes of some runs in each dimension, in order; at most one dimension has several."""
    boxes: list[tuple[tuple[int, int], ...]] = [()]
    for size, of_dim in zip(shape, runs, strict=True):
        boxes = [(*box, run) for box in boxes for run in (of_dim or ((0, size),))]
    return tuple(Region(tuple(o for o, _ in box), tuple(s for _, s in box)) for box in boxes)


@lru_cache(maxsize=256)
def regions(settings: DecoderSettings, budget: Budget) -> MappingProxyType[str, tuple[Region, ...]]:
    """The regions of each parameter that a budget uses, by name, in the order in which extraction puts them together.

    Parameters of skipped layers, and of chains beyond the first ones, are not there.

    Raises:
        BudgetError: the budget does not fit.
    """
    part = sub_model(settings, budget)
    layers, d = {one.layer: one for one in part.layers}, ((0, part.hidden),)
    chains = None if settings.chains is None else reach_of(settings.widths.hidden).index(part.hidden) + 1
    found: dict[str, tuple[Region, ...]] = {}
    for name, shape in shapes_of(settings).items():
        in_block = _BLOCK.fullmatch(name)
        if chains is not None:
            if chain_of(name) < chains and (in_block is None or int(in_block[1]) in layers):
                found[name] = (Region.whole(shape),)
            continue
        if in_block is None:
            first = (d, None) if name.endswith("up.weight") else (d, d)  # of what embeds a loop's time
            plain = first if name.startswith("loop.") else (None, d)
            found[name] = _boxes(shape, (d,) if len(shape) == 1 else plain)
        elif (layer := int(in_block[1])) in layers:
            found[name] = _boxes(shape, _block_runs(settings, layers[layer], part.hidden, in_block[2]))
    return MappingProxyType(found)


@lru_cache(maxsize=256)
def cut_for(settings: DecoderSettings, budget: Budget) -> Cut | None:
    """The cut with which a decoder runs a budget in place; None: it is all of it.

    Raises:
        BudgetError: the budget does not fit.
    """
    part, whole = sub_model(settings, budget), sub_model(settings, Budget())
    if part == whole:
        return None
    shapes, used = shapes_of(settings), regions(settings, budget)
    by_block: dict[int, dict[str, tuple[Region, ...]]] = {}
    for name, boxes in used.items():
        in_block = _BLOCK.fullmatch(name)
        if in_block is None:
            continue
        if in_block[2].startswith("moe.experts."):  # all stay there: who is chosen says which are computed
            (count, *_), box = shapes[name], boxes[0]
            boxes = (Region((0, *box.offsets[1:]), (count, *box.sizes[1:])),)
        if boxes != (Region.whole(shapes[name]),):
            by_block.setdefault(int(in_block[1]), {})[in_block[2]] = boxes
    before = {one.layer: one for one in whole.layers}
    kept = {one.layer: one for one in part.layers}
    blocks: list[BlockCut | None] = []
    for layer in range(settings.layers):
        one = kept.get(layer)
        if one is None or settings.chains is not None or (one == before[layer] and part.hidden == whole.hidden):
            blocks.append(None)
            continue
        blocks.append(_block_cut(by_block.get(layer, {}), part.hidden, one, before[layer]))
    return Cut(part.hidden, tuple(blocks), frozenset(before) - frozenset(kept), part.trajectory)


def _block_cut(used: Regions, hidden: int, part: LayerPart, whole: LayerPart) -> BlockCut:
    experts = part.experts if part.experts != whole.experts else None
    in_attention = any(name.startswith("attention.") for name in used)
    return BlockCut(used, hidden, part.heads, part.key_heads, experts, part.top_k, in_attention)
