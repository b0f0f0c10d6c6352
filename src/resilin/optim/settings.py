"""The base of every optimizer's settings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

from torch import nn

from resilin.config import Settings, UserError
from resilin.nouns import Optimizer


class OptimizerSettings(Settings, ABC):
    """Settings that build an optimizer; `[optimizer] use = "package.module:Class"` names a subclass."""

    @abstractmethod
    def build(self, model: nn.Module, total_steps: int) -> Optimizer:
        """The optimizer of `model`'s trainable parameters.

        Args:
            model: already on its device: moments are created beside the parameters.
            total_steps: steps of the whole run, which schedules are fractions of.
        """

    def keeps_whole(self, model: nn.Module) -> set[str]:
        """Names of parameters whose update looks at more than one element at a time: shards of them are of no use."""
        return set()

    def owning(self, model: nn.Module, total_steps: int) -> Callable[[Mapping[str, nn.Parameter]], Optimizer]:
        """What makes the optimizer of one of many workers, however often it comes to own something else.

        Args:
            model: as for `build`: names and shapes of its parameters decide groups and factors.
            total_steps: as for `build`.

        Returns:
            Given what a worker updates, by the name of its parameter (some of its elements, flat, or all of it), the
            optimizer of that.

        Raises:
            UserError: this optimizer cannot update parts of a model.
        """
        raise UserError(
            f"optimizer {type(self).__name__} cannot be divided among workers, or among tiers of memory: it has no "
            "`owning`; use AdamW, SGD or Muon, or one worker without [memory]"
        )

    def build_owned(self, model: nn.Module, total_steps: int, owned: Mapping[str, nn.Parameter]) -> Optimizer:
        """The optimizer of what one of many workers owns; see `owning`."""
        return self.owning(model, total_steps)(owned)
