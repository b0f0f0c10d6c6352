"""The step loop. It knows slots, keys, gradients, commits and events; it names no method."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from signal import Signals
from typing import Any, Literal, Protocol

import torch
from torch import nn

from resilin.checkpoint.background import BackgroundSaves
from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.fits import check_fits
from resilin.checkpoint.folder import CheckpointFolder
from resilin.checkpoint.storage import Location
from resilin.keys import Keys
from resilin.layout import Layout
from resilin.nouns import Batch, Objective, Optimizer, Source, State, StepView
from resilin.parallel import activity
from resilin.parallel.step import Autocast, Engine, OneProcess, StepGradient
from resilin.run.events import (
    Evaluated,
    Event,
    Failure,
    Interrupted,
    Listener,
    RunEnded,
    RunStarted,
    StepDone,
)
from resilin.run.frozen import joined, split_frozen
from resilin.run.interrupts import Interrupts
from resilin.run.saving import Saving
from resilin.transforms import may_change_weights

Reason = Literal["completed", "interrupted", "failed"]
_SAVE = 500  # more than any signal, when workers agree on what to do
_NOTHING = Batch(torch.zeros(0, dtype=torch.int64), {})


@dataclass(frozen=True, slots=True)
class Pace:
    """How the loop goes: the settings of `train`, `checkpoint`, `evaluation` and `log` that it needs."""

    steps: int
    micro_batch_size: int
    clip_norm: float
    non_finite: Literal["stop", "skip"] = "stop"
    non_finite_cap: int = 10
    save_every: int = 0
    evaluate_every: int = 0
    evaluate_batches: int = 0
    evaluate_at_start: bool = False
    log_every: int = 1
    asynchronous: bool = False


class Elastic(Protocol):
    """What lets a run go on when its workers change; see `resilin.run.elastic`."""

    def boundary(self, run: Run) -> None:
        """Called before every step, and at the end, when the run's state is that of its steps committed so far."""

    def asks(self, signal: int) -> int:
        """What this worker asks of all others, given the signal it got (0: none); the largest number is agreed on."""

    def agreed(self, number: int) -> int:
        """The signal that everyone ends for, or 0, of the number that was agreed on; it may come out of the loop."""

    def ended(self, run: Run) -> None:
        """The run is over for this worker; returns once it is for all."""

    def leave(self) -> None:
        """This worker is to end, but not the run."""

    def recover(self, run: Run, error: Exception) -> bool:
        """Give the run its place among the workers there are now; False: the error is its own."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended, and where it stands."""

    reason: Reason
    step: int
    metrics: dict[str, float]
    checkpoint: Location | None
    message: str = ""


@dataclass
class Run:
    """Four nouns on a device, taken step by step.

    Attributes:
        source, model, objective, optimizer: the nouns.
        validation: held-out batches by name, or empty.
        seed: of all randomness.
        step: steps committed so far.
    """

    source: Source
    model: nn.Module
    objective: Objective
    optimizer: Optimizer
    pace: Pace
    seed: int
    device: torch.device
    autocast: Autocast
    checkpoints: CheckpointFolder | None = None
    saves: BackgroundSaves | None = None
    """Saves into `checkpoints` while training goes on; None: training waits for each save."""
    validation: dict[str, Source] = field(default_factory=dict)
    listeners: Sequence[Listener] = ()
    started: RunStarted | None = None
    computed_model: nn.Module | None = None
    """What the objective calls: the model itself, or its compiled form."""
    workers: Engine | None = None
    """Who computes steps, where it is more than this process."""
    layout: Callable[[State], Layout] | None = None
    """Where the workers' states lie; None: this process has everything. All workers call it together."""
    elastic: Elastic | None = None
    """Lets workers come and go; None: the end of one is the end of the run."""
    engine: Engine = field(init=False)
    step: int = 0
    skipped: int = 0
    samples: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    saving: Saving = field(init=False)

    def __post_init__(self) -> None:
        self.saving = Saving(self)
        self.engine = self.workers or OneProcess(
            self.computed_model or self.model,
            self.objective,
            micro_batch_size=self.pace.micro_batch_size,
            clip_norm=self.pace.clip_norm,
            device=self.device,
            autocast=self.autocast,
        )

    # -- the loop -----------------------------------------------------------------------------------------------

    def train(self) -> Outcome:
        """Take the remaining steps; returns how it ended. Nothing that was committed is lost on any way out."""
        with Interrupts(self.elastic.leave if self.elastic is not None else None) as interrupts:
            if self.started is not None:
                self.tell(replace(self.started, start_step=self.step))
            began, outcome = time.perf_counter(), None
            evaluates = self.step == 0 and self.pace.evaluate_at_start
            try:
                while outcome is None:
                    try:
                        if evaluates:
                            self.evaluate()
                            evaluates = False
                        outcome = self._go_on(interrupts)
                    except Exception as error:
                        if self.elastic is None or not self.elastic.recover(self, error):
                            raise
                        # Once more, by all: some may have been told of the change before they had ended it.
                        evaluates = self.step == 0 and self.pace.evaluate_at_start
            except Exception:
                with suppress(CheckpointError):  # what ended the run is told, and a save under way is not cut short
                    self.saving.wait()
                raise
            self.tell(RunEnded(step=self.step, reason=outcome.reason, seconds=time.perf_counter() - began))
        return outcome

    def _go_on(self, interrupts: Interrupts) -> Outcome | None:
        """The next step, or the end."""
        if self.elastic is not None:
            self.elastic.boundary(self)
        if self.step >= self.pace.steps:
            outcome: Outcome | None = self._completed()
        elif number := self._agreed(interrupts.number):
            outcome = self._interrupted(Signals(number).name)
        else:
            outcome = self._take_step()
        if outcome is not None and self.elastic is not None:
            self.elastic.ended(self)
        return outcome

    def _agreed(self, signal_number: int) -> int:
        """All workers end after the same step, whichever of them was asked to; all save, if one has to do it again."""
        if self.elastic is None:
            return self.engine.agreed(signal_number)
        while True:
            asked = self.elastic.asks(max(signal_number, _SAVE if self.saving.again else 0))
            number = self.elastic.agreed(self.engine.agreed(asked))
            if number != _SAVE:
                return number
            self.saving.again = False
            self.saving.begin()

    def _take_step(self) -> Outcome | None:
        began = time.perf_counter()
        activity.now.step = self.step
        activity.doing("getting ready and reading its slots")
        try:
            batch, count = self._next_batch()
        except Exception as error:
            self._kept(error, "before_step")
            raise
        if not count:
            return self._completed(f"the source ended after {self.step} of {self.pace.steps} steps")
        keys = Keys(self.seed, self.step, batch.slots_B)
        self.model.train()
        self.optimizer.zero_grad()
        gradient = self.engine.gradient(batch, keys, count)
        if not gradient.finite:
            self.optimizer.zero_grad()
            return self._not_committed(gradient, self.engine.non_finite(batch, keys))
        self.saving.finish_staging()
        activity.doing("updating weights")
        applied = self.optimizer.step(self.step)
        self.step, self.samples = self.step + 1, self.samples + count
        self._after_commit(gradient, applied, began)
        return None

    def _next_batch(self) -> tuple[Batch, int]:
        """This process's slots of the step, once every part that listens is ready for it, and how many all have."""
        view = self._view()
        for part in self._parts():
            if hasattr(part, "before_step"):  # an isinstance check of a protocol costs ten times as much
                if self.saving.staging and may_change_weights(part):
                    self.saving.finish_staging()
                part.before_step(view)
        count = self.source.slots(self.step)
        mine = self.engine.slots(count, self.step)
        return self.source.fetch(self.step, mine) if len(mine) else _NOTHING, count

    def _after_commit(self, gradient: StepGradient, applied: Any, began: float) -> None:
        logs = {**gradient.logs, **{k: v for k, v in applied.items() if k != "lr"}}
        view = replace(self._view(), logs={"loss": gradient.loss, "grad_norm": gradient.norm, **logs, **applied})
        for part in self._parts():
            if hasattr(part, "after_step"):
                part.after_step(view)
        logs |= view.notes
        self.metrics["loss"] = gradient.loss
        if self.step % self.pace.log_every == 0 or self.step == self.pace.steps:
            self.tell(self._step_event(gradient, logs, float(applied["lr"]), time.perf_counter() - began))
        last, milestone = self.step == self.pace.steps, self._milestone()
        if self._due(self.pace.evaluate_every) or ((last or milestone) and self.pace.evaluate_every):
            # Only here: what this changes (batch norm's averages) is then a function of the step, resumed or not.
            for part in self._parts():
                if hasattr(part, "before_evaluation"):
                    part.before_evaluation(self._view())
            try:
                self.evaluate()
            except Exception as error:
                self._kept(error, "evaluation")
                raise
        self.saving.note()
        if (self._due(self.pace.save_every) or (milestone and self.pace.save_every)) and not last:
            self.saving.begin()

    def _step_event(self, gradient: StepGradient, logs: dict[str, float], lr: float, seconds: float) -> StepDone:
        started, mfu = self.started, None
        if started is not None and started.flops_per_unit and started.peak_flops:
            mfu = gradient.units / seconds * started.flops_per_unit / started.peak_flops
        return StepDone(
            step=self.step,
            loss=gradient.loss,
            logs=logs,
            lr=lr,
            grad_norm=gradient.norm,
            units=int(gradient.units),
            seconds=seconds,
            mfu=mfu,
        )

    def _milestone(self) -> bool:
        """Whether a noun asks for an evaluation and a checkpoint after this step."""
        nouns = (self.source, self.objective, self.optimizer)
        return any(hasattr(noun, "milestone") and noun.milestone(self.step) for noun in nouns)

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    # -- ways out -----------------------------------------------------------------------------------------------

    def _completed(self, message: str = "") -> Outcome:
        self.saving.if_new()
        return Outcome("completed", self.step, dict(self.metrics), self.saving.place, message)

    def _interrupted(self, signal_name: str) -> Outcome:
        path = self.saving.now()
        self.tell(Interrupted(step=self.step, signal=signal_name))
        return Outcome("interrupted", self.step, dict(self.metrics), path, f"{signal_name} after step {self.step}")

    def _not_committed(self, gradient: StepGradient, slots: list[int] | None) -> Outcome | None:
        what = "loss" if not abs(gradient.loss) < float("inf") else "gradient norm"
        if slots is None:
            where = "a slot that nobody can look for where several workers share one (data parallelism alone can)"
        elif slots:
            where = f"slot{'s' if len(slots) != 1 else ''} {', '.join(map(str, slots))}"
        else:
            where = "no single slot alone"
        message = (
            f"step {self.step} was not committed: its {what} is not finite "
            f"(loss {gradient.loss}, gradient norm {gradient.norm}); the batch of step {self.step} holds it in {where}"
        )
        skip = self.pace.non_finite == "skip" and self.skipped < self.pace.non_finite_cap
        if self.pace.non_finite == "skip" and not skip:
            message += f"; {self.skipped} steps were left out already, the cap (train.non_finite_cap) is reached"
        action: Literal["skip", "stop"] = "skip" if skip else "stop"
        self.tell(Failure(step=self.step, kind="non_finite", message=message, slots=tuple(slots or ()), action=action))
        if skip:
            self.samples += self.source.slots(self.step)
            self.step, self.skipped = self.step + 1, self.skipped + 1
            return None
        path = self.saving.now() if self.step else None
        return Outcome("failed", self.step, dict(self.metrics), path, message)

    def _kept(self, error: Exception, kind: str) -> None:
        """A part (a selector, a file of data, a judge's endpoint) failed between steps: keep what was committed."""
        if self.elastic is not None:
            return  # it may be a change of workers only, and the run goes on
        self.tell(Failure(step=self.step, kind=kind, message=str(error)))
        if self.step and self.workers is None:  # one worker alone cannot save: the others do not know of it
            self.saving.if_new()

    # -- evaluating and saving ----------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self) -> dict[str, dict[str, float]]:
        """The objective and its logs on the held-out batches, without any randomness."""
        self.saving.finish_staging()
        activity.doing("evaluating")
        results = {}
        self.model.eval()
        for name, source in self.validation.items():
            began = time.perf_counter()
            told = self.engine.evaluate(source, self._validation_batches(source))
            metrics = {"loss": told.loss / told.units if told.units else float("nan"), **told.logs}
            results[name] = metrics
            self.metrics.update({f"{name}/{key}": value for key, value in metrics.items()})
            self.tell(Evaluated(step=self.step, name=name, metrics=metrics, seconds=time.perf_counter() - began))
        self.model.train()
        return results

    def _validation_batches(self, source: Source) -> Iterable[int]:
        count: int = len(source)  # type: ignore[arg-type]
        wanted = self.pace.evaluate_batches
        return range(min(count, wanted) if wanted else count)

    def state_dict(self) -> State:
        """Everything needed to go on as if never stopped."""
        model, frozen = split_frozen(self.model)
        return {
            "model": model,
            **({"frozen": frozen} if frozen else {}),
            "optimizer": self.optimizer.state_dict(),
            "source": self.source.state_dict(),
            "objective": self.objective.state_dict(),
            "run": {"step": self.step, "skipped": self.skipped, "samples": self.samples, "seed": self.seed},
        }

    def load_state_dict(self, state: State) -> None:
        """Take back what `state_dict` gave; data position and schedule follow from the step.

        Raises:
            CheckpointError: the state is that of another model, by the name of a tensor; nothing is changed then.
        """
        self.saving.finish_staging()
        weights = joined(state)
        check_fits(self.model, weights)
        self.optimizer.load_state_dict(state["optimizer"])
        self.model.load_state_dict(weights)
        self.engine.loaded()
        self.source.load_state_dict(state["source"])
        self.objective.load_state_dict(state["objective"])
        progress = state["run"]
        if progress["seed"] != self.seed:
            raise ValueError(f"the checkpoint was trained with seed {progress['seed']}, this run has seed {self.seed}")
        self.step, self.skipped, self.samples = progress["step"], progress["skipped"], progress["samples"]

    def save(self) -> None:
        """Write a checkpoint of the committed state; in the background, where `saves` is set.

        Raises:
            CheckpointError: when it, or the one before it, cannot be written; earlier ones are untouched.
        """
        self.saving.begin()
        self.saving.finish_staging()

    # -- small things -------------------------------------------------------------------------------------------

    def _parts(self) -> Iterator[object]:
        """Everything that may listen to the run: the nouns, what they are built of, and the model's modules."""
        yield from (self.source, self.objective, self.optimizer)
        yield from self.model.modules()

    def _view(self) -> StepView:
        keys = Keys.of_step(self.seed, self.step)
        return StepView(
            self.step,
            self.source,
            self.model,
            self.objective,
            self.optimizer,
            keys,
            autocast=self.autocast,
            steps=self.pace.steps,
        )

    def tell(self, event: Event) -> None:
        """An event, to all listeners."""
        for listener in self.listeners:
            listener(event)
