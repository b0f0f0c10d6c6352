"""Rotary positions in Hugging Face configs: `rope_parameters` (transformers 5), `rope_theta` + `rope_scaling` (4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import TypeAdapter, ValidationError

from resilin.config.errors import explain
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.rope_scaling import RopeScaling
from resilin.models.weight_files import ModelFolderError

_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
_ADAPTER: TypeAdapter[RopeScaling] = TypeAdapter(RopeScaling)


def _read_scaling(table: dict[str, Any], positions: int, original: int | None) -> RopeScaling | None:
    kind = table.pop("rope_type", table.pop("type", "default"))
    table.pop("type", None)
    if kind not in _KINDS:
        raise ModelFolderError(f"config.json: rope_type {kind!r} is not one of {', '.join(_KINDS)}")
    if table.pop("partial_rotary_factor", None) not in (None, 1.0):
        raise ModelFolderError("config.json: 'partial_rotary_factor' is set; this decoder rotates whole heads only")
    trained = table.pop("original_max_position_embeddings", None)
    if kind == "default":
        if table:
            raise ModelFolderError(f"config.json: {next(iter(table))!r} has no meaning for rope_type 'default'")
        return None
    settings: dict[str, Any] = {"kind": kind, **{key: value for key, value in table.items() if value is not None}}
    if kind in ("llama3", "yarn", "longrope"):
        settings["original_max_positions"] = original or trained or positions
    if kind == "yarn":
        settings.setdefault("factor", positions / settings["original_max_positions"])
        # null and 0 both stand for the usual values there
        settings = {key: value for key, value in settings.items() if value or key not in ("beta_fast", "beta_slow")}
    try:
        return _ADAPTER.validate_python(settings)
    except ValidationError as error:
        raise ModelFolderError(str(explain(error, settings, "config.json: rope parameters"))) from None


def read_rope(get: Callable[..., Any], positions: int) -> tuple[float, RopeScaling | None]:
    """The base and the scaling.

    Args:
        get: takes a key (and a default) out of the config.
        positions: `max_position_embeddings`.
    """
    theta = get("rope_theta")
    original = get("original_max_position_embeddings")
    table = dict(get("rope_parameters") or {})
    old = get("rope_scaling")
    if old and not table:
        table = dict(old)
    inner = table.pop("rope_theta", None)
    theta = inner if inner is not None else theta
    if any(isinstance(value, dict) for value in table.values()):
        raise ModelFolderError("config.json: 'rope_parameters' differ by kind of layer; one set for all is supported")
    return float(theta if theta is not None else 10000.0), _read_scaling(table, positions, original)


def write_rope(settings: DecoderSettings) -> dict[str, Any]:
    """The `rope_parameters` table of transformers 5."""
    table: dict[str, Any] = {"rope_type": "default", "rope_theta": settings.rope_theta}
    if settings.rope_scaling is None:
        return table
    for key, value in settings.rope_scaling.model_dump(mode="json").items():
        name = {"kind": "rope_type", "original_max_positions": "original_max_position_embeddings"}.get(key, key)
        if value is not None:
            table[name] = value
    return table
