"""The base of every selector: a new one is a small class with a `select` method, in anybody's own file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from resilin.config import Settings
from resilin.config.errors import UserError
from resilin.steer.draws import with_replacement
from resilin.steer.look import Look


class SelectionError(UserError):
    """A selection that cannot be trained on; the text says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Chosen samples, and figures about the choice for the log."""

    samples: Sequence[int] | Tensor
    metrics: dict[str, float] = field(default_factory=dict)


class Selector(Settings, ABC):
    """Chooses the samples of the next steps; `selector = { use = "module:Class" }` names a subclass."""

    def warm_up(self, look: Look) -> Sequence[int] | Tensor:
        """`look.count` samples for the steps before the first selection: drawn uniformly, with replacement."""
        return with_replacement(look.keys("warm up"), look.size, look.count)

    @abstractmethod
    def select(self, look: Look) -> Sequence[int] | Tensor | Selection:
        """Exactly `look.count` different numbers of samples of `look.pool`; their order does not matter."""


def checked(chosen: Sequence[int] | Tensor, size: int, count: int, who: str, *, repeats: bool = False) -> Tensor:
    """A selection as int64.

    Raises:
        SelectionError: too few or too many samples, numbers outside the pool, or the same sample twice.
    """
    numbers = chosen.detach().cpu().numpy() if isinstance(chosen, Tensor) else np.asarray(chosen)
    if numbers.ndim != 1 or (numbers.size and not np.issubdtype(numbers.dtype, np.integer)):
        raise SelectionError(
            f"{who} should give a list of whole numbers; it gave {numbers.dtype} of shape {numbers.shape}"
        )
    if len(numbers) != count:
        raise SelectionError(
            f"{who} gave {len(numbers)} samples; this window needs exactly {count} (the slots of all its steps)"
        )
    foreign = numbers[(numbers < 0) | (numbers >= size)]
    if len(foreign):
        raise SelectionError(f"{who} gave sample {int(foreign[0])}; the pool has samples 0 to {size - 1}")
    if not repeats:
        values, counts = np.unique(numbers, return_counts=True)
        if len(values) < count:
            worst = int(counts.argmax())
            raise SelectionError(
                f"{who} gave sample {int(values[worst])} {int(counts[worst])} times ({count - len(values)} repeats in "
                "all): each may be chosen once"
            )
    return torch.from_numpy(numbers.astype(np.int64))
