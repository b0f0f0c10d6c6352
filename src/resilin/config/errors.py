"""Messages for settings that cannot be used: the key, the value, what was expected, and a suggestion."""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from resilin.config.settings import closest


class UserError(ValueError):
    """Something a user can mend; its text is the whole message, and commands print it without a traceback."""


class SettingsError(UserError):
    """Settings that cannot be used."""


def _child(value: Any, key: str | int) -> Any:
    if isinstance(value, dict):
        return value.get(key)
    if isinstance(value, list) and isinstance(key, int) and key < len(value):
        return value[key]
    return None


def _line(item: ErrorDetails, data: Any) -> str:
    parts = item["loc"]
    context = item.get("ctx", {})
    if item["type"] == "unknown_key":
        path = ".".join(str(part) for part in (*parts, context["key"]))
        return f"{path}: unknown key {context['key']!r}; {context['hint']}"
    path = ".".join(str(part) for part in parts) or "settings"
    if item["type"] == "missing":
        return f"{path}: missing; set it in the file or as {path}=... on the command line"
    value = data
    for part in parts:
        value = _child(value, part)
    shown = "" if value is None or isinstance(value, dict | list) else f" = {json.dumps(value, default=str)}"
    message = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
    near = None
    if item["type"] in ("literal_error", "enum") and isinstance(value, str):
        options = [option.strip("'") for option in context["expected"].replace(" or ", ", ").split(", ")]
        near = closest(value, options)
    return f"{path}{shown}: {message}" + (f"; did you mean {near!r}?" if near else "")


def explain(error: ValidationError, data: Any, origin: str) -> SettingsError:
    """One readable message for everything wrong with `data`.

    Args:
        error: what validation raised.
        data: the raw settings, to show offending values.
        origin: where they came from ("run.toml", "the command line").
    """
    lines = list(dict.fromkeys(_line(item, data) for item in error.errors(include_url=False)))
    head = f"{origin}: {len(lines)} setting{'s' if len(lines) > 1 else ''} cannot be used"
    return SettingsError("\n  ".join([head, *lines]))
