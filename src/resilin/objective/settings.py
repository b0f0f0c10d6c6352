"""The base of every objective's settings, and what a run tells an objective when it builds it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from resilin.config import Settings
from resilin.nouns import Objective, Source


@dataclass(frozen=True, slots=True)
class ObjectiveContext:
    """The part of a run that an objective may depend on.

    Attributes:
        seed: of the run.
        device: where it computes.
        source: what it trains on: an objective may need its tokenizer.
        initial_model: makes the run's model once more as it was before the first step, on the device, in evaluation
            mode and without gradients: a reference or a teacher that a resumed run gets back without having saved it.
        folder: of the run, for caches; None where nothing is kept.
        steps: of the whole run, where that is known.
    """

    seed: int
    device: torch.device
    source: Source
    initial_model: Callable[[], nn.Module]
    folder: Path | None = None
    steps: int | None = None


class ObjectiveSettings(Settings, ABC):
    """Settings that build an objective; `[objective] use = "package.module:Class"` names a subclass."""

    @abstractmethod
    def build(self, context: ObjectiveContext | None = None) -> Objective:
        """The objective these settings describe; None: without a run, which most objectives can do without.

        Raises:
            ValueError: it needs the context, and there is none.
        """


def needed(context: ObjectiveContext | None, what: str) -> ObjectiveContext:
    """The context of an objective that cannot do without.

    Raises:
        ValueError: there is none; `what` names the objective.
    """
    if context is None:
        raise ValueError(f"{what} needs the run it belongs to: build it with an ObjectiveContext")
    return context
