"""The base of every mixer, and the mixers that look at nothing.

Shapes: k domains.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import model_validator

from resilin.config import Settings
from resilin.config.errors import UserError
from resilin.nouns import State
from resilin.steer.draws import open_uniform
from resilin.steer.look import Look


class MixError(UserError):
    """Proportions that cannot be sampled by; the text says what is wrong with them."""


@dataclass(frozen=True, slots=True)
class MixLook(Look):
    """What a mixer may look at.

    Attributes:
        names: of the domains, the pool's parts.
        current: their proportions so far.
    """

    names: tuple[str, ...] = ()
    current: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Seen:
    """What a committed step says of the domains.

    Attributes:
        step: from 0.
        losses: mean loss of each domain in the step's batch; None for one that was absent.
        shares: of the batch's samples.
        current: the proportions the batch was drawn by.
    """

    step: int
    losses: tuple[float | None, ...]
    shares: tuple[float, ...]
    current: tuple[float, ...]


class Mixer(Settings, ABC):
    """Decides in what proportions domains are drawn; `mixer = { use = "module:Class" }` names a subclass."""

    listens: ClassVar[bool] = False
    """Whether `observe` wants the domains' losses after each step."""

    @abstractmethod
    def mix(self, look: MixLook) -> Sequence[float]:
        """The proportions of the next window: not negative, not all 0; they are divided by their sum."""

    def observe(self, memory: State, seen: Seen) -> None:
        """Learn from a committed step; what is to be remembered goes into `memory`."""


def checked_proportions(given: Sequence[float], names: Sequence[str], who: str) -> tuple[float, ...]:
    """Proportions that sum to 1.

    Raises:
        MixError: not one for each domain, or a value that is negative or not finite, or all 0.
    """
    values = torch.as_tensor(list(given), dtype=torch.float64)
    if len(values) != len(names):
        raise MixError(f"{who} gave {len(values)} proportions for {len(names)} domains ({', '.join(names)})")
    if not bool(torch.isfinite(values).all()) or bool((values < 0).any()) or not float(values.sum()) > 0:
        raise MixError(f"{who} gave proportions {values.tolist()}: they should be at least 0, finite, and not all 0")
    return tuple((values / values.sum()).tolist())


class Fixed(Mixer):
    """The same proportions all the time: given ones, those of a file, or the source's initial ones."""

    proportions: dict[str, float] = {}  # noqa: RUF012  # pydantic copies defaults
    """By domain; left out, and without a file: the proportions the source starts with."""
    weights_file: Path | None = None
    """A JSON file with `{"weights": {domain: weight}}`: the `doremi.json` of a proxy run, for DoReMi's last run."""

    @model_validator(mode="after")
    def _one_origin(self) -> Fixed:
        if self.proportions and self.weights_file is not None:
            raise ValueError("should have proportions or weights_file, not both")
        return self

    def mix(self, look: MixLook) -> Sequence[float]:
        """As given.

        Raises:
            MixError: the file cannot be read, or the domains are others.
        """
        wanted: Mapping[str, float] = self.proportions
        where = "mixer.proportions"
        if self.weights_file is not None:
            where = str(self.weights_file)
            try:
                wanted = json.loads(self.weights_file.read_text(encoding="utf-8"))["weights"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise MixError(f"{where}: cannot be read as domain weights: {error!r}") from None
        if not wanted:
            return look.current
        if set(wanted) != set(look.names):
            raise MixError(f"{where} is about {', '.join(wanted)}; the domains are {', '.join(look.names)}")
        return [wanted[name] for name in look.names]


class RandomMix(Mixer):
    """Proportions drawn uniformly from all that sum to 1, anew for each window."""

    def mix(self, look: MixLook) -> Sequence[float]:
        """A flat Dirichlet draw, keyed by the step."""
        draws: list[float] = (-open_uniform(look.keys("random mix"), len(look.names)).log()).tolist()
        return draws
