"""Mixing by the load of experts: domains that use a mixture of experts differently from the others are drawn more.

Source: Zhu et al., "Dynamic data mixing maximizes instruction tuning for mixture-of-experts", 2024.
Shapes: k domains, B samples, T tokens, E experts, L layers with experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from resilin.steer.draws import with_replacement
from resilin.steer.embed import real_positions
from resilin.steer.mixer import Mixer, MixError, MixLook


def distances(load_kX: Tensor) -> Tensor:
    """The mean distance of each domain's load from those of all domains, (k,)."""
    return torch.cdist(load_kX, load_kX).mean(1)


class ExpertLoad(Mixer):
    """log p <- log p + eta * distance, softmax, then (1 - c) p + c / k."""

    eta: Annotated[float, Field(gt=0)] = 10.0
    """How far a step goes."""
    c: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share that is spread evenly."""
    samples: Annotated[int, Field(ge=1)] = 64
    """Samples of each domain that are sent through the model."""

    def mix(self, look: MixLook) -> Sequence[float]:
        """By the load of a few samples of each domain.

        Raises:
            MixError: the model has no experts.
        """
        loads, base = [], 0
        for number, size in enumerate(look.pool.pool_parts):
            drawn = base + with_replacement(look.keys("load").fold(number), size, self.samples)
            loads.append(self._load(look, drawn.tolist()))
            base += size
        return self.proportions(torch.stack(loads), look.current)

    def proportions(self, load_kX: Tensor, current: Sequence[float]) -> list[float]:
        """The next proportions from the domains' loads (each layer's load sums to 1)."""
        moved = torch.tensor(current, dtype=torch.float64).log() + self.eta * distances(load_kX.double())
        k = len(current)
        found: list[float] = ((1 - self.c) * moved.softmax(0) + self.c / k).tolist()
        return found

    def _load(self, look: MixLook, samples: list[int]) -> Tensor:
        """The share of each expert in the choices of each layer, (L * E,)."""
        counts: Tensor | None = None
        chosen = _experts_per_token(look.model)
        for batch, output in look.outputs(look.pool, samples):
            routers = getattr(output, "router_logits", ())
            if not routers:
                raise MixError("mixer ExpertLoad reads routers, and the model has no experts: set model.moe")
            real_BT = real_positions(batch)
            logits_LNE = torch.stack([logits_BTE[real_BT] for logits_BTE in routers])
            picks_LNE = torch.zeros_like(logits_LNE).scatter_(-1, logits_LNE.topk(chosen, -1).indices, 1.0)
            found = picks_LNE.sum(1).double().cpu()
            counts = found if counts is None else counts + found
        assert counts is not None
        return (counts / counts.sum(1, keepdim=True)).flatten()


def _experts_per_token(model: Any) -> int:
    moe = getattr(getattr(model, "settings", None), "moe", None)
    return 1 if moe is None else int(moe.experts_per_token)
