"""What is known of the loops that a looped decoder was trained at: told by the settings of its run."""

from __future__ import annotations

from dataclasses import dataclass

from resilin.models.decoder_settings import DecoderSettings
from resilin.models.loop_settings import reduced
from resilin.nested.budgets import Budget
from resilin.nested.rungs import Kind, Rung, SizeRecord
from resilin.nested.shortcut import Shortcut
from resilin.nested.sub_model import sub_model


@dataclass(frozen=True, slots=True)
class LoopRecord(SizeRecord):
    """The trajectories of a looped decoder.

    Attributes:
        trained: whether it was trained at short ones.
        fixed: those it was trained at; (): any in units of 1/L.
    """

    trained: bool = False
    fixed: tuple[int | tuple[int, ...], ...] = ()

    @classmethod
    def of(cls, settings: Shortcut) -> LoopRecord:
        """Of a model that was trained so."""
        return cls(settings.shortens, settings.trajectories)

    def rungs(self, settings: DecoderSettings) -> list[Rung]:
        """Every number of equal loops, ascending, with names; the last is the whole model."""
        count = len(settings.trajectory)
        return [(_name(loops), Budget(loops=loops)) for loops in range(1, count)] + [(_name(count), Budget())]

    def kind(self, settings: DecoderSettings, wanted: Budget) -> Kind:
        """Whether a trajectory was trained; "mix": its steps lie between trained ones, being no multiples of 1/L.

        Raises:
            BudgetError: the budget does not fit the model.
        """
        part, whole = sub_model(settings, wanted), sub_model(settings, Budget())
        if part == whole:
            return "trained"
        others_whole = (part.hidden, part.layers) == (whole.hidden, whole.layers)
        if not self.trained or not others_whole or len(part.trajectory) > len(whole.trajectory):
            return "untrained"
        if self.fixed:
            known = [reduced((1,) * one if isinstance(one, int) else one) for one in self.fixed]
            return "trained" if part.trajectory in known else "untrained"
        if settings.loop is not None and settings.loop.condition != "time_and_step":
            return "trained"
        return "mix" if len(whole.trajectory) % sum(part.trajectory) else "trained"


def _name(loops: int) -> str:
    return f"{loops} loop" if loops == 1 else f"{loops} loops"
