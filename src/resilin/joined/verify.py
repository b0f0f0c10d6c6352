"""Whether a joined model is what it says: its frozen parts the anchor's, its experts those that were handed over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from resilin.joined.anchor import anchor_digest, stored_table
from resilin.joined.expert import Expert
from resilin.joined.join import expert_digest, open_base, rounded
from resilin.joined.parts import Parts, feed_forward_of, offsets_of


@dataclass(frozen=True, slots=True)
class Checked:
    """What was found of one part.

    Attributes:
        what: "anchor", or an expert's name.
        holds: whether it is what the record says.
        told: for people.
    """

    what: str
    holds: bool
    told: str


def verify(folder: Path | str, experts: Sequence[Expert] = ()) -> list[Checked]:
    """Read a joined model, a tensor at a time, and compare digests.

    Args:
        folder: of the joined model (or of an anchor).
        experts: as they were handed over: those that are here are compared with them.

    Raises:
        JoinError: it is no joined model.
    """
    base = open_base(folder)
    found = anchor_digest(stored_table(base.stored), base.parts.rows_ELD[0], base.stored.settings)
    same = found == base.record.anchor
    report = [Checked("anchor", same, base.record.anchor if same else f"{found}, not {base.record.anchor}")]
    here = {expert.name: expert for expert in experts}
    for number, entry in enumerate(base.record.experts):
        digest = expert_digest(base.parts, number)
        told = digest if digest == entry.digest else f"{digest}, not {entry.digest}"
        holds = digest == entry.digest
        if entry.name in here:
            meant = _digest_in(base.parts, here[entry.name], base.stored.dtype)
            holds = holds and meant == digest
            told += ", as it was handed over" if meant == digest else f"; handed over was {meant}"
        report.append(Checked(entry.name, holds, told))
    return report


def _digest_in(parts: Parts, expert: Expert, dtype: torch.dtype) -> str:
    """What the digest of a handed-over expert is in the format of a joined model."""
    alone = Parts(
        parts.settings, parts.shared, [feed_forward_of(expert)], expert.rows().float()[None], offsets_of(expert)[None]
    )
    return expert_digest(rounded(alone, dtype), 0)
