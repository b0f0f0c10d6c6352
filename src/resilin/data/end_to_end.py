"""Several pools laid end to end as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from resilin.data.errors import DataError
from resilin.data.pool import check_samples, pool_of, pool_size
from resilin.nouns import Batch, Source
from resilin.transforms import read_for


def joined(parts: Sequence[tuple[NDArray[np.int64], Batch]], slots_B: NDArray[np.int64]) -> Batch:
    """One batch of several, whose samples go to the given places.

    Raises:
        DataError: the batches have different fields, or samples of different shapes.
    """
    names = {tuple(sorted(part.fields)) for _, part in parts}
    if len(names) > 1:
        raise DataError(f"the sources of a mix give different fields: {sorted(names)}; set them up alike")
    order = torch.from_numpy(np.argsort(np.concatenate([places for places, _ in parts]))) if parts else None
    fields = {}
    for name in parts[0][1].fields if parts else ():
        shapes = {tuple(part[name].shape[1:]) for _, part in parts}
        if len(shapes) > 1:
            raise DataError(
                f"the sources of a mix give {name!r} in different shapes: {sorted(shapes)}; set them up alike (shapes "
                "that follow a schedule: with one schedule, so the same epochs, stages and steps_per_epoch)"
            )
        fields[name] = torch.cat([part[name] for _, part in parts])[order]
    return Batch(torch.from_numpy(np.asarray(slots_B, np.int64)), fields)


class EndToEnd:
    """The samples of several sources by number, those of the first one first: see `resilin.data.pool.Pool`.

    Attributes:
        sources: the sources.
    """

    sources: list[Source]

    @property
    def pool_parts(self) -> tuple[int, ...]:
        """Samples of each source."""
        return tuple(pool_size(pool_of(source, "a mix read by number")) for source in self.sources)

    def read(self, samples: Sequence[int]) -> Batch:
        """Samples by number."""
        own = [pool_of(source, "a mix read by number").read for source in self.sources]
        return self._parts(samples, range(len(samples)), lambda source, _, numbers: own[source](numbers))

    def read_for(self, step: int, slots: Sequence[int], samples: Sequence[int]) -> Batch:
        """Samples by number, as the slots of a step: each as its own source shows it then."""
        return self._parts(
            samples, slots, lambda source, mine, numbers: read_for(self.sources[source], step, mine, numbers)
        )

    def _parts(
        self, samples: Sequence[int], slots: Sequence[int], read: Callable[[int, list[int], list[int]], Batch]
    ) -> Batch:
        edges = np.cumsum([0, *self.pool_parts])
        numbers, slots_B = check_samples(samples, int(edges[-1])), np.fromiter(slots, np.int64, len(slots))
        which = np.searchsorted(edges[1:], numbers, side="right")
        found = []
        for source in range(len(self.sources)):
            places = np.flatnonzero(which == source)
            if len(places):
                own = (numbers[places] - edges[source]).tolist()
                found.append((places, read(source, slots_B[places].tolist(), own)))
        return joined(found, slots_B)
