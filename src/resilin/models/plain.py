"""The ordinary model that a method's model amounts to: adapters merged, masks applied, and nothing left of the method.

A method that changes modules gives them a `plain_form`; whoever exports, generates or scores asks for it here and
needs to know no method.
"""

from __future__ import annotations

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
    for name, module in reversed(list(model.named_modules())):
        if name and isinstance(module, HasPlainForm):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.plain_form())
    return model.plain_form() if isinstance(model, HasPlainForm) else model
