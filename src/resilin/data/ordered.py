"""What sources over numbered rows have in common: slots, an end, and a guard against resuming on other data."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from resilin.data.errors import DataError
from resilin.data.order import SampleOrder
from resilin.data.tokenizer import Tokenizer
from resilin.nouns import Batch, State


class OrderedSource:
    """Rows in the order of a `SampleOrder`; a subclass says what a row holds.

    Attributes:
        order: which row each slot reads.
        digest: changes with anything that changes what a slot reads, except seed and batch size.
    """

    def __init__(self, order: SampleOrder, digest: str) -> None:
        self.order = order
        self.digest = digest

    def __len__(self) -> int:
        """Batches before the source ends; of the validation split, of the whole split."""
        if self.order.total is None:
            raise TypeError("a source without `epochs` never ends and has no length")
        low, high = 0, self.order.total
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.order.slots(middle) == 0 else (middle + 1, high)
        return low

    def __bool__(self) -> bool:
        return True  # a source without end has no length to be true by

    def slots(self, step: int) -> int:
        """Slots of a step; 0 after the end."""
        return self.order.slots(step)

    def state_dict(self) -> State:
        """Nothing to continue from but the step; what is here only guards against resuming on other data."""
        sizes = self.order.batch_sizes
        return {
            "digest": self.digest,
            "seed": self.order.seed,
            "batch_size": sizes.first,
            "batch_changes": [list(change) for change in sizes.changes],
        }

    def load_state_dict(self, state: State) -> None:
        """Refuse the state of other data, another seed or another batch size: slots would read other samples."""
        mine = self.state_dict()
        if state.get("digest") != mine["digest"]:
            raise DataError(
                f"the checkpoint was made on other data or another packing (digest {str(state.get('digest'))[:12]}, "
                f"here {self.digest[:12]}): resume with the source settings of its settings.toml"
            )
        for key in ("seed", "batch_size"):
            if state.get(key) != mine[key]:
                hint = "; to change it from a step on, set source.batch_changes" if key == "batch_size" else ""
                raise DataError(f"the checkpoint's {key} was {state.get(key)!r}, now it is {mine[key]!r}{hint}")


class TableBatches(OrderedSource, ABC):
    """Batches of rows of a table that holds both splits; a subclass says what a batch of some rows is.

    Args:
        mine: the rows of this split, by their number in the table.
        order: which of them each slot reads.
        tokenizer: gave the table's ids.
        width: positions of every row; None: as many as the longest fetched one has.
        fixed: what decides what a slot reads, except seed and batch size.
        dropped: rows that were left out of the table, by reason.

    Attributes:
        mine: as given.
        tokenizer: as given.
        dropped: as given.
        vocab_size: every id is below it.
    """

    def __init__(
        self,
        mine: NDArray[np.int64],
        order: SampleOrder,
        tokenizer: Tokenizer,
        width: int | None,
        fixed: Mapping[str, object],
        dropped: Mapping[str, int],
    ) -> None:
        super().__init__(order, hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest())
        self.mine = mine
        self.tokenizer = tokenizer
        self.vocab_size = tokenizer.vocab_size
        self.dropped = dict(dropped)
        self._width = width
        self._pad = tokenizer.pad_id if tokenizer.pad_id is not None else tokenizer.eos_id or 0

    @abstractmethod
    def batch(self, rows: Sequence[int], slots: Sequence[int] | None = None) -> Batch:
        """Some rows of the table as a batch; `slots` numbers them, else 0, 1, ..."""

    def fetch(self, step: int, slots: Sequence[int]) -> Batch:
        """The rows of these slots."""
        return self.batch(self.mine[self.order.row_of(step, slots)].tolist(), slots)

    @property
    def pool_parts(self) -> tuple[int, ...]:
        """The rows of this split, as a pool (see `resilin.data.pool.Pool`)."""
        return (len(self.mine),)

    def read(self, samples: Sequence[int]) -> Batch:
        """Rows of this split by their number in it."""
        return self.batch(self.mine[np.asarray(samples, np.int64)].tolist())
