"""The model that a method's model was made of: adapters off, masks away, as a teacher or reference wants it.

A method that changes modules and keeps what was there gives them an `original_form`; whoever needs the model as it was
asks for it here and needs to know no method.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import nn

from resilin.models.plain import replace_modules


@runtime_checkable
class HasOriginalForm(Protocol):
    """A module in the place of another one, which it still knows."""

    def original_form(self) -> nn.Module:
        """That module; it may share parameters with this one."""


def make_original(model: nn.Module) -> nn.Module:
    """Put every module's original form in its place, the innermost first.

    Args:
        model: changed in place; nothing to be trained further.

    Returns:
        The model, or its own original form.
    """
    return replace_modules(
        model, lambda module: module.original_form() if isinstance(module, HasOriginalForm) else None
    )
