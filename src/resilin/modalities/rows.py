"""Rows of one kind each, all with the same fields.

Shapes: B rows, T positions, F pictures of a row, C channels, Q levels of sound.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resilin.data.errors import DataError
from resilin.data.order import BatchSizes, SampleOrder
from resilin.data.ordered import OrderedSource
from resilin.data.settings import SourceContext, SourceSettings
from resilin.data.tokenizer import Tokenizer
from resilin.modalities.scale_tokens import ScaleTokenizer
from resilin.modalities.sequence import (
    IGNORED,
    TEXT,
    Document,
    Frames,
    Seen,
    Segment,
    Sound,
    Words,
    places_of,
    row_of,
)
from resilin.modalities.sound_codec import SoundCodec
from resilin.nouns import Batch, Source, State
from resilin.transforms import SourceTransform


@dataclass(frozen=True)
class Room:
    """What every row has room for, whatever it holds.

    Attributes:
        length: T.
        levels: Q; 0: no row has sound.
        picture: channels, height and width; None: no row has pictures that are predicted.
        pictures: F of those.
        look: channels, height and width; None: no row has pictures that are looked at.
        looks: F of those.
    """

    length: int
    levels: int = 0
    picture: tuple[int, int, int] | None = None
    pictures: int = 0
    look: tuple[int, int, int] | None = None
    looks: int = 0

    def pictures_of(
        self, found: Sequence[Tensor], numbers: Sequence[Sequence[int]], *, seen: bool = False
    ) -> dict[str, Tensor]:
        """The fields of pictures of some rows: the pictures of each row, and their numbers in their videos.

        Args:
            found: of each row.
            numbers: of each row.
            seen: whether they are looked at; else they are predicted.
        """
        return {**self._fields(found, numbers, seen=seen), **self._none(len(numbers), seen=not seen)}

    def no_pictures(self, rows: int) -> dict[str, Tensor]:
        """The same for rows without any."""
        return {**self._none(rows, seen=False), **self._none(rows, seen=True)}

    def _none(self, rows: int, *, seen: bool) -> dict[str, Tensor]:
        return self._fields([torch.empty(0)] * rows, [[]] * rows, seen=seen)

    def _fields(self, found: Sequence[Tensor], numbers: Sequence[Sequence[int]], *, seen: bool) -> dict[str, Tensor]:
        shape, most = (self.look, self.looks) if seen else (self.picture, self.pictures)
        if shape is None:
            return {}
        pixels = torch.zeros(len(numbers), most, *shape)
        frames = torch.full((len(numbers), most), -1)
        for row, (own, of_row) in enumerate(zip(found, numbers, strict=True)):
            if of_row:
                pixels[row, : len(own)] = own
                frames[row, : len(of_row)] = torch.tensor(list(of_row), dtype=torch.int64)
        return {"seen": pixels, "seen_numbers": frames} if seen else {"pictures": pixels, "frame_numbers": frames}


class TextRows(SourceTransform):
    """The rows of a source of tokens, with the fields of all kinds."""

    def __init__(self, inner: Source, room: Room) -> None:
        super().__init__(inner)
        self.room = room
        have = getattr(inner, "sequence_length", room.length)
        if have > room.length:
            raise DataError(
                f"source.text: rows of {have} tokens in rows of {room.length} positions: lower its sequence_length, or "
                "raise source.sequence_length"
            )

    def shown(self, step: int | None, batch: Batch) -> Batch:
        """The text, padded."""
        tokens_BT, T = batch["tokens"], self.room.length
        B, t = tokens_BT.shape

        def wide(x_BT: Tensor, without: int) -> Tensor:
            return torch.cat((x_BT.long(), torch.full((B, T - t), without)), 1)

        positions, documents = batch.get("positions"), batch.get("documents")
        place_BT = torch.arange(T).expand(B, T)
        position_BT = place_BT if positions is None else wide(positions, 0)
        none_BT = torch.full((B, T), -1)
        fields = {
            "tokens": wide(tokens_BT, 0),
            "labels": wide(batch["labels"], IGNORED),
            "documents": wide(torch.zeros_like(tokens_BT) if documents is None else documents, -1),
            "modality": torch.full((B, T), TEXT),
            "groups": place_BT.clone(),
            "frames": none_BT,
            "videos": none_BT.clone(),
            "positions": position_BT.float()[..., None].repeat(1, 1, 3),
            **self.room.no_pictures(B),
        }
        if self.room.levels:
            none_BTQ = torch.full((B, T, self.room.levels), -1)
            fields |= {"codes": none_BTQ, "next_codes": none_BTQ.clone()}
        return Batch(batch.slots_B, fields)


@dataclass(frozen=True)
class Predicted:
    """Pictures that are predicted, scale by scale.

    Attributes:
        pictures: their tokenizer.
    """

    pictures: ScaleTokenizer
    seen = False

    def segment(self, frames: int, size: tuple[int, int]) -> Segment:
        """In a row."""
        return Frames(frames, self.pictures.shape)

    @property
    def facts(self) -> list[object]:
        """What changes the tokens."""
        return [self.pictures.shape, self.pictures.patch]


@dataclass(frozen=True)
class LookedAt:
    """Pictures that are looked at.

    Attributes:
        cell: pixels of a token's side.
        together: frames that share a token, at most.
    """

    cell: int
    together: int
    seen = True

    def segment(self, frames: int, size: tuple[int, int]) -> Segment:
        """In a row.

        Raises:
            DataError: sides that tokens do not divide.
        """
        if any(side % self.cell for side in size):
            raise DataError(
                f"source.seen: pictures of {size[0]} x {size[1]} pixels are not divided by tokens of {self.cell}: "
                "change source.seen.cell, or the pictures' size"
            )
        return Seen(frames, (size[0] // self.cell, size[1] // self.cell), self.together)

    @property
    def facts(self) -> list[object]:
        """What changes the tokens."""
        return [self.cell, self.together]


class PictureRows:
    """Rows of labelled pictures, or clips of video, as many as fit into a row, each a document.

    Attributes:
        room: of its rows.
        picture: channels, height and width.
        pictures_of_row: pictures that a row holds at most.
    """

    def __init__(
        self,
        settings: SourceSettings,
        kind: Predicted | LookedAt,
        room: Room,
        tokenizer: Tokenizer,
        context: SourceContext,
        before: str,
        after: str,
    ) -> None:
        self.kind, self.room, self.tokenizer = kind, room, tokenizer
        self.before, self.after = before, after
        one: Any = settings.build(replace(context, batch_size=1))
        shape = one.read([0])["inputs"].shape
        self.frames = 1 if len(shape) == 4 else int(shape[2])
        self.picture = int(shape[1]), int(shape[-2]), int(shape[-1])
        self._segment = kind.segment(self.frames, self.picture[1:])
        self._words: dict[int, tuple[list[int], list[int]]] = {}
        self.classes: tuple[str, ...] = one.classes
        longest = max(places_of(self._document(label)) for label in range(len(self.classes)))
        if longest > room.length:
            where, what = ("seen", "larger cells") if kind.seen else ("pictures", "fewer or coarser scales")
            raise DataError(
                f"source.{where}: {self.frames} frame{'s' if self.frames > 1 else ''} in {self._segment.places} "
                f"positions, and the text beside them, take {longest}: raise source.sequence_length, use {what}, or "
                "fewer frames"
            )
        self.per_row = room.length // longest
        self.pictures_of_row = self.per_row * self.frames
        self.inner: Any = settings.build(replace(context, batch_size=context.batch_size * self.per_row))

    def _document(self, label: int) -> Document:
        if label not in self._words:
            name = self.classes[label]
            texts = (self.before.replace("{class}", name), self.after.replace("{class}", name))
            first, last = (list(self.tokenizer.encode(text)) if text else [] for text in texts)
            self._words[label] = first, last
        first, last = self._words[label]
        segments: list[Segment] = [Words(first), self._segment, Words(last)]
        return [segment for segment in segments if segment.places]

    @property
    def digest(self) -> str:
        """Changes with the pictures, their texts and how they become tokens."""
        facts = [self.inner.digest, self.before, self.after, *self.kind.facts, self.room.length]
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def slots(self, step: int) -> int:
        """Rows of a step."""
        return -(-int(self.inner.slots(step)) // self.per_row)

    def __len__(self) -> int:
        """Batches before it ends."""
        return len(self.inner)

    def __bool__(self) -> bool:
        return True

    def fetch(self, step: int, slots: Sequence[int]) -> Batch:
        """The rows of these slots."""
        there = self.inner.slots(step)
        mine = [range(slot * self.per_row, min((slot + 1) * self.per_row, there)) for slot in slots]
        found = self.inner.fetch(step, [sample for own in mine for sample in own])
        inputs, labels = found["inputs"], found["labels"].tolist()
        if inputs.ndim == 4:
            inputs = inputs[:, :, None]
        rows, pixels, numbers, at = [], [], [], 0
        for own in mine:
            part = slice(at, at + len(own))
            rows.append(row_of([self._document(label) for label in labels[part]], self.room.length, self.room.levels))
            pixels.append(inputs[part].transpose(1, 2).flatten(0, 1))
            numbers.append([*range(self.frames)] * len(own))
            at += len(own)
        fields = {name: torch.stack([row[name] for row in rows]) for name in rows[0]} if rows else {}
        fields |= self.room.pictures_of(pixels, numbers, seen=self.kind.seen)
        return Batch(torch.tensor(list(slots), dtype=torch.int64), fields)

    def state_dict(self) -> State:
        """Of the pictures."""
        return {"digest": self.digest, "pictures": self.inner.state_dict()}

    def load_state_dict(self, state: State) -> None:
        """Refuse that of other pictures, or others' tokens."""
        if state.get("digest") != self.digest:
            raise DataError("the checkpoint was made on other pictures or tokens of them: resume with its own settings")
        self.inner.load_state_dict(state["pictures"])


class SoundRows(OrderedSource):
    """Stretches of sound, each a row of its own."""

    def __init__(
        self,
        sounds: Sequence[tuple[str, Tensor]],
        codec: SoundCodec,
        room: Room,
        tokenizer: Tokenizer,
        context: SourceContext,
        before: str,
        held_out: float,
    ) -> None:
        self.codec, self.room = codec, room
        training = context.split == "train"
        self.stretches: list[tuple[list[int], Tensor]] = []
        digest = hashlib.sha256(repr([context.split, before, codec.levels, codec.codes, room.length]).encode())
        for name, samples in sounds:
            words = list(tokenizer.encode(before.replace("{name}", name))) if before else []
            edge = round(len(samples) * (1 - held_out))
            codes_AQ = codec.encode(samples[:edge] if training else samples[edge:])
            most = room.length - len(words) - 1
            if most < 1:
                raise DataError(f"source.sound: no room for sound behind {before!r}: raise source.sequence_length")
            self.stretches += [(words, part) for part in codes_AQ.split(most) if len(part)]
            digest.update(codes_AQ.numpy().tobytes())
        if not self.stretches:
            raise DataError(
                f"source.sound: the {context.split} split has no whole frame of {codec.frame / codec.rate:g} s: give "
                "more sound, or change held_out"
            )
        order = SampleOrder(
            len(self.stretches), context.seed, BatchSizes(context.batch_size), training, None if training else 1
        )
        super().__init__(order, digest.hexdigest())

    def fetch(self, step: int, slots: Sequence[int]) -> Batch:
        """The stretches of these slots."""
        rows = []
        for number in self.order.row_of(step, slots).tolist():
            words, codes_AQ = self.stretches[number]
            document: Document = [Words(words), Sound(codes_AQ)] if words else [Sound(codes_AQ)]
            rows.append(row_of([document], self.room.length, self.room.levels))
        fields = {name: torch.stack([row[name] for row in rows]) for name in rows[0]} if rows else {}
        fields |= self.room.no_pictures(len(rows))
        return Batch(torch.from_numpy(np.fromiter(slots, np.int64, len(slots))), fields)
