"""A source whose rows hold text, pictures, video or sound, in fixed proportions, for one decoder.

Every slot is a row of one kind; a row of pictures or sound may hold text beside them. All rows have the same fields
(`resilin.modalities.sequence`, `resilin.modalities.picture_batch`), so they go together into any micro-batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from resilin.config import Settings, component
from resilin.data.errors import DataError
from resilin.data.mix import ChainSource, MixSource, whole_weights
from resilin.data.order import BatchSizes
from resilin.data.settings import SourceContext, SourceSettings
from resilin.data.tokenizer import Tokenizer
from resilin.modalities.rows import LookedAt, PictureRows, Predicted, Room, SoundRows, TextRows
from resilin.modalities.scale_tokens import ScaleTokenizer, check_scales, fit
from resilin.modalities.shape import PictureShape
from resilin.modalities.sound_codec import SoundCodec
from resilin.modalities.sound_codec import fit as fit_sound
from resilin.modalities.sound_files import read_wave, wave_files
from resilin.nouns import Source

PICTURE_FILE, SOUND_FILE = "pictures.safetensors", "sound.safetensors"
"""In a run's folder: how its pictures and its sound become tokens."""

Positive = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(gt=0)]


class TextStream(Settings):
    """Rows of text."""

    weight: Weight = 1.0
    """Its share of the slots."""
    source: Annotated[SourceSettings, component("resilin.data.text_source:TextSource")]
    """Any source of tokens; its tokenizer is that of all text."""


class PictureStream(Settings):
    """Rows of pictures or video, predicted or looked at, each between two texts."""

    weight: Weight = 1.0
    """Its share of the slots."""
    source: Annotated[SourceSettings, component("resilin.vision.images:ImageFolder")]
    """Labelled images or video clips."""
    before: str = ""
    """A text in front of each picture; `{class}` is its label."""
    after: str = ""
    """A text behind each picture; behind one that is predicted it needs `seen_whole`, or it would not see the last
    scale."""


class Pictures(Settings):
    """How pictures become tokens, and where they come from."""

    streams: Annotated[tuple[PictureStream, ...], Field(min_length=1)]
    """The sources."""
    patch: Positive = 2
    """Pixels of a patch's side."""
    scales: Annotated[tuple[Positive | tuple[Positive, Positive], ...], Field(min_length=1)] = (1, 2, 4, 4)
    """Grids from coarse to fine: cells of a side, or height and width; the last has the picture's size / patch."""
    bits: Positive = 4
    """Bits of a token: principal components of a patch."""
    seen_whole: bool = False
    """A further group behind each picture holds all of it, for what comes after."""
    fitted_to: Positive = 1024
    """Pictures of the training split that the tokenizer is fitted to, the first of each source."""

    @model_validator(mode="after")
    def _scales_fit(self) -> Pictures:
        check_scales(self.shape.scales)
        if any(stream.after for stream in self.streams) and not self.seen_whole:
            raise ValueError(
                "a text behind a picture does not see its last scale, which only its own places predict: set "
                "pictures.seen_whole = true"
            )
        return self

    @property
    def shape(self) -> PictureShape:
        """Of a picture's tokens."""
        grids = tuple((s, s) if isinstance(s, int) else s for s in self.scales)
        return PictureShape(grids, self.seen_whole)


class SeenSettings(Settings):
    """Pictures that are looked at, and not predicted; `model.seen` is how they go in."""

    streams: Annotated[tuple[PictureStream, ...], Field(min_length=1)]
    """The sources; all of one size and as many channels."""
    cell: Positive
    """Pixels of a token's side: `model.seen.patch` times `model.seen.side`."""
    frames: Positive = 4
    """Frames of a video that share a token, as `model.seen.frames` has it."""


class SoundStream(Settings):
    """How sound becomes tokens, and where it comes from: wave files, cut into rows."""

    weight: Weight = 1.0
    """Its share of the slots."""
    paths: Annotated[tuple[Path, ...], Field(min_length=1)]
    """Wave files, or folders with some."""
    rate: Positive = 8000
    """Samples a second."""
    window: Annotated[int, Field(ge=4, multiple_of=2)] = 320
    """Samples of a short-time spectrum; the next begins half a window later."""
    stack: Positive = 4
    """Spectra of a frame; with the other defaults 12.5 frames a second."""
    levels: Positive = 4
    """Levels of the residual quantiser."""
    codes: Annotated[int, Field(ge=2)] = 64
    """Codes of each level."""
    before: str = ""
    """A text in front of each stretch; `{name}` is the file's name without its ending."""
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """The last part of each file, for validation."""


class Together(SourceSettings):
    """Rows of text, pictures and sound in fixed proportions."""

    sequence_length: Positive = 128
    """Positions of a row."""
    batch_changes: tuple[tuple[int, int], ...] = ()
    """(step, rows) from which on steps have another size than train.batch_size; those of single sources are not
    read."""
    text: TextStream
    """Rows of text."""
    pictures: Pictures | None = None
    """Rows of pictures and video."""
    seen: SeenSettings | None = None
    """Rows of pictures and video that are looked at."""
    sound: SoundStream | None = None
    """Rows of sound."""

    def build(self, context: SourceContext) -> TogetherSource | TogetherHeldOut:
        """The rows of one split; for validation those of one kind after another.

        Raises:
            DataError: rows that do not fit, or data that cannot be used.
        """
        if getattr(self.text.source, "batch_changes", ()):
            raise DataError(
                "source.text.source.batch_changes: the size of steps is that of all rows: set it in [source]"
            )
        text: Any = self.text.source.build(context)
        tokenizer = getattr(text, "tokenizer", None)
        if tokenizer is None:
            raise DataError("source.text: has no tokenizer; the text beside pictures and sound needs one")
        train = replace(context, split="train")
        pictures = self._picture_tokenizer(train) if self.pictures is not None else None
        codec, sounds = self._sounds(train)
        room = Room(
            self.sequence_length,
            0 if codec is None else codec.levels,
            None if pictures is None else (pictures.channels, *pictures.size),
        )
        picture_rows = [] if pictures is None else self._picture_rows(context, room, pictures, tokenizer)
        room = replace(room, pictures=max((rows.pictures_of_row for rows in picture_rows), default=0))
        seen_rows = self._seen_rows(context, room, tokenizer)
        if seen_rows:
            looks = max(rows.pictures_of_row for rows in seen_rows)
            room = replace(room, look=seen_rows[0].picture, looks=looks)
        for rows in (*picture_rows, *seen_rows):
            rows.room = room
        sources: list[Source] = [TextRows(text, room), *picture_rows, *seen_rows]
        weights = [self.text.weight]
        weights += [stream.weight for stream in self.pictures.streams] if self.pictures is not None else []
        weights += [stream.weight for stream in self.seen.streams] if self.seen is not None else []
        if self.sound is not None and codec is not None:
            sources.append(SoundRows(sounds, codec, room, tokenizer, context, self.sound.before, self.sound.held_out))
            weights.append(self.sound.weight)
        if context.split == "validation":
            return TogetherHeldOut(sources)
        if context.folder is not None:
            if pictures is not None:
                pictures.save(context.folder / PICTURE_FILE)
            if codec is not None:
                codec.save(context.folder / SOUND_FILE)
        sizes = BatchSizes(context.batch_size, self.batch_changes)
        return TogetherSource(sources, whole_weights(weights), sizes, pictures, codec)

    def _picture_tokenizer(self, context: SourceContext) -> ScaleTokenizer:
        assert self.pictures is not None
        each = -(-self.pictures.fitted_to // len(self.pictures.streams))
        found: list[Tensor] = []
        for stream in self.pictures.streams:
            source: Any = stream.source.build(context)
            inputs = source.read(range(min(each, sum(source.pool_parts))))["inputs"]
            found.append(inputs if inputs.ndim == 4 else inputs.transpose(1, 2).flatten(0, 1))
        shapes = {tuple(pixels.shape[1:]) for pixels in found}
        if len(shapes) > 1:
            raise DataError(f"source.pictures: its streams give pictures of different shapes: {sorted(shapes)}")
        return fit(torch.cat(found), self.pictures.shape, self.pictures.patch, self.pictures.bits)

    def _picture_rows(
        self, context: SourceContext, room: Room, pictures: ScaleTokenizer, tokenizer: Tokenizer
    ) -> list[PictureRows]:
        assert self.pictures is not None
        return [
            PictureRows(stream.source, Predicted(pictures), room, tokenizer, context, stream.before, stream.after)
            for stream in self.pictures.streams
        ]

    def _seen_rows(self, context: SourceContext, room: Room, tokenizer: Tokenizer) -> list[PictureRows]:
        if self.seen is None:
            return []
        kind = LookedAt(self.seen.cell, self.seen.frames)
        found = [
            PictureRows(stream.source, kind, room, tokenizer, context, stream.before, stream.after)
            for stream in self.seen.streams
        ]
        shapes = {rows.picture for rows in found}
        if len(shapes) > 1:
            raise DataError(f"source.seen: its streams give pictures of different shapes: {sorted(shapes)}")
        return found

    def _sounds(self, context: SourceContext) -> tuple[SoundCodec | None, list[tuple[str, Tensor]]]:
        """The codec, fitted to what is trained on, and all sounds by name."""
        sound = self.sound
        if sound is None:
            return None, []
        sounds = [(path.stem, read_wave(path, sound.rate)) for path in wave_files(sound.paths)]
        mine = [samples[: round(len(samples) * (1 - sound.held_out))] for _, samples in sounds]
        return fit_sound(mine, sound.rate, sound.window, sound.stack, sound.levels, sound.codes), sounds


class TogetherSource(MixSource):
    """See `Together`.

    Attributes:
        picture_tokenizer, sound_codec: how pictures and sound become tokens; None: there are none.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[int],
        sizes: BatchSizes,
        pictures: ScaleTokenizer | None,
        sound: SoundCodec | None,
    ) -> None:
        super().__init__(sources, weights, sizes.first)
        self.batch_sizes = sizes
        facts = [self._digest, sizes.changes, pictures and pictures.shape, sound and (sound.levels, sound.codes)]
        self._digest = hashlib.sha256(repr(facts).encode()).hexdigest()
        self.picture_tokenizer, self.sound_codec = pictures, sound


class TogetherHeldOut(ChainSource):
    """The held-out batches of all kinds by turns, so that the first few have some of each."""

    @cached_property
    def _turns(self) -> list[tuple[int, int]]:
        lengths = [len(source) for source in self.sources]  # type: ignore[arg-type]
        return [(s, step) for step in range(max(lengths)) for s in range(len(lengths)) if step < lengths[s]]

    def _at(self, step: int) -> tuple[Source, int]:
        if step >= len(self._turns):
            return self.sources[0], len(self.sources[0])  # type: ignore[arg-type]
        number, inner = self._turns[step]
        return self.sources[number], inner
