"""Options that several commands share, declared once: a dataclass whose fields are the options."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from functools import wraps
from typing import Any, get_type_hints


def with_option_groups(command: Callable[..., None]) -> Callable[..., None]:
    """The command as Typer should see it: each parameter that is a dataclass gives way to the dataclass's fields.

    The fields are annotated and have defaults as the command's own parameters do; the command is then called with the
    dataclass made of them.

        @dataclass(frozen=True)
        class Where:
            folder: Annotated[Path | None, typer.Option(help="Where it goes.")] = None

        @with_option_groups
        def train(settings: Path, where: Where) -> None: ...      # resilin train SETTINGS --folder ...
    """
    hints = get_type_hints(command, include_extras=True)
    shown: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}

    def show(name: str, annotation: Any, default: Any) -> None:
        # By keyword, as Typer calls: so an option without a default may follow one with it.
        shown.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation))

    for name, parameter in inspect.signature(command).parameters.items():
        kind = hints[name]
        if not (isinstance(kind, type) and is_dataclass(kind)):
            show(name, kind, parameter.default)
            continue
        groups[name] = kind
        inner = get_type_hints(kind, include_extras=True)
        for field in fields(kind):
            show(field.name, inner[field.name], inspect.Parameter.empty if field.default is MISSING else field.default)
    names = [parameter.name for parameter in shown]
    if len(set(names)) < len(names):
        raise TypeError(f"{command.__name__}: two parameters or groups have an option of one name: {names}")

    @wraps(command)
    def run(**given: Any) -> None:
        made = {name: kind(**{f.name: given.pop(f.name) for f in fields(kind)}) for name, kind in groups.items()}
        command(**given, **made)

    run.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
    return run
