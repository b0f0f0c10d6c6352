"""Validation batches of several domains in turn, so that the first few batches are of all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from resilin.data.end_to_end import EndToEnd
from resilin.nouns import Batch, Source, State


class TurnSource(EndToEnd):
    """Batch by batch, the domain whose turn it is; one that has ended is passed over. Batches have `domains` (B,).

    Attributes:
        domain_names: in the order of `domains`.
    """

    def __init__(self, sources: Mapping[str, Source]) -> None:
        self.domain_names = tuple(sources)
        self.sources = list(sources.values())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "sources":
            raise AttributeError(name)
        return getattr(self.sources[0], name)

    @cached_property
    def _turns(self) -> list[tuple[int, int]]:
        """(domain, batch of that domain) of each batch."""
        lengths = [len(source) for source in self.sources]  # type: ignore[arg-type]
        return [(d, batch) for batch in range(max(lengths)) for d, length in enumerate(lengths) if batch < length]

    def __len__(self) -> int:
        return len(self._turns)

    def slots(self, step: int) -> int:
        """Slots of a batch; 0 after the last."""
        if step >= len(self._turns):
            return 0
        domain, batch = self._turns[step]
        return self.sources[domain].slots(batch)

    def fetch(self, step: int, slots: Sequence[int]) -> Batch:
        """The samples of these slots."""
        domain, inner = self._turns[step]
        batch = self.sources[domain].fetch(inner, slots)
        return Batch(batch.slots_B, {**batch.fields, "domains": torch.full((len(batch),), domain)})

    def state_dict(self) -> State:
        """The states of all domains."""
        return {"domains": [source.state_dict() for source in self.sources]}

    def load_state_dict(self, state: State) -> None:
        """Take them back."""
        for source, saved in zip(self.sources, state["domains"], strict=True):
            source.load_state_dict(saved)
