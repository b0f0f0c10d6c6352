"""Functions with a gradient of their own that `torch.func` can transform, without what that costs elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import Function


class PlainFunction(Function):
    """A `Function` with `setup_context`, whose `apply` is given every argument of `forward`, by position.

    To fill in defaults, torch looks up and binds the signature of `forward` at each call, which takes longer than a
    small product. Where nothing is transformed, this goes straight to autograd.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """What `forward` gives."""
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        return super(Function, cls).apply(*args)  # type: ignore[misc]
