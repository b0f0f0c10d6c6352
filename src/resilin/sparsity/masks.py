"""When the masks of a model move, and how much they still do."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from resilin.nouns import StepView
from resilin.optim.schedule import count_steps
from resilin.sparsity.linear import SparseLinear


def sparse_layers(model: nn.Module) -> Iterator[tuple[str, SparseLinear]]:
    """The masked layers of a model, by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, SparseLinear))


class MovingMasks(nn.Module):
    """Updates all masks of a model together: every `every` optimizer steps, and once more after the last one.

    It hangs in the model as `sparsity` and hears of each step once, however many micro-batches the step has or blocks
    are recomputed. After the last step the masks are made once more from the final weights and stay: what is then
    evaluated, saved and exported is one and the same model.

    Attributes:
        layers: the masked layers, by name; they live elsewhere in the model.
        every: steps between updates; 0: the first masks stay.
        until: the last update but the final one, in steps or as a fraction of the run.
        calibration: batches that Wanda's first mask sees.
    """

    flips: Tensor

    def __init__(
        self, layers: dict[str, SparseLinear], *, every: int, until: int | float = 1.0, calibration: int = 0
    ) -> None:
        super().__init__()
        self.layers = tuple(layers.items())  # a tuple registers nothing: these modules have their place already
        self.every, self.until, self.calibration = every, until, calibration
        self.register_buffer("flips", torch.full((2,), torch.nan, dtype=torch.float64))

    def before_step(self, view: StepView) -> None:
        """Calibrate before the first step; move the masks before every `every`-th one."""
        if view.step == 0:
            self._calibrate(view)
        elif self.every and view.step % self.every == 0 and not self._over(view):
            self.update()

    def after_step(self, view: StepView) -> None:
        """The final masks after the last step; logs `flip_rate` and `initial_flip_rate` of the last update."""
        if self.every and view.step == view.steps and not self._over(view):
            self.update()
        if self.every:
            for name, rate in zip(("flip_rate", "initial_flip_rate"), self.flips.tolist(), strict=True):
                if rate == rate:  # NaN before the first update
                    view.note(name, rate)

    def _over(self, view: StepView) -> bool:
        if isinstance(self.until, int):
            return view.step > self.until
        return view.steps is not None and view.step > count_steps(self.until, view.steps)

    @torch.no_grad()
    def update(self) -> None:
        """Make every mask anew and count the bits that changed: since the last update, since the one-shot mask."""
        changed = torch.zeros_like(self.flips)
        for _, layer in self.layers:
            mask = layer.wanted_mask()
            changed += torch.stack([(mask != layer.mask).sum(), (mask != layer.first_mask).sum()])
            layer.mask.copy_(mask)
            layer.forget_inputs()
        self.flips.copy_(changed / sum(layer.mask.numel() for _, layer in self.layers))

    @torch.no_grad()
    def _calibrate(self, view: StepView) -> None:
        """Wanda's first masks, from the inputs of the run's first batches (a source is a function of the step)."""
        if not self.calibration:
            return
        training = view.model.training
        view.model.eval()
        for _, layer in self.layers:
            layer.forget_inputs()
            layer.train()  # a layer looks at its inputs while it trains
        device = next(view.model.parameters()).device
        for step in range(self.calibration):
            slots = range(view.source.slots(step))
            if not slots:
                break
            with view.autocast():
                view.objective(view.model, view.source.fetch(step, slots).to(device), None)
        view.model.train(training)
        for _, layer in self.layers:
            layer.start_from(layer.wanted_mask())
            layer.forget_inputs()

    def extra_repr(self) -> str:
        """How many layers, how often."""
        return f"{len(self.layers)} layers, " + (f"every {self.every} steps" if self.every else "fixed")
