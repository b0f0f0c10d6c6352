"""Joining: the router's rows stacked, the feed-forwards stacked, and nothing trained (FlexOlmo).

An expert may also be added to a model that is joined already.

Shapes: E experts, L layers, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from resilin.joined.anchor import FILE as ANCHOR_FILE
from resilin.joined.anchor import Anchor
from resilin.joined.beside import joined_settings
from resilin.joined.digest import table_digest, tensor_digest
from resilin.joined.errors import JoinError
from resilin.joined.expert import Expert
from resilin.joined.parts import FeedForward, Parts, feed_forward_of, offsets_of
from resilin.joined.record import UNTUNED, Entry, JoinedRecord, check_names
from resilin.joined.stored import StoredModel
from resilin.joined.write import write_joined
from resilin.models.block import Block
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings


class Base(NamedTuple):
    """A folder that experts are joined to, or taken out of.

    Attributes:
        stored: its parameters.
        dense: settings of the anchor.
        record: of the experts it has.
        parts: of all of it, with rows as they were joined.
        tuned_ELD: rows as they were tuned afterwards; None: they were not.
    """

    stored: StoredModel
    dense: DecoderSettings
    record: JoinedRecord
    parts: Parts
    tuned_ELD: Tensor | None


def expert_digest(parts: Parts, number: int) -> str:
    """The digest of an expert as it lies in a joined model: its matrices, its untuned row, its offset."""
    settings, table = parts.settings, {}
    matrices = ("gate", "up", "down") if settings.gated else ("up", "down")
    for layer in range(settings.layers):
        for matrix in matrices:
            table[f"{layer}.{matrix}"] = tensor_digest(parts.experts[number](layer, matrix))
    table["rows"] = tensor_digest(parts.rows_ELD[number])
    if parts.offsets_EL is not None and bool(parts.offsets_EL[number].any()):  # zeros beside others' are none
        table["offsets"] = tensor_digest(parts.offsets_EL[number])
    return table_digest(table)


def open_base(folder: Path | str) -> Base:
    """An anchor, or a joined model; of its weights the router's rows are read, and an anchor's feed-forwards for their
    digest.

    Raises:
        JoinError: it is neither.
    """
    folder = Path(folder)
    if (folder / ANCHOR_FILE).is_file():
        return _open_anchor(Anchor.read(folder))
    return _open_joined(folder)


def _open_anchor(anchor: Anchor) -> Base:
    stored = StoredModel(anchor.folder)
    settings = joined_settings(stored.settings, 1, offsets=False)
    experts = [partial(_matrix, stored, 0)]
    parts = Parts(settings, stored.read, experts, anchor.rows_LD[None].float(), None)
    entry = Entry(anchor.name, expert_digest(parts, 0), offsets=False)
    record = JoinedRecord(anchor.digest, (entry,), anchor.tokenizer)
    return Base(stored, stored.settings, record, parts, None)


def _open_joined(folder: Path) -> Base:
    record, stored = JoinedRecord.read(folder), StoredModel(folder)
    moe = stored.settings.moe
    if moe is None or moe.experts != len(record.experts):
        raise JoinError(f"{folder}: experts.json names {len(record.experts)} experts, config.json has others")
    dense = stored.settings.model_copy(update={"moe": None, "mlp_size": moe.expert_size})
    layers = range(dense.layers)
    rows_ELD = torch.stack([stored.read(f"blocks.{layer}.moe.router.weight") for layer in layers], 1).float()
    offsets_EL, tuned_ELD = None, None
    if moe.router_bias:
        offsets_EL = torch.stack([stored.read(f"blocks.{layer}.moe.router.bias") for layer in layers], 1).float()
    if record.router == "tuned":
        untuned = load_file(folder / UNTUNED)
        rows_ELD, tuned_ELD = torch.stack([untuned[name].float() for name in record.names]), rows_ELD
    experts = [partial(_matrix, stored, number) for number in range(moe.experts)]
    return Base(stored, dense, record, Parts(stored.settings, stored.read, experts, rows_ELD, offsets_EL), tuned_ELD)


def _matrix(stored: StoredModel, expert: int, layer: int, matrix: str) -> Tensor:
    return stored.feed_forward(layer, matrix, expert)


def check_experts(experts: Sequence[Expert], anchor: str, tokenizer: str | None, settings: DecoderSettings) -> None:
    """Refuse experts that cannot be joined to an anchor.

    Args:
        experts: to be joined.
        anchor: its digest.
        tokenizer: digest of its tokenizer.
        settings: of its dense decoder.

    Raises:
        JoinError: naming the expert, and what it does not share.
    """
    for expert in experts:
        if expert.anchor != anchor:
            raise JoinError(
                f"expert {expert.name!r} was trained beside another anchor ({expert.anchor}) than this one ({anchor}): "
                "attention, embeddings, norms, feed-forward or the anchor's row differ; train it beside this one"
            )
        if None not in (expert.tokenizer, tokenizer) and expert.tokenizer != tokenizer:
            raise JoinError(
                f"expert {expert.name!r} was trained with another tokenizer than the anchor's: its tokens mean "
                "something else; train it with the tokenizer in the anchor's folder"
            )
        expert.check(settings)


def joined_parts(base: Parts, dense: DecoderSettings, experts: Sequence[Expert], top_k: int | None) -> Parts:
    """A base's parts and those of further experts."""
    offsets = base.offsets_EL is not None or any(expert.offsets for expert in experts)
    rows_ELD = torch.cat([base.rows_ELD, *(expert.rows().float()[None] for expert in experts)])
    offsets_EL = None
    if offsets:
        before_EL = base.offsets_EL if base.offsets_EL is not None else torch.zeros(base.rows_ELD.shape[:2])
        offsets_EL = torch.cat([before_EL, *(offsets_of(expert)[None] for expert in experts)])
    feed_forwards: list[FeedForward] = [*base.experts, *map(feed_forward_of, experts)]
    settings = joined_settings(dense, len(feed_forwards), top_k, offsets=offsets)
    return Parts(settings, base.shared, feed_forwards, rows_ELD, offsets_EL)


def join(
    base: Path | str,
    experts: Sequence[Expert],
    output: Path,
    *,
    top_k: int | None = None,
    max_shard_bytes: int = 5_000_000_000,
    force: bool = False,
) -> list[Path]:
    """Join experts to an anchor, or to a model that is joined already; nothing is trained.

    Args:
        base: folder of the anchor or of the joined model.
        experts: to be added, in this order.
        output: the folder to write.
        top_k: experts that a token visits; None: all. It can be changed when the model is used (a budget's `top_k`).
        max_shard_bytes: of one file of weights.
        force: replace the files of an earlier export.

    Returns:
        The files written.

    Raises:
        JoinError: an expert does not belong to this anchor, or two have one name; before anything is written.
        ExportError: the folder is in use.
    """
    opened = open_base(base)
    if opened.tuned_ELD is not None:
        raise JoinError(
            f"{base}: its router was tuned with the experts it has; a new row would not fit those. Join the expert to "
            "the model as it was before, and tune that"
        )
    check_names([*opened.record.names, *(expert.name for expert in experts)])
    check_experts(experts, opened.record.anchor, opened.record.tokenizer, opened.dense)
    parts = joined_parts(opened.parts, opened.dense, experts, top_k)
    dtype = opened.stored.dtype
    stored = rounded(parts, dtype)
    had = len(opened.record.experts)
    added = [
        Entry(expert.name, expert_digest(stored, had + number), expert.offsets, expert.card)
        for number, expert in enumerate(experts)
    ]
    record = JoinedRecord(opened.record.anchor, (*opened.record.experts, *added), opened.record.tokenizer)
    return write_joined(
        parts, opened.stored.folder, Path(output), record, dtype, max_shard_bytes=max_shard_bytes, force=force
    )


def rounded(parts: Parts, dtype: torch.dtype) -> Parts:
    """Parts as they are when stored in a format."""

    def as_stored(one: FeedForward) -> FeedForward:
        return lambda layer, matrix: one(layer, matrix).to(dtype)

    offsets_EL = None if parts.offsets_EL is None else parts.offsets_EL.to(dtype).float()
    experts = [as_stored(one) for one in parts.experts]
    return Parts(parts.settings, parts.shared, experts, parts.rows_ELD.to(dtype).float(), offsets_EL)


@torch.no_grad()
def build(parts: Parts, like: Tensor) -> Decoder:
    """A joined model in memory, with copies of its parts.

    Args:
        parts: of the model.
        like: a tensor of the wanted format and device.
    """
    model = Decoder(parts.settings, seed=None, device="meta").to(like.dtype).to_empty(device=like.device)
    for name, parameter in model.named_parameters():
        parameter.copy_(parts.parameter(name))
    return model


def join_models(
    anchor: Decoder, anchor_rows_LD: Tensor, experts: Sequence[Expert], top_k: int | None = None
) -> Decoder:
    """The same in memory; whose experts they are is not asked.

    Args:
        anchor: the dense decoder.
        anchor_rows_LD: its rows of the router.
        experts: to be joined.
        top_k: experts that a token visits; None: all.

    Raises:
        JoinError: an expert does not fit the anchor's sizes, or two have one name.
    """
    check_names([expert.name for expert in experts])
    for expert in experts:
        expert.check(anchor.settings)

    def own(layer: int, matrix: str) -> Tensor:
        block = anchor.blocks[layer]
        assert isinstance(block, Block)
        return block.mlp.get_parameter(f"{matrix}.weight")

    settings = joined_settings(anchor.settings, 1, offsets=False)
    base = Parts(settings, anchor.get_parameter, [own], anchor_rows_LD[None].float(), None)
    return build(joined_parts(base, anchor.settings, experts, top_k), anchor.embed.weight)
