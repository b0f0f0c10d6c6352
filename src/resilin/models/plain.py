"""The ordinary model that a method's model amounts to: adapters merged, masks applied, and nothing left of the method.

A method that changes modules gives them a `plain_form`; whoever exports, generates or scores asks for it here and
needs to know no method.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import nn


@runtime_checkable
class HasPlainForm(Protocol):
    """A module that computes what an ordinary one computes."""

    def plain_form(self) -> nn.Module:
        """That module, of its present weights; it may be this one, changed, or one made of its parameters."""


def make_plain(model: nn.Module) -> nn.Module:
    """Put every module's plain form in its place, the innermost first.

    Args:
        model: changed in place; nothing to be trained further.

    Returns:
        The model, or its own plain form.
    """
    return replace_modules(model, lambda module: module.plain_form() if isinstance(module, HasPlainForm) else None)


def replace_modules(model: nn.Module, form: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """Put another module in the place of each that has one, the innermost first.

    Args:
        model: changed in place.
        form: what stands for a module; None: itself.

    Returns:
        The model, or what stands for it.
    """
    for name, module in reversed(list(model.named_modules())):
        other = form(module) if name else None
        if other is not None:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, other)
    return form(model) or model
