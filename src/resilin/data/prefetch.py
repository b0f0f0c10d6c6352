"""Fetching the next steps' batches while this one is computed."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Annotated, Any

from pydantic import Field

from resilin.config import component
from resilin.data.settings import SourceContext, SourceSettings
from resilin.nouns import Batch, Source, State


class Prefetch(SourceSettings):
    """A source whose next batches are fetched in a background thread; they are the same batches."""

    source: Annotated[SourceSettings, component("resilin.data.text_source:TextSource")]
    """The source behind."""
    ahead: Annotated[int, Field(ge=1)] = 2
    """Steps to fetch ahead."""
    pin_memory: bool = False
    """Put batches into page-locked memory, from which copies to a GPU run beside the computation."""

    def build(self, context: SourceContext) -> PrefetchSource:
        """The source behind, with a thread in front."""
        return PrefetchSource(self.source.build(context), self.ahead, self.pin_memory)


class PrefetchSource:
    """Answers from batches fetched ahead; any other request goes straight to the source behind.

    It expects each step to ask for its whole batch, where the step before did, or else for the slots that the step
    before asked for, in any number of parts: a worker's share of the batch. A guess that proves wrong costs time, never
    another batch.
    """

    def __init__(self, source: Source, ahead: int, pin_memory: bool = False) -> None:
        self.source = source
        self.ahead = ahead
        self.pin_memory = pin_memory
        # One thread: sources need not be safe for two fetches at once, and they come in the order of use.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="resilin-prefetch")
        self._waiting: dict[tuple[int, tuple[int, ...]], Future[Batch]] = {}

    def __getattr__(self, name: str) -> Any:
        # vocab_size, tokenizer, digest, sequence_length ...: whatever the source behind offers.
        if name.startswith("_") or name == "source":
            raise AttributeError(name)
        return getattr(self.source, name)

    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]

    def __bool__(self) -> bool:
        return True

    def slots(self, step: int) -> int:
        """Slots of a step, as the source behind says."""
        return self.source.slots(step)

    def _get(self, step: int, slots: tuple[int, ...]) -> Batch:
        batch = self.source.fetch(step, slots)
        if not self.pin_memory:
            return batch
        return Batch(batch.slots_B, {name: tensor.pin_memory() for name, tensor in batch.fields.items()})

    def fetch(self, step: int, slots: Sequence[int]) -> Batch:
        """The samples of these slots, exactly as the source behind gives them."""
        wanted = tuple(slots)
        # A resume or an evaluation asks for other steps: what was fetched for earlier ones is of no use.
        for key in [key for key in self._waiting if not step <= key[0] <= step + self.ahead]:
            self._waiting.pop(key).cancel()
        guessed = self._waiting.pop((step, wanted), None)
        future = guessed or self._pool.submit(self._get, step, wanted)
        highest = max(wanted, default=-1)
        whole = len(wanted) == self.source.slots(step)
        for later in range(step + 1, step + 1 + self.ahead):
            # Whoever takes a whole batch takes whole batches, whatever their sizes.
            guess = tuple(range(self.source.slots(later))) if whole else wanted
            if guess and (later, guess) not in self._waiting and (whole or highest < self.source.slots(later)):
                self._waiting[later, guess] = self._pool.submit(self._get, later, guess)
        if guessed is None or guessed.exception() is None:
            return future.result()
        # A guess may come before the source has decided what its step reads: ask again.
        return self._pool.submit(self._get, step, wanted).result()

    def state_dict(self) -> State:
        """The state of the source behind: what was fetched ahead is not part of it."""
        return self.source.state_dict()

    def load_state_dict(self, state: State) -> None:
        """Hand the state on, and forget what was fetched before."""
        for future in self._waiting.values():
            future.cancel()
        self._waiting.clear()
        self.source.load_state_dict(state)
