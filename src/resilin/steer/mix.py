"""Train on several domains in proportions that a mixer decides anew, again and again.

Source: DataFlex (arXiv:2603.26164), the schedule `dynamic_mix`.
Shapes: B samples of a batch, n samples of a window, k domains.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from resilin.config import component
from resilin.data.errors import DataError
from resilin.data.mix import MixSource, check_same_vocabulary
from resilin.data.pool import pool_of, pool_size
from resilin.data.settings import SourceContext, SourceSettings
from resilin.keys import Keys
from resilin.nouns import Batch, Source, State, StepView
from resilin.steer.draws import permutation, with_replacement
from resilin.steer.fingerprint import fingerprint
from resilin.steer.mixer import Mixer, MixError, MixLook, Seen, checked_proportions
from resilin.steer.stored import Decisions
from resilin.steer.turns import TurnSource


class Mixed(SourceSettings):
    """Samples of named domains, with replacement.

    A step has as many slots as the domains say it has (the most, where one ends before the others), and samples look in
    it as their domain shows them: a schedule of shapes goes inside, the same into every domain.
    """

    domains: dict[str, Annotated[SourceSettings, component("resilin.data.text_source:TextSource")]]
    """The domains, by name; the last takes what rounding leaves over."""
    mixer: Annotated[Mixer, component("resilin.steer.mixer:Fixed")] = Field(default_factory=dict, validate_default=True)
    """Who decides."""
    initial: Literal["uniform", "stratified", "mixture"] = "uniform"
    """The proportions before the first decision: alike, by the domains' sizes, or `proportions`."""
    proportions: dict[str, float] = {}  # noqa: RUF012  # pydantic copies defaults
    """With `initial = "mixture"`: the proportions by domain."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps on the initial proportions before the mixer is asked for the first time."""
    update_steps: Annotated[int, Field(ge=1)] = 10
    """Steps between its decisions."""
    look_batch: Annotated[int, Field(ge=1)] = 32
    """Samples computed at once while a mixer looks at the domains."""

    @model_validator(mode="after")
    def _consistent(self) -> Mixed:
        if not self.domains:
            raise ValueError("should have at least one domain")
        if (self.initial == "mixture") != bool(self.proportions):
            raise ValueError("proportions belong to initial = 'mixture', which needs them")
        if self.proportions and set(self.proportions) != set(self.domains):
            raise ValueError(f"proportions should name the domains: {', '.join(self.domains)}")
        return self

    def build(self, context: SourceContext) -> Source:
        """For training the mix; for validation the domains' batches in turn."""
        inner = dataclasses.replace(context, folder=None)
        sources = {name: settings.build(inner) for name, settings in self.domains.items()}
        check_same_vocabulary(list(sources.values()))
        if context.split == "validation":
            return TurnSource(sources)
        return MixedSource(sources, self, context)


def snapshot(proportions: Sequence[float], sizes: Sequence[int], count: int, keys: Keys) -> torch.Tensor:
    """The samples of a window, as numbers in the domains laid end to end, (count,) int64, shuffled.

    Each domain gets floor(count * p), the last one the rest; within a domain samples are drawn with replacement.
    """
    counts = [math.floor(count * p) for p in proportions[:-1]]
    counts.append(count - sum(counts))
    base, parts = 0, []
    for number, (wanted, size) in enumerate(zip(counts, sizes, strict=True)):
        if wanted:
            parts.append(base + with_replacement(keys.fold("domain").fold(number), size, wanted))
        base += size
    return torch.cat(parts)[permutation(keys.fold("shuffle"), count)]


class MixedSource:
    """Windows of samples drawn by the current proportions. A batch has `domains` (B,) beside its samples' fields.

    Attributes:
        domain_names: in the order of `domains`.
    """

    steered = True
    """What a step reads is decided just before it, in the run."""

    def __init__(self, sources: dict[str, Source], settings: Mixed, context: SourceContext) -> None:
        self.domain_names = tuple(sources)
        self.settings, self.seed, self.batch_size = settings, context.seed, context.batch_size
        self._mix = MixSource(list(sources.values()), [1] * len(sources), context.batch_size)
        for name, source in sources.items():
            if not pool_size(pool_of(source, f"domain {name!r} of a mix")):
                raise DataError(f"domain {name!r} has no samples")
        self.decisions = Decisions(context.folder, "mixing")
        self._proportions = self._initial()
        self._window = -1
        self._edges: tuple[int, list[int]] = (-1, [])
        self._memory: State = {}
        self._cache: dict[str, Any] = {}
        self._snapshot: tuple[int, torch.Tensor] | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._mix, name)

    @property
    def pool_parts(self) -> tuple[int, ...]:
        """Samples of each domain."""
        return self._mix.pool_parts

    def read(self, samples: Sequence[int]) -> Batch:
        """Samples by number, the domains laid end to end."""
        return self._mix.read(samples)

    def read_for(self, step: int, slots: Sequence[int], samples: Sequence[int]) -> Batch:
        """Samples by number, as their domains show them in a step."""
        return self._mix.read_for(step, slots, samples)

    @property
    def digest(self) -> str:
        """Changes with the data of any domain and with everything that decides about the mix."""
        own = self.settings.model_dump(mode="json", exclude={"domains", "look_batch"})
        return fingerprint(self._mix.digest, self.domain_names, own)

    @property
    def proportions(self) -> dict[str, float]:
        """The current proportions by domain."""
        return dict(zip(self.domain_names, self._proportions, strict=True))

    def _initial(self) -> tuple[float, ...]:
        kind = self.settings.initial
        if kind == "stratified":
            return checked_proportions(self._mix.pool_parts, self.domain_names, "the domains' sizes")
        if kind == "mixture":
            given = [self.settings.proportions[name] for name in self.domain_names]
            return checked_proportions(given, self.domain_names, "source.proportions")
        return tuple(1 / len(self.domain_names) for _ in self.domain_names)

    def _start_of(self, step: int) -> int:
        """The first step of the window `step` lies in; the warm-up is cut into windows of its own."""
        warmup, every = self.settings.warmup_steps, self.settings.update_steps
        return step - step % every if step < warmup else warmup + (step - warmup) // every * every

    def _window_edges(self, start: int) -> list[int]:
        """How many slots the steps of a window have before each of its steps, and at its end."""
        if self._edges[0] != start:
            steps, warmup = self.settings.update_steps, self.settings.warmup_steps
            if start < warmup:
                steps = min(steps, warmup - start)
            slots = [self.slots(step) for step in range(start, start + steps)]
            self._edges = (start, [0, *itertools.accumulate(slots)])
        return self._edges[1]

    def before_step(self, view: StepView) -> None:
        """Ask the mixer where a window begins."""
        for source in self._mix.sources:
            if hasattr(source, "before_step"):
                source.before_step(view)
        start = self._start_of(view.step)
        if start == self._window:
            return
        warmup, mixer = self.settings.warmup_steps, self.settings.mixer
        if start >= warmup:
            look = MixLook(
                view=dataclasses.replace(view, step=start),
                pool=self,
                find_target=_no_target,
                count=self._window_edges(start)[-1],
                update=(start - warmup) // self.settings.update_steps + 1,
                updates=None,
                seed=self.seed,
                batch_size=self.settings.look_batch,
                memory=dict(self._memory),
                cache=self._cache,
                names=self.domain_names,
                current=self._proportions,
            )
            who = f"mixer {type(mixer).__name__}"
            self._proportions = checked_proportions(mixer.mix(look), self.domain_names, who)
            self._memory = look.memory
        self._window = start
        self.decisions.log(step=start, mixer=type(mixer).__name__, proportions=self.proportions)

    def after_step(self, view: StepView) -> None:
        """Tell the mixer what the step says of the domains.

        Raises:
            MixError: it needs the domains' losses, and the objective does not log them.
        """
        for source in self._mix.sources:
            if hasattr(source, "after_step"):
                source.after_step(view)
        mixer = self.settings.mixer
        if not mixer.listens:
            return
        shares = tuple(float(view.logs.get(f"share/{name}", 0.0)) for name in self.domain_names)
        if not any(shares):
            raise MixError(
                f"mixer {type(mixer).__name__} needs the loss of each domain after every step: set objective.use = "
                "'resilin.steer.by_domain:ByDomain'"
            )
        losses = tuple(
            float(view.logs[f"nll/{name}"]) if share else None
            for name, share in zip(self.domain_names, shares, strict=True)
        )
        mixer.observe(self._memory, Seen(view.step - 1, losses, shares, self._proportions))

    def slots(self, step: int) -> int:
        """As many as the domains say: drawing with replacement does not end before all of them do."""
        return max(source.slots(step) for source in self._mix.sources)

    def fetch(self, step: int, slots: Sequence[int]) -> Batch:
        """The samples of these slots.

        Raises:
            DataError: the step lies in another window than the last decided one.
        """
        start = self._start_of(step)
        if start != self._window:
            raise DataError(
                f"step {step}: its proportions are not decided yet (they are just before step {start}): mixed data are "
                "read step by step, in a run"
            )
        if self._snapshot is None or self._snapshot[0] != start:
            keys = Keys.of_step(self.seed, start).fold("steer").fold("snapshot")
            drawn = snapshot(self._proportions, self.pool_parts, self._window_edges(start)[-1], keys)
            self._snapshot = (start, drawn)
        slots_B = torch.as_tensor(list(slots), dtype=torch.int64)
        samples_B = self._snapshot[1][self._window_edges(start)[step - start] + slots_B]
        edges = torch.from_numpy(np.cumsum(self.pool_parts))
        domains_B = torch.searchsorted(edges, samples_B, right=True)
        seen = self.read_for(step, slots, samples_B.tolist())
        return Batch(slots_B, {**seen.fields, "domains": domains_B})

    def state_dict(self) -> State:
        """The proportions of the window and what the mixer remembers."""
        return {
            "digest": self.digest,
            "window": self._window,
            "proportions": list(self._proportions),
            "memory": self._memory,
            "domains": self._mix.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        """Go on in the middle of a window.

        Raises:
            DataError: the state is of other domains or of another mixer.
        """
        if state.get("digest") != self.digest:
            raise DataError(
                "the checkpoint was made with other domains, another mixer or another schedule: resume with the source "
                "settings of its settings.toml"
            )
        self._mix.load_state_dict(state["domains"])
        self._window, self._proportions = state["window"], tuple(state["proportions"])
        self._memory, self._snapshot = state["memory"], None
        self._cache.clear()


def _no_target() -> Any:
    raise DataError("a mixer has no target samples: its domains are all there is")
