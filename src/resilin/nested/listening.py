"""A model whose outputs are kept while an objective calls it as ever."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from resilin.nested.budgets import BudgetError


class Listening(nn.Module):
    """A model whose outputs are kept; all else that is asked of it, it answers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.outputs: list[Any] = []

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """The model's output, which is kept."""
        output = self.model(*arguments, **named)
        self.outputs.append(output)
        return output

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def hidden(self, what: str, instead: str) -> Tensor:
        """What it gave, (B, T, D) after the last norm.

        Args:
            what: can be done where the model is called once, for the message.
            instead: what to do else.

        Raises:
            BudgetError: it was called several times.
        """
        if len(self.outputs) != 1:
            raise BudgetError(
                f"objective.objective calls its model {len(self.outputs)} times for a batch; {what} where it does so "
                f"once: {instead}"
            )
        found: Tensor = self.outputs[0].hidden_BTD
        return found
