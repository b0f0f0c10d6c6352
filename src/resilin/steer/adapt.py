"""Weights by how close a sample is to anchors (DataFlex, 2026, weighter `adapt`).

Shapes: B samples, A anchors, D size of a vector.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from resilin.config import component
from resilin.data.mix import check_same_vocabulary
from resilin.data.pool import pool_of, pool_size
from resilin.data.settings import SourceContext, SourceSettings
from resilin.keys import Keys
from resilin.steer.draws import permutation
from resilin.steer.embed import EmbeddingError, HiddenStates, Pooling, pooled, real_positions
from resilin.steer.look import Look
from resilin.steer.subset import Subset
from resilin.steer.token_losses import hidden_states
from resilin.steer.weighter import StepLook, Weighter


def anchor_weights(sample_BD: Tensor, anchor_AD: Tensor, tau: float) -> Tensor:
    """sigmoid(mean over anchors of the cosine / tau), (B,)."""
    cosine_BA = normalize(sample_BD, dim=1) @ normalize(anchor_AD, dim=1).t()
    return torch.sigmoid(cosine_BA.mean(1) / tau)


class Adapt(Weighter):
    """Weights by the likeness of a sample's last hidden states to those of anchor samples.

    The original sums w * l over the batch: `reduce = "sum"`; with "mean" the learning rate means the same for every
    batch size.
    """

    anchors: Annotated[SourceSettings, component("resilin.data.text_source:TextSource")]
    """The anchor samples (its training split)."""
    count: Annotated[int, Field(ge=1)] = 64
    """How many of them, drawn once."""
    tau: Annotated[float, Field(gt=0)] = 1.0
    """Temperature: towards infinity all weights are 1/2."""
    refresh_steps: Annotated[int, Field(ge=1)] = 50
    """Steps between embeddings of the anchors."""
    pooling: Pooling = "position"
    """How positions become one vector."""

    def weights(self, look: StepLook) -> Tensor:
        """Of the batch, by the model as it is now; anchors are as old as `refresh_steps` allows.

        Raises:
            EmbeddingError: the model gives no hidden states.
        """
        step = look.view.step
        if "anchors" not in look.memory or step // self.refresh_steps != look.memory["step"] // self.refresh_steps:
            look.memory["anchors"], look.memory["step"] = self._embed_anchors(look), step
        rows = []
        for batch, output in look.outputs():
            hidden_BTD = hidden_states(output)
            if hidden_BTD is None:
                raise EmbeddingError("weighter Adapt reads hidden states, and the model gives logits only")
            rows.append(pooled(hidden_BTD, real_positions(batch), self.pooling).cpu())
        return anchor_weights(torch.cat(rows), look.memory["anchors"], self.tau)

    def _embed_anchors(self, look: StepLook) -> Tensor:
        if "pool" not in look.cache:
            source = self.anchors.build(SourceContext(look.seed, "train", look.chunk))
            check_same_vocabulary([look.view.source, source])
            pool = pool_of(source, "anchors")
            size = pool_size(pool)
            keys = Keys.of_step(look.seed, 0).fold("steer").fold("anchors")
            few = permutation(keys, size)[: self.count].numpy()
            look.cache["pool"] = Subset(pool, few)
        pool = look.cache["pool"]
        seen = Look(
            view=look.view, pool=pool, find_target=lambda: pool, count=0, update=0, updates=None, seed=look.seed,
            batch_size=look.chunk,
        )  # fmt: skip
        return HiddenStates(pooling=self.pooling).embed(seen, pool)
