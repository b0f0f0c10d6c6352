"""The base of every objective's settings."""

from __future__ import annotations

from abc import ABC, abstractmethod

from resilin.config import Settings
from resilin.nouns import Objective


class ObjectiveSettings(Settings, ABC):
    """Settings that build an objective; `[objective] use = "package.module:Class"` names a subclass."""

    @abstractmethod
    def build(self) -> Objective:
        """The objective these settings describe."""
