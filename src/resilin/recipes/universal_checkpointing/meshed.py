"""An optimizer whose state lives on the ranks of a mesh, and moves to another mesh in the middle of a run.

All ranks are in one process (`ranks.py`). The model computes with whole tensors; the arithmetic of tensor parallelism
is added by `partial_sums.py`, that of data parallelism by the run's micro-batches.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from resilin.checkpoint.folder import CheckpointFolder
from resilin.config import Settings, SettingsError, component
from resilin.layout import Mesh
from resilin.models.decoder import Decoder
from resilin.nouns import State, StepView
from resilin.optim.adamw import AdamW
from resilin.optim.settings import OptimizerSettings
from resilin.parallel.decoder_specs import Sharding
from resilin.recipes.universal_checkpointing.fused import Fused, fused_rules
from resilin.recipes.universal_checkpointing.ranks import KINDS, Grouped, Ranks, make_layout

Carry = Literal["universal", "weights", "naive"]
TURNS = 3
"""How often either way to save is timed; the median counts."""


class Stretch(Settings):
    """Steps that are trained in one layout."""

    start: int = Field(default=0, ge=0)
    """The first step."""
    mesh: str = "dp=1"
    """Axes from the outermost, `pp=2,dp=2,tp=2`."""
    sharding: Sharding = "zero1"
    """What the axis dp cuts: none, zero1 or zero3."""


class Meshed(OptimizerSettings):
    """AdamW on the ranks of a mesh; from one stretch to the next the state goes through a checkpoint on disk."""

    optimizer: Annotated[AdamW, component("resilin.optim.adamw:AdamW")] = Field(
        default_factory=dict, validate_default=True
    )
    """The optimizer of every rank."""
    stretches: tuple[Stretch, ...] = (Stretch(),)
    """Layouts, by their first step; the first begins at step 0."""
    carry: Carry = "universal"
    """What comes along: all state; weights only, with a new optimizer; or all state, but fused tensors joined in the
    order of ranks."""
    vocabulary_multiple: int = Field(default=12, ge=1)
    """Rows of embedding and head are padded to a multiple of this; the ways of tensor parallelism must divide it."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        starts = [stretch.start for stretch in self.stretches]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)):
            raise ValueError(f"stretches must begin at step 0 and then at later and later ones, not at {starts}")
        return self

    def build(self, model: nn.Module, total_steps: int) -> MeshedOptimizer:
        """The optimizer; the model's tensors are whole, and are written after every step."""
        decoder = next((module for module in model.modules() if isinstance(module, Decoder)), None)
        if decoder is None:
            raise SettingsError(f"Meshed lays out a Decoder, not a {type(model).__name__}")
        schedule = partial(self.optimizer.schedule.factor, total=total_steps, peak=self.optimizer.lr)
        return MeshedOptimizer(self, decoder, schedule)


class MeshedOptimizer:
    """See `Meshed`. The first step of a stretch logs `mesh/save_s`, `mesh/gather_s` and `mesh/load_s`."""

    def __init__(self, settings: Meshed, decoder: Decoder, schedule: Callable[[int], float]) -> None:
        self.settings, self.decoder, self.schedule = settings, decoder, schedule
        self.parameters = dict(decoder.named_parameters())
        self.fused = Fused.of(list(self.parameters))
        self.rows = {name: p.shape[0] for name, p in self.parameters.items()}
        groups = settings.optimizer.groups(decoder)
        group_of = {name: number for number, group in enumerate(groups) for name, _ in group.parameters}
        self.groups = tuple(
            Grouped(
                tuple(stored for stored, parts in self.fused.members.items() if group_of[parts[0]] == number),
                group.lr_scale,
                group.weight_decay,
            )
            for number, group in enumerate(groups)
        )
        self.current = 0
        self.moved: dict[str, float] = {}
        self.ranks = self._ranks(settings.stretches[0])
        self.ranks.put("model", self._stored())
        self.ranks.start_moments()

    def _stored(self) -> dict[str, Tensor]:
        return self.fused.join({name: p.data for name, p in self.parameters.items()})

    def _ranks(self, stretch: Stretch, naive: bool = False) -> Ranks:
        mesh = Mesh.parse(stretch.mesh)
        rules = fused_rules(self.decoder.settings, self.settings.vocabulary_multiple, naive=naive)
        shapes = {name: tuple(tensor.shape) for name, tensor in self._stored().items()}
        layout, specs = make_layout(shapes, self.groups, rules, self.decoder.settings, mesh, stretch.sharding)
        return Ranks(layout, specs, mesh, self.groups, self.settings.optimizer)

    def before_step(self, view: StepView) -> None:
        """Move where the next stretch begins, so that its first gradient is of what was loaded."""
        later = self.current + 1
        if later < len(self.settings.stretches) and self.settings.stretches[later].start == view.step:
            self.moved = self._move(later)

    @torch.no_grad()
    def step(self, step: int) -> Mapping[str, float]:
        """Every rank updates its own; the model gets the new weights."""
        logs, self.moved = self.moved, {}
        gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in self.parameters.items()}
        self.ranks.put("grad", self.fused.join(gradients))
        factor = self.schedule(step)
        self.ranks.update(factor)
        self._to_model()
        return {"lr": factor * self.settings.optimizer.lr, **logs}

    def _to_model(self) -> None:
        for name, value in self.fused.split(self.ranks.whole("model"), self.rows).items():
            self.parameters[name].data.copy_(value)

    @torch.no_grad()
    def _move(self, later: int) -> dict[str, float]:
        """Through a checkpoint into the next layout."""
        before = self.settings.stretches[self.current]
        naive = self.settings.carry == "naive"
        target = self._ranks(self.settings.stretches[later])
        declared = self._ranks(before, naive=True).layout if naive else self.ranks.layout
        with tempfile.TemporaryDirectory() as at:
            gather, shards = self._gatherer(Path(at) / "gathered"), Path(at) / "shards"
            save = self.ranks.saver(shards, declared)
            save()  # the first save in a layout plans who writes what; all later ones find it planned
            turns = [(_timed(gather), _timed(save)) for _ in range(TURNS)]
            loaded = _timed(lambda: target.load(shards))
        gathered, saved = (statistics.median(column) for column in zip(*turns, strict=True))
        if self.settings.carry == "weights":
            target.start_moments()
        self.ranks, self.current = target, later
        self._to_model()
        return {"mesh/gather_s": gathered, "mesh/save_s": saved, "mesh/load_s": loaded}

    def _gatherer(self, path: Path) -> Callable[[], None]:
        """What is compared with: everything to rank 0, which writes it alone."""

        def save() -> None:
            folder = CheckpointFolder(path)
            folder.save(self.ranks.steps, {kind: self.ranks.whole(kind) for kind in KINDS})
            folder.close()

        return save

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def state_dict(self) -> State:
        """Whole moments by stored name, whatever the layout."""
        return {"steps": self.ranks.steps, **{kind: self.ranks.whole(kind) for kind in ("exp_avg", "exp_avg_sq")}}

    def load_state_dict(self, state: State) -> None:
        """Take moments back into the layout of the step that comes next; weights are the model's."""
        steps = int(state["steps"])
        starts = [stretch.start for stretch in self.settings.stretches]
        self.current = sum(start < steps for start in starts[1:])
        self.ranks = self._ranks(self.settings.stretches[self.current])
        self.ranks.put("model", self._stored())
        for kind in ("exp_avg", "exp_avg_sq"):
            self.ranks.put(kind, state[kind])
        self.ranks.set_steps(steps)


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
