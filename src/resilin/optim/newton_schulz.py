"""Approximate orthogonalisation of matrices by matrix products alone.

Shapes: K matrices of one shape, M rows, N columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The quintic x -> a x + b x^3 + c x^5 whose iteration takes singular values from (0, 1] to about [0.7, 1.2] fastest,
# not to 1 exactly (Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024).
QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalise(
    matrices_KMN: Tensor, steps: int = 5, dtype: torch.dtype = torch.float32, eps: float = 1e-7
) -> Tensor:
    """U S V^T -> U S' V^T with every S' near 1 (within about [0.7, 1.2]); zero matrices stay zero.

    Args:
        matrices_KMN: (K, M, N), each treated on its own.
        steps: iterations of the quintic.
        dtype: of the products; bfloat16 is enough where it is fast.
        eps: below which a matrix's norm counts as this much.

    Returns:
        (K, M, N) in `dtype`.
    """
    x = matrices_KMN.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:  # the Gram matrix on the shorter side is the smaller
        x = x.mT
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=eps)
    a, b, c = QUINTIC
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
