"""What is left out of compiled code: calls whose work a compiler cannot follow, in the middle of what it can.

Compiled code ends before such a call and begins anew behind it. Uncompiled, this costs a Python call; and importing
this file does not import torch's compiler, which takes a second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


outside: Callable[..., Any] = _call
"""`outside(function, *arguments)` is `function(*arguments)`, in compiled code too. Look it up in this module."""


def begin_compiling() -> None:
    """To be called before anything is compiled that calls `outside`; a second call changes nothing."""
    global outside
    if outside is _call:
        outside = torch.compiler.disable(_call)
