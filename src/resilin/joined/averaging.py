"""Weight averaging ("model soup", Wortsman et al., 2022): a baseline of joining."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from resilin.joined.errors import JoinError
from resilin.models.decoder import Decoder


def shares_of(weights: Sequence[float] | Tensor | None, count: int) -> list[float]:
    """Weights that sum to 1; None: all alike.

    Raises:
        JoinError: they are not as many as wanted, or not such as can be made to sum to 1.
    """
    values = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if len(values) != count or count == 0:
        raise JoinError(f"{len(values)} weights for {count} models: give one for each")
    if min(values) < 0 or not 0 < sum(values) < float("inf"):
        raise JoinError(f"weights are {values}: they should be at least 0, and one of them above")
    return [value / sum(values) for value in values]


@torch.no_grad()
def average(models: Sequence[Decoder], weights: Sequence[float] | Tensor | None = None) -> Decoder:
    """A model whose parameters are the weighted means of others'.

    Args:
        models: of the same settings.
        weights: of the models; None: all alike. They are made to sum to 1.

    Raises:
        JoinError: the models differ in their sizes, or the weights are none.
    """
    shares = shares_of(weights, len(models))
    names = [{name: p.shape for name, p in model.named_parameters()} for model in models]
    if any(one != names[0] for one in names[1:]):
        raise JoinError("models of different sizes have no average: they should come from one anchor")
    first = models[0]
    found = Decoder(first.settings, seed=None, device="meta")
    found = found.to(first.embed.weight.dtype).to_empty(device=first.embed.weight.device)
    for name, parameter in found.named_parameters():
        mean = sum(share * one.get_parameter(name).double() for share, one in zip(shares, models, strict=True))
        assert isinstance(mean, Tensor)
        parameter.copy_(mean)
    return found.train(first.training)
