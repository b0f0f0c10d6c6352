"""k-means with keyed k-means++ starts (Arthur and Vassilvitskii, 2007).

Shapes: N points, C clusters, D size of a vector.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resilin.keys import Keys
from resilin.steer.draws import without_replacement


def k_means(points_ND: Tensor, clusters: int, keys: Keys, rounds: int = 25) -> Tensor:
    """The cluster of each point, (N,) int64 below `clusters`; at most N clusters are used.

    A cluster that loses all its points takes over the point farthest from its own centre.
    """
    points_ND = points_ND.double()
    clusters = min(clusters, len(points_ND))
    centres = [points_ND[keys.fold("first").integer(len(points_ND))]]
    nearest_N = (points_ND - centres[0]).square().sum(1)
    for number in range(1, clusters):
        weights_N = nearest_N if float(nearest_N.sum()) > 0 else torch.ones_like(nearest_N)
        chosen = int(without_replacement(keys.fold(number), weights_N, 1))
        centres.append(points_ND[chosen])
        nearest_N = torch.minimum(nearest_N, (points_ND - centres[-1]).square().sum(1))
    centre_CD = torch.stack(centres)
    assigned_N = torch.full((len(points_ND),), -1)
    for _ in range(rounds):
        distance_N, fresh_N = torch.cdist(points_ND, centre_CD).min(1)
        counts_C = torch.bincount(fresh_N, minlength=clusters)
        for empty in (counts_C == 0).nonzero()[:, 0].tolist():
            farthest = int(distance_N.argmax())
            fresh_N[farthest], distance_N[farthest] = empty, 0.0
        if torch.equal(fresh_N, assigned_N):
            break
        assigned_N = fresh_N
        counts_C = torch.bincount(assigned_N, minlength=clusters).clamp(min=1)
        sums_CD = torch.zeros_like(centre_CD).index_add_(0, assigned_N, points_ND)
        centre_CD = sums_CD / counts_C[:, None]
    return assigned_N
