"""The base class of all settings."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


def closest(word: str, words: Iterable[str]) -> str | None:
    """The likeliest intended word, or None where nothing is near."""
    found = difflib.get_close_matches(word, list(words), n=1, cutoff=0.55)
    return found[0] if found else None


class Settings(BaseModel):
    """A frozen group of settings; unknown keys are errors, and every default is itself checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_keys(cls, data: Any) -> Any:
        # pydantic's own message knows neither the other keys nor the nearest one.
        if isinstance(data, dict):
            unknown = [str(key) for key in data if key not in cls.model_fields]
            if unknown:
                key, near = unknown[0], closest(unknown[0], cls.model_fields)
                hint = (
                    f"did you mean {near!r}?" if near else f"known keys here: {', '.join(cls.model_fields) or 'none'}"
                )
                raise PydanticCustomError("unknown_key", "unknown key {key}; {hint}", {"key": key, "hint": hint})
        return data
