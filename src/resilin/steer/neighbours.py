"""Nearest neighbours by brute force, a few queries at a time.

Shapes: N candidates, M queries, K neighbours, D size of a vector.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 2**24
"""Distances that exist at once."""


def nearest(query_MD: Tensor, candidate_ND: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The nearest candidates of each query: distances (M, K), ascending, and candidate numbers (M, K) int64.

    K is `count`, or N where there are fewer candidates; of equally near ones the lower number comes first.
    """
    count = min(count, len(candidate_ND))
    rows = max(1, _CHUNK // max(1, len(candidate_ND)))
    distances, numbers = [], []
    for chunk in query_MD.split(rows):
        found = torch.cdist(chunk.double(), candidate_ND.double(), compute_mode="donot_use_mm_for_euclid_dist")
        ordered, places = torch.sort(found, dim=1, stable=True)
        distances.append(ordered[:, :count].float())
        numbers.append(places[:, :count])
    return torch.cat(distances), torch.cat(numbers)
