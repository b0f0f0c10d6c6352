"""A group of commands of which one is meant where none is named."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup


def with_default(name: str) -> type[TyperGroup]:
    """A class of groups that call the command of this name unless their first argument is another one's.

    Its help is the group's: `resilin plan --help` tells of `resilin plan run.toml`, and of the commands beside it.
    """

    class WithDefault(TyperGroup):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            if args and args[0] not in self.commands:
                args = [name, *args]
            return super().parse_args(ctx, args)

    return WithDefault
