"""What sources over numbered rows have in common: slots, an end, and a guard against resuming on other data."""

from __future__ import annotations

from resilin.data.errors import DataError
from resilin.data.order import SampleOrder
from resilin.nouns import State


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
