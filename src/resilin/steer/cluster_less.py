"""LESS by clusters: a few gradients stand for each cluster of similar samples (DataFlex, 2026, `cluster-LESS`)."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from resilin.config import component
from resilin.steer.draws import permutation, without_replacement
from resilin.steer.embed import Embedder
from resilin.steer.k_means import k_means
from resilin.steer.less import InfluenceSettings
from resilin.steer.look import Look
from resilin.steer.selector import Selection


class ClusterLESS(InfluenceSettings):
    """Scores clusters by the LESS scores of a few of their samples, then fills the window from the best ones.

    Within a cluster samples are drawn at random. With a `temperature` every cluster gets a chance, which keeps the
    variety that the top n of LESS lose.
    """

    clusters: Annotated[int, Field(ge=1)] = 64
    """How many clusters."""
    gradients: Annotated[int, Field(ge=1)] = 4
    """Gradients taken in each cluster."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0: the best clusters are taken whole, one after another; else samples are drawn by exp(score / temperature)."""
    embed: Annotated[Embedder, component("resilin.steer.embed:HiddenStates")] = Field(
        default_factory=dict, validate_default=True
    )
    """What makes samples comparable."""
    refresh: bool = False
    """Cluster anew at each selection; else the first selection's clusters are kept."""

    def select(self, look: Look) -> Selection:
        """By the score of each sample's cluster."""
        if self.refresh or "clusters" not in look.memory:
            points = self.embed.embed(look, look.pool)
            look.memory["clusters"] = k_means(points, self.clusters, look.keys("clusters"))
        cluster_N: Tensor = look.memory["clusters"]
        order = permutation(look.keys("cluster gradients"), look.size)
        count = int(cluster_N.max()) + 1
        asked = torch.cat([order[cluster_N[order] == number][: self.gradients] for number in range(count)])
        score_A = self.score(look, self.directions(look, asked), self.target_gradients(look))
        sums_C = torch.zeros(count).index_add_(0, cluster_N[asked], score_A)
        score_C = sums_C / torch.bincount(cluster_N[asked], minlength=count).clamp(min=1)
        figures = {"best cluster": float(score_C.max()), "worst cluster": float(score_C.min())}
        if self.temperature:
            weights_C = ((score_C - score_C.max()) / self.temperature).double().exp().clamp(min=1e-300)
            chosen = without_replacement(look.keys("cluster draw"), weights_C[cluster_N], look.count)
            return Selection(chosen, figures)
        ranked = order[torch.argsort(score_C[cluster_N[order]], descending=True, stable=True)]
        return Selection(ranked[: look.count], figures)
