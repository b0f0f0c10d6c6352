"""The base class of all settings."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError


def closest(word: str, words: Iterable[str]) -> str | None:
    """The likeliest intended word, or None where nothing is near."""
    by_lower = {known.lower(): known for known in words}
    found = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.55)
    return by_lower[found[0]] if found else None


def _unknown_key(key: str, known: Iterable[str]) -> InitErrorDetails:
    near = closest(key, known)
    hint = f"did you mean {near!r}?" if near else f"known keys here: {', '.join(known) or 'none'}"
    kind = PydanticCustomError("unknown_key", "unknown key {key}; {hint}", {"key": key, "hint": hint})
    return InitErrorDetails(type=kind, loc=(), input=None)


def _again(item: ErrorDetails) -> InitErrorDetails:
    """An error that was already reported once, in the form in which it can be reported together with others."""
    context = {**item.get("ctx", {}), "message": item["msg"]}
    kind = PydanticCustomError(item["type"], "{message}", context)
    return InitErrorDetails(type=kind, loc=item["loc"], input=item["input"])


class Settings(BaseModel):
    """A frozen group of settings; unknown keys are errors, and every default is itself checked."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        use_attribute_docstrings=True,
        ser_json_inf_nan="constants",  # an infinite clip threshold inside a component was written as unset
    )

    @model_validator(mode="wrap")
    @classmethod
    def _name_unknown_keys(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        # pydantic's own message knows neither the other keys nor the nearest one; and a user wants to hear of
        # everything that is wrong at once, so the known keys are checked even beside unknown ones.
        known = cls.model_fields
        unknown = [str(key) for key in data if key not in known] if isinstance(data, dict) else []
        if not unknown:
            return handler(data)
        errors = [_unknown_key(key, known) for key in unknown]
        try:
            handler({key: value for key, value in data.items() if key in known})
        except ValidationError as error:
            errors.extend(_again(item) for item in error.errors(include_url=False))
        raise ValidationError.from_exception_data(cls.__name__, errors)
