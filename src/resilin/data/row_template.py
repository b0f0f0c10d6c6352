"""Texts with a row's columns in braces: "Question: {question}\\nAnswer:" (a double brace is a brace)."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any

from resilin.data.errors import DataError


def columns_of(template: str) -> list[str]:
    """The columns a template asks for, in order.

    Raises:
        DataError: it is no template: a brace stands alone, or what stands in braces is no name.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise DataError(
            f"the template {template[:60]!r} cannot be read ({error}): write a brace itself as {{{{ or }}}}"
        ) from None
    names = [name for _, name, _, _ in parts if name is not None]
    for (_, name, form, conversion), shown in zip([p for p in parts if p[1] is not None], names, strict=True):
        if not shown.isidentifier() or form or conversion:
            raise DataError(
                f"the template {template[:60]!r} has {{{name}}}, which is no name of a column: write a brace itself "
                "as {{ or }}"
            )
    return names


def fill(template: str, row: Mapping[str, Any]) -> str:
    """The template with the row's columns in their places; numbers are written as Python writes them.

    Raises:
        DataError: it is no template, or asks for a column that the row has not or that is neither text nor number.
    """
    values = {}
    for name in columns_of(template):
        value = row.get(name)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            texts = [key for key, other in row.items() if isinstance(other, str)]
            raise DataError(
                f"the template asks for {{{name}}}, which is no column of text here; such columns: "
                f"{', '.join(map(repr, texts)) or 'none'}"
            )
        values[name] = value
    return template.format_map(values)
