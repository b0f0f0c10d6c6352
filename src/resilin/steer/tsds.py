"""TSDS: optimal transport from the target's samples to the pool, with near-duplicates sharing their mass.

Source: Liu, Karbasi and Rekatsinas, "TSDS: Data selection for task-specific model finetuning", 2024, algorithm 1 (KNN
with kernel density estimation), as DataFlex has it.
Shapes: N candidates, M queries, K neighbours prefetched of each.
"""

from __future__ import annotations

import heapq
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from resilin.config import component
from resilin.steer.draws import permutation, without_replacement
from resilin.steer.embed import Embedder
from resilin.steer.look import Look
from resilin.steer.neighbours import nearest
from resilin.steer.selector import Selection, SelectionError, Selector


def density(points_UD: Tensor, neighbours: int, sigma: float) -> Tensor:
    """How crowded it is around each point, itself included: sum of max(0, 1 - d^2 / sigma^2), (U,); 1 for sigma 0."""
    if sigma == 0:
        return torch.ones(len(points_UD), dtype=torch.float64)
    distances_UK, _ = nearest(points_UD, points_UD, neighbours)
    return (1 - (distances_UK.double() / sigma) ** 2).clamp(min=0).sum(1)


def transport(
    distances_MK: Tensor, neighbours_MK: Tensor, density_MK: Tensor, size: int, *, alpha: float, C: float
) -> Tensor:
    """The probability of each of `size` candidates, (size,) float64 with sum 1.

    Every query spreads its mass 1/M over its nearest neighbours, a neighbour taking 1 / density; the queries add
    neighbours in the order of a heap, so that all have about equal counts, until the growth of the transport cost
    outweighs the gain in spread.

    Args:
        distances_MK: ascending in each row.
        neighbours_MK: numbers of the candidates.
        density_MK: of these candidates, above 0.
        size: N.
        alpha: in [0, 1]; the smaller, the more neighbours are used.
        C: scale of the cost, > 0.
    """
    D, kde = distances_MK.double().tolist(), density_MK.double().tolist()
    M, K = distances_MK.shape
    if K < 2:
        raise SelectionError(f"TSDS needs at least 2 neighbours of each target sample; there are {K}")
    heap = [(1 / kde[j][0], 0, j) for j in range(M)]
    heapq.heapify(heap)
    spent = [D[j][0] / kde[j][0] for j in range(M)]
    cost = [0.0] * M
    total = 0.0
    last = [0] * M
    s = 1.0
    while heap:
        count, k, j = heapq.heappop(heap)
        s = count
        new = D[j][k + 1] * count - spent[j]
        total += new - cost[j]
        cost[j] = new
        if alpha / C * total >= (1 - alpha) * M:
            break
        last[j] = k
        if k < K - 2:
            weight = 1 / kde[j][k + 1]
            heapq.heappush(heap, (count + weight, k + 1, j))
            spent[j] += D[j][k + 1] * weight
    probability = torch.zeros(size, dtype=torch.float64)
    numbers = neighbours_MK.tolist()
    for j in range(M):
        given = 0.0
        for k in range(last[j] + 1):
            mass = 1 / (M * s * kde[j][k])
            probability[numbers[j][k]] += mass
            given += mass
        if last[j] + 1 < K:
            probability[numbers[j][last[j] + 1]] += max(1 / M - given, 0.0)
    probability.clamp_(min=0)
    return probability / probability.sum()


class TSDS(Selector):
    """Draws, without replacement, from the transported distribution."""

    neighbours: Annotated[int, Field(ge=2)] = 5000
    """K: neighbours of each target sample that may get mass."""
    density_neighbours: Annotated[int, Field(ge=1)] = 1000
    """Neighbours that count for the density of a candidate."""
    sigma: Annotated[float, Field(ge=0)] = 0.75
    """Reach of the density's kernel; 0: duplicates are not told."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.6
    """Weight of closeness against diversity."""
    C: Annotated[float, Field(gt=0)] = 5.0
    """Scale of the transport cost."""
    embed: Annotated[Embedder, component("resilin.steer.embed:HiddenStates")] = Field(
        default_factory=dict, validate_default=True
    )
    """What makes samples comparable."""
    refresh: bool = False
    """Embed anew at each selection; else the first selection's distribution is kept."""
    fill: bool = False
    """Where fewer samples have a probability than are needed: add others at random, instead of an error."""

    def probabilities(self, candidate_ND: Tensor, query_MD: Tensor) -> Tensor:
        """The probability of each candidate, (N,) float64."""
        distances_MK, neighbours_MK = nearest(query_MD, candidate_ND, self.neighbours)
        union = torch.unique(neighbours_MK)
        crowd = torch.ones(len(candidate_ND), dtype=torch.float64)
        crowd[union] = density(candidate_ND[union], self.density_neighbours, self.sigma)
        return transport(
            distances_MK, neighbours_MK, crowd[neighbours_MK], len(candidate_ND), alpha=self.alpha, C=self.C
        )

    def select(self, look: Look) -> Selection:
        """A draw by keys.

        Raises:
            SelectionError: fewer samples than needed have a probability, and `fill` is not set.
        """
        if self.refresh or "probabilities" not in look.memory:
            candidates, queries = self.embed.embed(look, look.pool), self.embed.embed(look, look.target)
            look.memory["probabilities"] = self.probabilities(candidates, queries)
        probability_N = look.memory["probabilities"]
        possible = int((probability_N > 0).sum())
        figures = {"samples with a probability": float(possible)}
        if possible >= look.count:
            return Selection(without_replacement(look.keys("tsds"), probability_N, look.count), figures)
        if not self.fill:
            raise SelectionError(
                f"TSDS gives only {possible} samples a probability above 0; {look.count} are needed: lower "
                "selector.alpha, raise selector.neighbours, lower source.update_steps, or set selector.fill = true"
            )
        order = permutation(look.keys("tsds fill"), look.size)
        rest = order[probability_N[order] == 0][: look.count - possible]
        return Selection(torch.cat(((probability_N > 0).nonzero()[:, 0], rest)), figures)
