"""Taking experts out of a joined model: opting out is a budget that does not name them (FlexOlmo).

What is written is what joining would have written without them. Where only the anchor is left it is an ordinary dense
model again, the anchor's own bits.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from resilin.joined.beside import joined_settings
from resilin.joined.errors import JoinError
from resilin.joined.join import Base, open_base
from resilin.joined.parts import Parts
from resilin.joined.record import JoinedRecord
from resilin.joined.write import write_joined
from resilin.models.decoder_settings import DecoderSettings
from resilin.nested.sub_model import sub_model


def _left(base: Base, names: Collection[str], top_k: int | None) -> tuple[tuple[int, ...], DecoderSettings]:
    """The numbers of the experts that stay, and the settings of what is left."""
    full = base.stored.settings
    layer = sub_model(full, base.record.budget(full, names, top_k)).layers[0]
    if len(layer.experts) == 1:
        return layer.experts, base.dense
    offsets = any(base.record.experts[number].offsets for number in layer.experts)
    return layer.experts, joined_settings(base.dense, len(layer.experts), layer.top_k, offsets=offsets)


def _parts(base: Base, kept: Sequence[int], settings: DecoderSettings, rows_ELD: Tensor) -> Parts:
    numbers, offsets_EL = list(kept), base.parts.offsets_EL
    has_offsets = settings.moe is not None and settings.moe.router_bias and offsets_EL is not None
    left_EL = offsets_EL[numbers] if has_offsets and offsets_EL is not None else None
    experts = [base.parts.experts[number] for number in kept]
    return Parts(settings, base.parts.shared, experts, rows_ELD[numbers], left_EL)


def without(
    folder: Path | str,
    names: Collection[str],
    output: Path,
    *,
    top_k: int | None = None,
    keep_tuned: bool = False,
    max_shard_bytes: int = 5_000_000_000,
    force: bool = False,
) -> list[Path]:
    """Write a joined model without some experts; only what stays is read.

    Args:
        folder: of the joined model.
        names: of the experts that go.
        output: the folder to write.
        top_k: experts that a token visits; None: as many as before, or all that are left.
        keep_tuned: of a model whose router was tuned after joining, keep the tuned rows of those that stay. They have
            seen what the proxies of the others were like; without this the rows as they were joined are taken.
        max_shard_bytes: of one file of weights.
        force: replace the files of an earlier export.

    Returns:
        The files written.

    Raises:
        JoinError: an expert is not there, or is the anchor's own.
        BudgetError: `top_k` is more than are left.
        ExportError: the folder is in use.
    """
    if not names:
        raise JoinError("name at least one expert to take out")
    base = open_base(folder)
    kept, settings = _left(base, names, top_k)
    record: JoinedRecord | None = replace(base.record.of(kept), router="joined")
    parts, untuned = _parts(base, kept, settings, base.parts.rows_ELD), None
    if settings.moe is None:
        record = None
    elif base.tuned_ELD is not None and keep_tuned:
        record = replace(base.record.of(kept), router="tuned")
        untuned = dict(zip(record.names, parts.rows_ELD, strict=True))
        parts = _parts(base, kept, settings, base.tuned_ELD)
    return write_joined(
        parts,
        base.stored.folder,
        Path(output),
        record,
        base.stored.dtype,
        untuned=untuned,
        max_shard_bytes=max_shard_bytes,
        force=force,
    )
