"""The selector that looks at nothing: what every other one has to beat."""

from __future__ import annotations

from torch import Tensor

from resilin.steer.draws import permutation
from resilin.steer.look import Look
from resilin.steer.selector import Selector


class Random(Selector):
    """Uniform, without replacement, drawn anew for each window."""

    def select(self, look: Look) -> Tensor:
        """The first of a random order."""
        return permutation(look.keys("random"), look.size)[: look.count]
