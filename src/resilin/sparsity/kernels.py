"""2:4 weights in the compressed form that GPUs multiply faster (torch's semi-structured tensors)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from resilin.models.decoder import Decoder
from resilin.sparsity.export import zeroed
from resilin.sparsity.linear import SparseLinear
from resilin.sparsity.masks import sparse_layers
from resilin.sparsity.settings import SparsityError

OLDEST = (8, 0)
"""The first compute capability with sparse tensor cores (Ampere)."""
DTYPES = (torch.float16, torch.bfloat16)
ROWS, COLUMNS = 32, 64
"""Multiples that a half-precision weight's outputs and inputs must be."""


def why_not(device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Why semi-structured kernels cannot run there; None where they can."""
    device = torch.device(device)
    if device.type != "cuda":
        return f"semi-structured kernels need an NVIDIA GPU; the device is {device.type}"
    if not torch.cuda.is_available():
        return "semi-structured kernels need an NVIDIA GPU, and torch sees none here"
    if torch.cuda.get_device_capability(device) < OLDEST:
        name = torch.cuda.get_device_name(device)
        return f"{name} has no sparse tensor cores: they came with compute capability {OLDEST[0]}.{OLDEST[1]} (Ampere)"
    if dtype not in DTYPES:
        return f"semi-structured kernels compute in float16 or bfloat16, not in {str(dtype).removeprefix('torch.')}"
    return None


def fits(layer: SparseLinear) -> str | None:
    """Why a layer's weight has no semi-structured form; None where it has one."""
    if layer.density is not None or (layer.n, layer.m) != (2, 4):
        pattern = f"{layer.n}:{layer.m}" if layer.density is None else "unstructured"
        return f"its pattern is {pattern}, and the kernels know 2:4 only"
    if layer.out_features % ROWS or layer.in_features % COLUMNS:
        return (
            f"its weight is {layer.out_features} x {layer.in_features}; outputs must be a multiple of {ROWS} and "
            f"inputs one of {COLUMNS}"
        )
    return None


def semi_structured(
    model: Decoder, *, device: torch.device | str = "cuda", dtype: torch.dtype = torch.float16, partly: bool = False
) -> Decoder:
    """A copy of a sparse model for inference, its 2:4 weights in torch's semi-structured form.

    A correction (SLoRB) stays beside its layer. The masks are those of the model: nothing is chosen anew.

    Args:
        model: a decoder with masks.
        device: a GPU with sparse tensor cores.
        dtype: float16 or bfloat16.
        partly: leave layers whose shape does not fit as they are, with zeros, instead of refusing.

    Raises:
        SparsityError: the device, the dtype, the pattern or a shape does not fit; the text says which.
    """
    reason = why_not(device, dtype)
    if reason is not None:
        raise SparsityError(reason)
    plain = zeroed(model).to(device=device, dtype=dtype).eval().requires_grad_(False)
    converted = 0
    for name, layer in sparse_layers(model):
        problem = fits(layer)
        linear = plain.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        if problem is None:
            compressed: Tensor = torch.sparse.to_sparse_semi_structured(linear.weight.detach().contiguous())
            linear.weight = nn.Parameter(compressed, requires_grad=False)
            converted += 1
        elif not partly:
            raise SparsityError(
                f"{name} has no semi-structured form: {problem}; partly=True leaves such layers as they are"
            )
        matrices = layer.correction_matrices()
        if matrices is not None:
            parent, _, last = name.rpartition(".")
            outward, pooling = (matrix.detach().to(device, dtype) for matrix in matrices)
            setattr(plain.get_submodule(parent), last, Corrected(linear, outward, pooling))
    if not converted:
        raise SparsityError("no layer of the model has a semi-structured form")
    return plain


class Corrected(nn.Module):
    """A layer and a low-rank correction: linear(x) + S (X x)."""

    def __init__(self, linear: nn.Module, outward_DG: Tensor, pooling_GC: Tensor) -> None:
        super().__init__()
        self.linear = linear
        self.register_buffer("outward", outward_DG)
        self.register_buffer("pooling", pooling_GC)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., D)."""
        y: Tensor = self.linear(x)
        return y + nn.functional.linear(nn.functional.linear(x, self.pooling), self.outward)  # type: ignore[arg-type]
