"""Handing the chosen clocks to whoever sets them: a function that the user names. Nothing here touches a device."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from resilin.cluster.axes.clocks import Clocks
from resilin.cluster.axes.decide import Decision
from resilin.config import UserError

ClocksHook = Callable[[Sequence[Mapping[str, Any]]], object]
"""Is given, for each stage, `stage`, `members`, `clock` and `usual`."""


def clocks_hook(path: str) -> ClocksHook:
    """The function that `module:function` names.

    Raises:
        UserError: there is none.
    """
    module, _, name = path.partition(":")
    try:
        found: ClocksHook = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"clocks cannot be handed to {path!r} ({error}): name a function as module:function") from None
    if not callable(found):
        raise UserError(f"clocks cannot be handed to {path!r}, which is a {type(found).__name__}: name a function")
    return found


def chosen_clocks(decision: Decision, clocks: Clocks) -> list[dict[str, Any]]:
    """What a hook is given."""
    return [
        {"stage": stage, "members": list(members), "clock": float(clock), "usual": float(clocks.base)}
        for stage, (members, clock) in enumerate(zip(decision.pipeline.members, decision.clocks, strict=True))
    ]
