"""Models by name, for planning without settings of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from resilin.config import Settings, UserError
from resilin.config.load import read_toml
from resilin.config.settings import closest
from resilin.models.decoder_settings import DecoderSettings

SHAPES = Path(__file__).with_name("shapes.toml")


class Shape(Settings):
    """A published model and the size of its steps."""

    source: str
    """Where it is described."""
    tokens: Annotated[int, Field(gt=0)]
    """Of a row."""
    batch_tokens: Annotated[int, Field(gt=0)]
    """Of a step."""
    model: DecoderSettings


class _One(Settings):
    shape: Shape


def known_shapes() -> tuple[str, ...]:
    """The names there are."""
    return tuple(read_toml(SHAPES))


def load_shape(name: str) -> Shape:
    """A model by its name.

    Raises:
        UserError: there is none of this name.
    """
    known = read_toml(SHAPES)
    if name not in known:
        near = closest(name, known)
        hint = f"; did you mean {near!r}?" if near else ""
        raise UserError(f"no model is called {name!r}{hint}. Known are {', '.join(known)}; or give a settings file")
    return _One.model_validate({"shape": known[name]}).shape
