"""Random projection of gradients: scalar products kept, dimensions cut from millions to thousands.

The signs of a coordinate are a function of (seed, parameter name, coordinate), drawn a chunk at a time and thrown away,
so a projection takes the memory of one chunk, and samples projected today and tomorrow can be compared.

Source: Xia et al., "LESS", 2024, section 4.1 (Johnson-Lindenstrauss with Rademacher entries).
Shapes: B samples, P coordinates of a parameter, K dimensions kept, C coordinates of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resilin.keys import Keys

_CHUNK = 2**22
"""Signs that exist at once."""


def signs(seed: int, name: str, start: int, stop: int, dimensions: int, device: torch.device | str = "cpu") -> Tensor:
    """Rademacher signs of coordinates `start` to `stop` of a parameter: (stop - start, K) float32 of -1 and 1."""
    words = -(-dimensions // 32)
    slots_C = torch.arange(start, stop)
    bits_CW = Keys(seed, 0, slots_C, ("projection", name)).bits((words,), device)
    shifts = torch.arange(32, device=device)
    bits_CK = ((bits_CW[:, :, None] >> shifts) & 1).reshape(stop - start, words * 32)[:, :dimensions]
    return bits_CK.float().mul_(2).sub_(1)


class Projection:
    """x -> x R / sqrt(K) with R of random signs: E <x R, y R> / K = <x, y>, its error about |x||y| / sqrt(K).

    Args:
        dimensions: K; 0 keeps every coordinate.
        seed: of the signs.
    """

    def __init__(self, dimensions: int, seed: int) -> None:
        self.dimensions, self.seed = dimensions, seed

    def __call__(self, parts: dict[str, Tensor]) -> Tensor:
        """(B, K) float32 of the parts (B, ...) by name; without projection (B, all their coordinates)."""
        flat = {name: part.flatten(1).float() for name, part in parts.items()}
        if not self.dimensions:
            return torch.cat(list(flat.values()), dim=1)
        first = next(iter(flat.values()))
        projected_BK = torch.zeros(len(first), self.dimensions, device=first.device)
        rows = max(1, _CHUNK // self.dimensions)
        for name, x_BP in flat.items():
            for start in range(0, x_BP.shape[1], rows):
                stop = min(start + rows, x_BP.shape[1])
                signs_CK = signs(self.seed, name, start, stop, self.dimensions, x_BP.device)
                projected_BK.addmm_(x_BP[:, start:stop], signs_CK)
        return projected_BK.mul_(self.dimensions**-0.5)
