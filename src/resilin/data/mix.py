"""Several sources in fixed proportions, decided slot by slot."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property
from itertools import accumulate
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from resilin.config import component
from resilin.data.end_to_end import EndToEnd, joined
from resilin.data.errors import DataError
from resilin.data.order import BatchSizes
from resilin.data.settings import SourceContext, SourceSettings
from resilin.nouns import Batch, Source, State

_LARGEST_CYCLE = 2**16


def whole_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """Weights as whole numbers in the same proportions (to 1 in 65,536), the smallest such numbers.

    Raises:
        ValueError: for weights that are not positive, or so uneven that one would vanish.
    """
    if not weights or any(not 0 < weight < float("inf") for weight in weights):
        raise ValueError(f"weights should be positive numbers, not {list(weights)}")
    total = sum(Fraction(str(weight)) for weight in weights)
    shares = [Fraction(str(weight)) / total for weight in weights]
    denominator = int(np.lcm.reduce([share.denominator for share in shares], dtype=object))
    if denominator <= _LARGEST_CYCLE:
        return tuple(int(share * denominator) for share in shares)
    whole = [round(share * _LARGEST_CYCLE) for share in shares]
    whole[whole.index(max(whole))] += _LARGEST_CYCLE - sum(whole)
    if min(whole) < 1:
        raise ValueError(f"the smallest of the weights {list(weights)} is below 1 in {_LARGEST_CYCLE} of their sum")
    return tuple(whole)


class Cycle:
    """An endless, even sequence of choices in whole proportions.

    Each choice goes to the source that is furthest behind its share, so after any number of choices every source is
    within one of its exact share (for two sources), and after each cycle exactly on it.

    Attributes:
        weights: how often each source occurs in a cycle.
    """

    def __init__(self, weights: Sequence[int]) -> None:
        self.weights = tuple(weights)
        size = sum(weights)
        shares, credit = np.asarray(weights, np.int64), np.zeros(len(weights), np.int64)
        choices = np.empty(size, np.int64)
        ranks = np.empty(size, np.int64)
        given = np.zeros(len(weights), np.int64)
        for place in range(size):
            credit += shares
            best = int(np.argmax(credit))
            credit[best] -= size
            choices[place], ranks[place] = best, given[best]
            given[best] += 1
        self._choices, self._ranks = choices, ranks

    def at(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For each number in the sequence: the source chosen, and how often it was chosen before."""
        cycles, places = np.divmod(numbers, len(self._choices))
        chosen = self._choices[places]
        return chosen, cycles * np.asarray(self.weights)[chosen] + self._ranks[places]


class MixPart(SourceSettings):
    """One source of a mix."""

    weight: Annotated[float, Field(gt=0)] = 1.0
    """Its share, relative to the others."""
    source: Annotated[SourceSettings, component("resilin.data.text_source:TextSource")]
    """The source."""


class Mix(SourceSettings):
    """Samples of several sources in fixed proportions."""

    parts: Annotated[tuple[MixPart, ...], Field(min_length=1)]
    """The sources and their weights."""

    @model_validator(mode="after")
    def _weights_can_be_met(self) -> Mix:
        whole_weights([part.weight for part in self.parts])
        return self

    def build(self, context: SourceContext) -> Source:
        """For training the mix; for validation the parts' batches one part after another."""
        sources = [part.source.build(context) for part in self.parts]
        check_same_vocabulary(sources)
        if context.split == "validation":
            return ChainSource(sources)
        return MixSource(sources, whole_weights([part.weight for part in self.parts]), context.batch_size)


def check_same_vocabulary(sources: Sequence[object]) -> None:
    """Refuse sources that are read together and mean different texts by the same ids.

    Raises:
        DataError: their tokenizers or vocabularies differ.
    """
    digests = {tokenizer.digest for source in sources if (tokenizer := getattr(source, "tokenizer", None)) is not None}
    sizes = {size for source in sources if (size := getattr(source, "vocab_size", None)) is not None}
    if len(digests) > 1 or len(sizes) > 1:
        raise DataError(
            f"sources that are used together have different tokenizers (vocabularies of {sorted(sizes)}): their token "
            "ids mean different texts; set tokenizer.path of each to one tokenizer"
        )


def _joined_digest(sources: Sequence[Source], *more: object) -> str:
    parts = [str(getattr(source, "digest", "")) for source in sources] + [repr(item) for item in more]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class MixSource(EndToEnd):
    """The mix: slot by slot, its samples come from the source whose turn it is."""

    def __init__(self, sources: Sequence[Source], weights: Sequence[int], batch_size: int) -> None:
        self.sources = list(sources)
        self.cycle = Cycle(weights)
        self.batch_sizes = BatchSizes(batch_size)
        self._digest = _joined_digest(sources, tuple(weights))

    def __getattr__(self, name: str) -> Any:
        # vocab_size, tokenizer, sequence_length: all sources have the same.
        if name.startswith("_") or name == "sources":
            raise AttributeError(name)
        return getattr(self.sources[0], name)

    @property
    def digest(self) -> str:
        """Changes with the data of any source and with the weights."""
        return self._digest

    def slots(self, step: int) -> int:
        """Slots of a step; 0 from the step on for which a source has no samples left."""
        size = self.batch_sizes.at(step)
        chosen, counts = self.cycle.at(self.batch_sizes.before(step) + np.arange(size))
        for number, source in enumerate(self.sources):
            mine = counts[chosen == number]
            if len(mine) and not self._has(source, int(mine[-1])):
                return 0
        return size

    def _has(self, source: Source, sample: int) -> bool:
        # Each source has `first` slots a step, so its n-th sample is slot n % first of step n // first.
        step, slot = divmod(sample, self.batch_sizes.first)
        return slot < source.slots(step)

    def fetch(self, step: int, slots: Sequence[int]) -> Batch:
        """The samples of these slots."""
        slots_B = np.asarray(slots, np.int64)
        chosen_B, counts_B = self.cycle.at(self.batch_sizes.before(step) + slots_B)
        places, parts = [], []
        for number, source in enumerate(self.sources):
            steps_B, inner_B = np.divmod(counts_B, self.batch_sizes.first)
            for inner_step in np.unique(steps_B[chosen_B == number]).tolist():
                mine = np.flatnonzero((chosen_B == number) & (steps_B == inner_step))
                places.append(mine)
                parts.append(source.fetch(inner_step, inner_B[mine].tolist()))
        return joined(list(zip(places, parts, strict=True)), slots_B)

    @property
    def epoch_length(self) -> int:
        """Samples of all sources."""
        return sum(self.pool_parts)

    def resampled(self, grid: Any) -> MixSource:
        """The same samples in the same slots, in another shape.

        Raises:
            DataError: a source has one shape only.
        """
        for source in self.sources:
            if not hasattr(source, "resampled"):
                raise DataError(f"a mix in several shapes: {type(source).__name__} can be shown in one shape only")
        other = copy.copy(self)
        other.sources = [source.resampled(grid) for source in self.sources]  # type: ignore[attr-defined]
        return other

    def state_dict(self) -> State:
        """The states of all sources."""
        return {"digest": self.digest, "sources": [source.state_dict() for source in self.sources]}

    def load_state_dict(self, state: State) -> None:
        """Take them back, into the same mix."""
        if state.get("digest") != self.digest:
            raise DataError("the checkpoint was made on another mix (other data or weights): resume with its own")
        for source, saved in zip(self.sources, state["sources"], strict=True):
            source.load_state_dict(saved)


class ChainSource(EndToEnd):
    """The validation batches of several sources, one source after another."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = list(sources)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "sources":
            raise AttributeError(name)
        return getattr(self.sources[0], name)

    @cached_property
    def _firsts(self) -> list[int]:
        return [0, *accumulate(len(source) for source in self.sources)]  # type: ignore[arg-type]

    @property
    def digest(self) -> str:
        """Changes with the data of any source."""
        return _joined_digest(self.sources)

    def __len__(self) -> int:
        return self._firsts[-1]

    def _at(self, step: int) -> tuple[Source, int]:
        number = min(int(np.searchsorted(self._firsts, step, side="right")) - 1, len(self.sources) - 1)
        return self.sources[number], step - self._firsts[number]

    def slots(self, step: int) -> int:
        """Slots of the step-th batch; 0 after the last."""
        source, inner = self._at(step)
        return source.slots(inner)

    def fetch(self, step: int, slots: Sequence[int]) -> Batch:
        """The samples of these slots."""
        source, inner = self._at(step)
        return source.fetch(inner, slots)

    def state_dict(self) -> State:
        """The states of all sources."""
        return {"sources": [source.state_dict() for source in self.sources]}

    def load_state_dict(self, state: State) -> None:
        """Take them back."""
        for source, saved in zip(self.sources, state["sources"], strict=True):
            source.load_state_dict(saved)
