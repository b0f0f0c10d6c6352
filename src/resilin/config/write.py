"""Writing resolved settings back as TOML that reads to the same settings."""

from __future__ import annotations

import json
import math
from typing import Any

from resilin.config.settings import Settings


def _string(text: str) -> str:
    # JSON's escapes are TOML's, save that TOML knows no surrogate pairs and wants DEL escaped.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _key(name: str) -> str:
    return name if name and all((c.isalnum() and c.isascii()) or c in "-_" for c in name) else _string(name)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, list):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    if isinstance(value, dict):
        inner = ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items() if v is not None)
        return "{" + inner + "}"
    raise TypeError(f"{value!r} ({type(value).__name__}) has no TOML form")


def _tables(tree: dict[str, Any], path: tuple[str, ...]) -> list[str]:
    plain = [f"{_key(k)} = {_value(v)}" for k, v in tree.items() if v is not None and not isinstance(v, dict)]
    lines = []
    tables = {k: v for k, v in tree.items() if isinstance(v, dict)}
    if path and (plain or not tables):  # a table without keys is still there: it is not the same as none
        lines.append(f"\n[{'.'.join(_key(part) for part in path)}]")
    lines.extend(plain)
    for key, value in tables.items():
        lines.extend(_tables(value, (*path, key)))
    return lines


def tree_to_toml(tree: dict[str, Any]) -> str:
    """A settings tree as TOML; keys whose value is None are left out (None is every such key's default)."""
    return "\n".join(_tables(tree, ())).lstrip("\n") + "\n"


def settings_to_toml(settings: Settings) -> str:
    """Complete resolved settings as TOML: `load_settings` of the text gives equal settings."""
    return tree_to_toml(settings.model_dump(mode="json"))
