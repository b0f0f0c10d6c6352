"""Train on samples that a selector chooses anew, again and again, by looking at the model.

Source: DataFlex (arXiv:2603.26164), the schedule `dynamic_select`.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from resilin.config import component
from resilin.data.errors import DataError
from resilin.data.mix import check_same_vocabulary
from resilin.data.pool import Pool, part_of, pool_of, pool_size
from resilin.data.settings import SourceContext, SourceSettings
from resilin.keys import Keys
from resilin.nouns import Batch, Source, State, StepView
from resilin.steer.draws import permutation
from resilin.steer.fingerprint import fingerprint
from resilin.steer.flex import FlexSchedule, Window
from resilin.steer.look import Look
from resilin.steer.selector import Selection, Selector, checked
from resilin.steer.stored import Decisions
from resilin.steer.subset import Subset
from resilin.transforms import SourceTransform, read_for

Steps = Annotated[int, Field(ge=1)]


class Selected(SourceSettings):
    """The samples of another source, chosen while the model trains."""

    source: Annotated[SourceSettings, component("resilin.data.text_source:TextSource")]
    """The pool to choose from; its samples must be addressable by number. It also says how many slots a step has, and
    how samples look in it: put a schedule of shapes here, inside."""
    selector: Annotated[Selector, component("resilin.steer.uniform:Random")] = Field(
        default_factory=dict, validate_default=True
    )
    """Who chooses."""
    target: Annotated[SourceSettings, component("resilin.data.text_source:TextSource")] | None = None
    """What the run should become good at, for selectors that compare with it (its training split is read); left out:
    the validation split of `source`."""
    target_samples: Annotated[int, Field(ge=0)] = 0
    """Compare with so many of the target's samples, drawn once; 0: with all."""
    warmup_steps: Annotated[int, Field(ge=0)] = 10
    """Steps on uniformly drawn samples before the first selection (of each flex epoch)."""
    update_steps: Steps = 10
    """Steps on one selection, whose samples all differ."""
    update_times: Annotated[int, Field(ge=-1)] = -1
    """Selections of a flex epoch, after which it starts again with a warm-up; -1: as many as make one flex epoch as
    long as a pass over the pool."""
    look_batch: Steps = 32
    """Samples computed at once while a selector looks at the pool."""

    def build(self, context: SourceContext) -> Source:
        """For training the selected samples; for validation the source's own validation batches."""
        inner = self.source.build(context)
        if context.split == "validation":
            return inner
        schedule = self._schedule(inner)
        return SelectedSource(inner, self, context, schedule, lambda: self._target(context, inner))

    def _schedule(self, inner: Source) -> FlexSchedule:
        size = pool_size(pool_of(inner, "selection"))
        times = self.update_times
        if times == -1:
            times = max(1, -(-(_steps_of_a_pass(inner, size) - self.warmup_steps) // self.update_steps))
        if not self.warmup_steps and not times:
            raise DataError("source.warmup_steps and source.update_times are both 0: there is nothing to train on")
        schedule = FlexSchedule(self.warmup_steps, self.update_steps, times)
        step = self.warmup_steps
        while step < schedule.epoch_steps and inner.slots(step):
            window_edges(inner, schedule.window(step), size)
            step += self.update_steps
        return schedule

    def _target(self, context: SourceContext, inner: Source) -> Pool:
        if self.target is not None:
            found = self.target.build(dataclasses.replace(context, split="train", folder=None))
        else:
            found = self.source.build(dataclasses.replace(context, split="validation", folder=None))
        check_same_vocabulary([inner, found])
        pool = pool_of(found, "the target of a selection")
        size = pool_size(pool)
        if not size:
            raise DataError("the target of the selection has no samples: name other data in source.target")
        if 0 < self.target_samples < size:
            keys = Keys.of_step(context.seed, 0).fold("steer").fold("target")
            return Subset(pool, permutation(keys, size)[: self.target_samples].numpy())
        return pool


def _steps_of_a_pass(source: Source, size: int) -> int:
    """How many steps have, together, at most `size` slots."""
    steps = 0
    while (count := source.slots(steps)) and count <= size:
        size, steps = size - count, steps + 1
    return steps


def window_edges(source: Source, window: Window, size: int) -> list[int]:
    """How many slots the steps of a window have before each of its steps, and at its end.

    Raises:
        DataError: a selection for it needs more different samples than there are.
    """
    slots = [source.slots(step) for step in range(window.start, window.start + window.steps)]
    if window.update and sum(slots) > size:
        most = max(1, size // max(slots))
        raise DataError(
            f"the window of steps {window.start} to {window.start + window.steps - 1} needs {sum(slots)} different "
            f"samples (up to {max(slots)} a step) and the pool has {size}: "
            + (f"lower source.update_steps to {most}" if most * max(slots) <= size else "lower train.batch_size")
        )
    return [0, *itertools.accumulate(slots)]


class SelectedSource(SourceTransform):
    """The steps of a flex schedule on chosen samples.

    A batch has the fields of the pool's samples, `samples` (B,), their numbers, and, where the pool has several
    parts, `domains` (B,), the part of each.
    """

    steered = True
    """What a step reads is decided just before it, in the run."""

    def __init__(
        self,
        inner: Source,
        settings: Selected,
        context: SourceContext,
        schedule: FlexSchedule,
        find_target: Callable[[], Pool],
    ) -> None:
        super().__init__(inner)
        self.settings, self.schedule = settings, schedule
        self.pool = pool_of(inner, "selection")
        self.batch_size, self.seed = context.batch_size, context.seed
        self.decisions = Decisions(context.folder, "selections")
        self._make_target = find_target
        self._target: Pool | None = None
        self._start = -1
        self._edges: tuple[int, list[int]] = (-1, [])
        self._chosen = torch.zeros(0, dtype=torch.int64)
        self._memory: State = {}
        self._cache: dict[str, object] = {}

    @property
    def _policy(self) -> str:
        return fingerprint(self.settings.model_dump(mode="json", exclude={"source", "look_batch"}))

    @property
    def digest(self) -> str:
        """Changes with the data, the target and everything that decides about them."""
        return fingerprint(str(getattr(self.inner, "digest", "")), self._policy)

    def _find_target(self) -> Pool:
        if self._target is None:
            self._target = self._make_target()
        return self._target

    # -- deciding -----------------------------------------------------------------------------------------------

    def before_step(self, view: StepView) -> None:
        """Choose the samples of the window that starts with this step."""
        super().before_step(view)
        window = self.schedule.window(view.step)
        if window.start == self._start:
            return
        began = time.perf_counter()
        count = self._edges_of(window)[-1]
        if not count:
            return  # the data have ended
        look = Look(
            view=dataclasses.replace(view, step=window.start),
            pool=self.pool,
            find_target=self._find_target,
            count=count,
            update=window.update,
            updates=self.schedule.update_times,
            seed=self.seed,
            batch_size=self.settings.look_batch,
            memory=dict(self._memory),
            cache=self._cache,
        )
        chosen, metrics, found, file = self._decide(look, window)
        self._chosen, self._start, self._memory = chosen, window.start, look.memory
        self.decisions.log(
            step=window.start,
            epoch=window.epoch,
            update=window.update,
            selector=type(self.settings.selector).__name__,
            samples=count,
            parts=self._counts(chosen),
            metrics=metrics,
            file=file,
            from_cache=found,
            seconds=round(time.perf_counter() - began, 3),
        )

    def _decide(self, look: Look, window: Window) -> tuple[Tensor, dict[str, float], bool, str | None]:
        """The samples, figures, whether they were stored before, and the file they are stored in."""
        selector = self.settings.selector
        who = f"selector {type(selector).__name__}"
        size = look.size
        if window.update == 0:
            return checked(selector.warm_up(look), size, look.count, who, repeats=True), {}, False, None
        view = look.view
        key = fingerprint(
            self.digest, self.seed, look.count, window.start, window.update, look.memory,
            view.model.state_dict(), view.optimizer.state_dict(),
        )  # fmt: skip
        path = self.decisions.file(window.start, key)
        file = None if path is None else f"{path.parent.name}/{path.name}"
        stored = self.decisions.find(window.start, key)
        if stored is not None:
            look.memory.clear()
            look.memory.update(stored["memory"])
            return checked(stored["indices"], size, look.count, who), dict(stored["metrics"]), True, file
        made = selector.select(look)
        made = made if isinstance(made, Selection) else Selection(made)
        chosen = checked(made.samples, size, look.count, who)
        decision = {"indices": chosen, "metrics": dict(made.metrics), "memory": look.memory}
        self.decisions.keep(window.start, key, decision)
        return chosen, dict(made.metrics), False, file

    def _counts(self, chosen: Tensor) -> list[int]:
        parts = part_of(self.pool, chosen.numpy())
        return [int(count) for count in np.bincount(parts, minlength=len(self.pool.pool_parts))]

    # -- reading ------------------------------------------------------------------------------------------------

    @property
    def pool_parts(self) -> tuple[int, ...]:
        """Samples of each part of the pool, whatever is chosen."""
        return self.pool.pool_parts

    def read_for(self, step: int, slots: Sequence[int], samples: Sequence[int]) -> Batch:
        """Samples of the pool by number, as the pool shows them in a step."""
        return read_for(self.pool, step, slots, samples)

    def _edges_of(self, window: Window) -> list[int]:
        if self._edges[0] != window.start:
            self._edges = (window.start, window_edges(self.inner, window, pool_size(self.pool)))
        return self._edges[1]

    def fetch(self, step: int, slots: Sequence[int]) -> Batch:
        """The chosen samples of these slots, as the pool shows them in this step.

        Raises:
            DataError: the step lies in another window than the last decided one.
        """
        window = self.schedule.window(step)
        if window.start != self._start:
            raise DataError(
                f"step {step}: its samples are not chosen yet (a selector decides just before step {window.start}, by "
                "looking at the model): steered data are read step by step, in a run"
            )
        slots_B = torch.as_tensor(list(slots), dtype=torch.int64)
        order = permutation(Keys.of_step(self.seed, window.start).fold("steer").fold("order"), len(self._chosen))
        samples_B = self._chosen[order[self._edges_of(window)[step - window.start] + slots_B]]
        seen = read_for(self.pool, step, slots, samples_B.tolist())
        more = {"samples": samples_B}
        if len(self.pool_parts) > 1:
            more["domains"] = torch.from_numpy(part_of(self.pool, samples_B.numpy()).astype(np.int64))
        return Batch(slots_B, {**seen.fields, **more})

    # -- state --------------------------------------------------------------------------------------------------

    def own_state(self) -> State:
        """The window's samples and what the selector remembers."""
        return {"policy": self._policy, "start": self._start, "chosen": self._chosen, "memory": self._memory}

    def load_own_state(self, state: State) -> None:
        """Go on in the middle of a window; another selector, target or schedule decides about it anew."""
        self._cache.clear()
        self._edges = (-1, [])
        if state["policy"] == self._policy:
            self._start, self._chosen, self._memory = state["start"], state["chosen"], state["memory"]
        else:
            self._start, self._chosen, self._memory = -1, torch.zeros(0, dtype=torch.int64), {}
