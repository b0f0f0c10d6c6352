"""Public documents that look like an owner's: what the router of a joined model may be tuned on (FlexOlmo).

A classifier tells the owner's documents from public ones, by their vectors; the public ones that it takes for the
owner's are its proxies. It runs at the owner's, and only public documents leave.

Shapes: N documents, D dimensions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from resilin.joined.errors import JoinError


def classifier(own_ND: Tensor, public_ND: Tensor, decay: float = 1e-3) -> tuple[Tensor, Tensor]:
    """A logistic regression: weights (D,) and bias () of the logit that a document is the owner's.

    Both sides count alike, however many documents they have.

    Args:
        own_ND: vectors of the owner's documents.
        public_ND: of public ones.
        decay: of the weights.

    Raises:
        JoinError: one side has no documents.
    """
    if not len(own_ND) or not len(public_ND):
        raise JoinError(f"{len(own_ND)} documents of the owner, {len(public_ND)} public ones: both are needed")
    x_ND = torch.cat([own_ND, public_ND]).double()
    labels_N = torch.cat([torch.ones(len(own_ND)), torch.zeros(len(public_ND))]).double()
    counts_N = torch.cat([torch.full((len(one),), 0.5 / len(one)) for one in (own_ND, public_ND)]).double()
    mean_D, spread_D = x_ND.mean(0), x_ND.std(0).clamp(min=1e-6)
    x_ND = (x_ND - mean_D) / spread_D
    weight_D = torch.zeros(x_ND.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight_D, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        each_N = F.binary_cross_entropy_with_logits(x_ND @ weight_D + bias, labels_N, reduction="none")
        total = (each_N * counts_N).sum() + decay * weight_D.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    found_D = (weight_D / spread_D).detach()
    return found_D, (bias - (found_D * mean_D).sum()).detach()


def proxies(own_ND: Tensor, public_ND: Tensor, count: int) -> list[int]:
    """The numbers of the public documents that look most like the owner's, the likest first.

    Args:
        own_ND: vectors of the owner's documents.
        public_ND: of public ones.
        count: how many, at most as many as there are.

    Raises:
        JoinError: one side has no documents.
    """
    weight_D, bias = classifier(own_ND, public_ND)
    scores_N = public_ND.double() @ weight_D + bias
    return scores_N.topk(min(count, len(public_ND))).indices.tolist()
