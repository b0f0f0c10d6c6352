"""NEAR: the samples nearest to the target's, in turns of the queries (DataFlex, 2026, offline selector)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from resilin.config import component
from resilin.steer.embed import Embedder
from resilin.steer.look import Look
from resilin.steer.neighbours import nearest
from resilin.steer.selector import SelectionError, Selector


def by_columns(neighbours_MK: Tensor, count: int) -> list[int]:
    """The first `count` different numbers, all first neighbours before all second ones.

    Raises:
        SelectionError: there are not so many.
    """
    chosen = dict.fromkeys(neighbours_MK.t().flatten().tolist())
    if len(chosen) < count:
        M, K = neighbours_MK.shape
        raise SelectionError(
            f"NEAR: {K} neighbours of {M} queries are only {len(chosen)} different samples; {count} are needed: raise "
            "selector.neighbours, name more target samples, or lower source.update_steps"
        )
    return list(chosen)[:count]


class NEAR(Selector):
    """The nearest samples of each target sample, first neighbours first."""

    neighbours: Annotated[int, Field(ge=1)] = 1000
    """K: neighbours looked at of each target sample."""
    embed: Annotated[Embedder, component("resilin.steer.embed:HiddenStates")] = Field(
        default_factory=dict, validate_default=True
    )
    """What makes samples comparable."""
    refresh: bool = False
    """Embed anew at each selection; else the first selection's order is kept."""

    def select(self, look: Look) -> list[int]:
        """The walk down the columns."""
        if self.refresh or "neighbours" not in look.memory:
            candidates, queries = self.embed.embed(look, look.pool), self.embed.embed(look, look.target)
            look.memory["neighbours"] = nearest(queries, candidates, self.neighbours)[1]
        return by_columns(look.memory["neighbours"], look.count)
