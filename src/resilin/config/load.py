"""Reading settings: a TOML file, presets inside it, and dotted overrides."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from resilin.config.errors import SettingsError, explain
from resilin.config.settings import Settings

S = TypeVar("S", bound=Settings)


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as a tree; errors name the file, and the line where TOML itself is broken."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"{path}: no such settings file") from None
    except IsADirectoryError:
        raise SettingsError(f"{path}: is a folder; a settings file was expected") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: not valid TOML: {error}") from None


def parse_value(text: str) -> Any:
    """A TOML value where `text` is one (numbers, true, "quoted", [lists], {tables}); otherwise the text itself."""
    try:
        tree = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return tree["value"] if len(tree) == 1 else text  # a text of several lines may read as further keys


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one `dotted.key=value` in a settings tree; `key=` with nothing after it removes the key."""
    key, separator, text = override.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not separator or not all(parts):
        raise SettingsError(f"{override!r}: an override has the form key.subkey=value, such as optimizer.lr=3e-4")
    node = tree
    for part in parts[:-1]:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise SettingsError(f"{override!r}: {part!r} is a single value here, it has no {parts[-1]!r} inside")
        node = child
    if text.strip():
        node[parts[-1]] = parse_value(text.strip())
    else:
        node.pop(parts[-1], None)


def merge(base: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `patch` laid over it, table by table; a table that names another `use` replaces the old one."""
    merged = dict(base)
    for key, value in patch.items():
        old = merged.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            other_class = "use" in value and value["use"] != old.get("use", value["use"])
            merged[key] = dict(value) if other_class else merge(old, value)
        else:
            merged[key] = value
    return merged


def parse_settings(cls: type[S], tree: Mapping[str, Any], origin: str) -> S:
    """Checked settings from a tree.

    Raises:
        SettingsError: naming every key that is wrong, its value, what was expected, and the nearest known key.
    """
    try:
        return cls.model_validate(dict(tree))
    except ValidationError as error:
        raise explain(error, tree, origin) from None


def load_settings(cls: type[S], path: Path | None, overrides: Sequence[str] = ()) -> S:
    """Settings of class `cls` from a TOML file (or only defaults) with overrides laid over it."""
    tree = read_toml(path) if path is not None else {}
    for override in overrides:
        apply_override(tree, override)
    return parse_settings(cls, tree, str(path) if path is not None else "command line")
