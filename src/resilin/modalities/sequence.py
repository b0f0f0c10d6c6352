"""From documents of text, pictures and sound to the fields of a row.

A document is a list of segments, a row a list of documents. What a position holds and what it predicts:

    text      the token                                          the token behind it
    picture   what coarser scales (and the frame before) say,    the token of this very place,
              brought to this scale's grid                       with all others of its scale at once
    sound     the sum of its levels' embeddings                  the levels of the next frame, one after another
    seen      what an encoder makes of a part of a picture       nothing

So no position of a picture that is predicted holds anything of its own group: a whole scale is predicted in parallel,
and positions of a group may see each other. A position of sound is a group of its own; the parts of a picture that is
looked at are one group. Which kind of segment comes next is not predicted: whoever asks the model says so.

Shapes: T positions, Q levels of sound, A frames of sound.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from resilin.data.errors import DataError
from resilin.modalities.positions import picture_positions, text_positions
from resilin.modalities.shape import PictureShape

TEXT, PICTURE, SOUND, SEEN = 0, 1, 2, 3
IGNORED = -100
_NONE = -1


@dataclass(frozen=True)
class Words:
    """A stretch of text.

    Attributes:
        ids: its tokens; each but the last predicts the next one.
    """

    ids: Sequence[int]

    @property
    def places(self) -> int:
        """Positions in a row."""
        return len(self.ids)


@dataclass(frozen=True)
class Frames:
    """A picture, or the frames of a video.

    Attributes:
        count: frames; 1 for a picture.
        shape: of each.
    """

    count: int
    shape: PictureShape

    @property
    def places(self) -> int:
        """Positions in a row."""
        return self.count * self.shape.places


@dataclass(frozen=True)
class Seen:
    """A picture, or the frames of a video, that is looked at.

    Attributes:
        count: frames; 1 for a picture.
        grid: tokens of a frame, height and width.
        together: frames that share a token, at most.
    """

    count: int
    grid: tuple[int, int]
    together: int

    @property
    def places(self) -> int:
        """Positions in a row."""
        return -(-self.count // self.together) * self.grid[0] * self.grid[1]


@dataclass(frozen=True, eq=False)
class Sound:
    """Frames of sound; a position without a code begins it.

    Attributes:
        codes_AQ: int64, the code of each level.
    """

    codes_AQ: Tensor

    @property
    def places(self) -> int:
        """Positions in a row."""
        return len(self.codes_AQ) + 1


Segment = Words | Frames | Seen | Sound
Document = Sequence[Segment]


def places_of(document: Document) -> int:
    """Positions that a document takes."""
    return sum(segment.places for segment in document)


class _Row:
    """A row that grows by segments."""

    def __init__(self, levels: int) -> None:
        self.levels = levels
        self.fields: dict[str, list[Tensor]] = {}
        self.group = self.frame = 0

    def add(self, count: int, **fields: Tensor | int) -> None:
        """Positions with these fields; a number stands for as many of it."""
        for name, value in fields.items():
            tensor = value if isinstance(value, Tensor) else torch.full((count,), value)
            self.fields.setdefault(name, []).append(tensor)

    def alone(self, count: int) -> Tensor:
        """Numbers of groups of one token each."""
        self.group += count
        return torch.arange(self.group - count, self.group)

    def silent(self, count: int) -> dict[str, Tensor]:
        """The fields of sound where there is none."""
        if not self.levels:
            return {}
        none_TQ = torch.full((count, self.levels), _NONE)
        return {"codes": none_TQ, "next_codes": none_TQ}

    def words(self, words: Words, document: int, at: float) -> float:
        """Adds text that begins at a position in time; returns where the next segment begins."""
        count = words.places
        ids_T = torch.tensor(list(words.ids), dtype=torch.int64)
        labels_T = torch.cat((ids_T[1:], torch.full((min(count, 1),), IGNORED)))
        self.add(
            count, tokens=ids_T, labels=labels_T, documents=document, modality=TEXT, groups=self.alone(count),
            frames=_NONE, videos=_NONE, positions=text_positions(count, at), **self.silent(count),
        )  # fmt: skip
        return at + count

    def pictures(self, frames: Frames, document: int, at: float) -> float:
        """Adds pictures."""
        shape, first = frames.shape, self.frame
        for number in range(frames.count):
            count = shape.places
            self.add(
                count, tokens=0, labels=IGNORED, documents=document, modality=PICTURE,
                groups=shape.group_of_place + self.group, frames=self.frame, videos=first,
                positions=picture_positions(shape, at, number), **self.silent(count),
            )  # fmt: skip
            self.group += len(shape.grids)
            self.frame += 1
        return at + max(frames.count, *shape.finest)

    def seen(self, seen: Seen, document: int, at: float) -> float:
        """Adds pictures that are looked at: a group for the tokens that frames share."""
        shape, count = PictureShape((seen.grid,)), seen.grid[0] * seen.grid[1]
        for frame in range(0, seen.count, seen.together):
            self.add(
                count, tokens=0, labels=IGNORED, documents=document, modality=SEEN, groups=self.group, frames=_NONE,
                videos=_NONE, positions=picture_positions(shape, at, frame), **self.silent(count),
            )  # fmt: skip
            self.group += 1
        return at + max(seen.count, *seen.grid)

    def sound(self, sound: Sound, document: int, at: float) -> float:
        """Adds sound."""
        count = sound.places
        none_1Q = torch.full((1, self.levels), _NONE)
        self.add(
            count, tokens=0, labels=IGNORED, documents=document, modality=SOUND, groups=self.alone(count),
            frames=_NONE, videos=_NONE, positions=text_positions(count, at),
            codes=torch.cat((none_1Q, sound.codes_AQ)), next_codes=torch.cat((sound.codes_AQ, none_1Q)),
        )  # fmt: skip
        return at + count

    def padding(self, count: int) -> None:
        """Adds positions that nobody sees and nothing is asked of."""
        self.add(
            count, tokens=0, labels=IGNORED, documents=_NONE, modality=TEXT, groups=self.alone(count),
            frames=_NONE, videos=_NONE, positions=text_positions(count, 0.0), **self.silent(count),
        )  # fmt: skip


def row_of(documents: Iterable[Document], length: int, levels: int = 0) -> dict[str, Tensor]:
    """The fields of a row: `tokens`, `labels`, `documents`, `modality`, `groups`, `frames`, `videos` (T,) int64,
    `positions` (T, 3) float32 and, with sound, `codes` and `next_codes` (T, Q) int64, -1 where there is none.

    Args:
        documents: laid one behind another; the rest is padding, whose document is -1.
        length: T.
        levels: Q; 0: no row has sound.

    Raises:
        DataError: they do not fit, or have another number of levels.
    """
    row, used = _Row(levels), 0
    for number, document in enumerate(documents):
        at = 0.0
        for segment in document:
            if isinstance(segment, Words):
                at = row.words(segment, number, at)
            elif isinstance(segment, Frames):
                at = row.pictures(segment, number, at)
            elif isinstance(segment, Seen):
                at = row.seen(segment, number, at)
            elif segment.codes_AQ.ndim != 2 or segment.codes_AQ.shape[1] != levels or not levels:
                have = tuple(segment.codes_AQ.shape)
                raise DataError(f"document {number}: sound of shape {have} in a row of {levels} levels")
            else:
                at = row.sound(segment, number, at)
        used += places_of(document)
    if used > length:
        raise DataError(f"documents of {used} positions do not fit into a row of {length}: raise sequence_length")
    row.padding(length - used)
    return {name: torch.cat(parts) for name, parts in row.fields.items()}
