"""What is trained, and how a run's work is divided: in the settings that the runtime itself takes."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, TypeVar

from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings
from resilin.parallel.degrees import Degrees
from resilin.parallel.pipeline import Schedule, Split
from resilin.parallel.settings import ParallelSettings
from resilin.parallel.stages import schedule_named, stages_of
from resilin.parallel.world import World
from resilin.planner.cost.parameters import LocalParameters, local_parameters

T = TypeVar("T")

Recompute = Literal["none", "block", "selective"]
OffloadTo = Literal["none", "host", "disk"]


@dataclass(frozen=True)
class Workload:
    """A model and its steps.

    Attributes:
        model: a decoder; its vocabulary is known.
        tokens: of a row.
        batch: rows of a step, over all workers.
    """

    model: DecoderSettings
    tokens: int
    batch: int

    known: dict[tuple[Hashable, ...], Any] = field(default_factory=dict, init=False, compare=False, repr=False)
    """What was found out of the model before: many arrangements ask for the same."""

    @property
    def step_tokens(self) -> int:
        """Tokens of a step."""
        return self.tokens * self.batch

    def with_batch(self, batch: int) -> Workload:
        """The same model with another number of rows in a step."""
        other = replace(self, batch=batch)
        object.__setattr__(other, "known", self.known)
        return other

    def once(self, key: tuple[Hashable, ...], make: Callable[[], T]) -> T:
        """What `make` gives, made once for a key."""
        if key not in self.known:
            self.known[key] = make()
        found: T = self.known[key]
        return found

    def kind_of(self, layer: int) -> Hashable:
        """The same for blocks that cost the same."""
        sizes = self.model.layer_sizes[layer] if self.model.layer_sizes else None
        return sizes, self.model.window_of(layer), self.model.is_moe_layer(layer)

    @property
    def outline(self) -> Decoder:
        """The model on the meta device."""
        return self.once(("outline",), lambda: Decoder(self.model, seed=None, device="meta"))

    def local(self, tensor: int, expert: int) -> LocalParameters:
        """Parameters of the fullest of so many ranks; see `local_parameters`."""
        return self.once(("local", tensor, expert), lambda: local_parameters(self.outline, tensor, expert))


@dataclass(frozen=True)
class Arrangement:
    """One way to divide the work.

    Attributes:
        parallel: settings with every degree said.
        micro: rows of a micro-batch.
        recompute: what of the activations is computed again.
        compute: the format of products.
        offload: where the inputs of recomputed blocks wait.
        states_divided: whether the optimizer's states are divided among data workers (ZeRO-1); Resilin always does,
            some published runs do not.
    """

    parallel: ParallelSettings
    micro: int
    recompute: Recompute = "none"
    compute: str = "bf16"
    offload: OffloadTo = "none"
    states_divided: bool = True

    @cached_property
    def degrees(self) -> Degrees:
        """Of parallelism."""
        p = self.parallel
        pipeline, replicate, data, context, tensor = (
            _number(degree) for degree in (p.pipeline, p.replicate, p.data, p.context, p.tensor)
        )
        return Degrees(pipeline, replicate, data, context, tensor, p.expert)

    @property
    def replicas(self) -> int:
        """Workers that compute different rows."""
        return self.degrees.data * self.degrees.replicate

    def micros(self, work: Workload) -> int:
        """Micro-batches of a data worker in a step; the last may be smaller."""
        return -(-work.batch // (self.replicas * self.micro))

    def stages(self, work: Workload) -> tuple[Split, tuple[int, ...]]:
        """The blocks of every stage and each stage's rank, as the runtime divides them.

        Raises:
            ParallelError: they cannot be divided so.
        """
        if self.degrees.pipeline == 1:
            return Split((0, work.model.layers)), (0,)
        p = self.parallel
        key = ("stages", self.degrees.pipeline, p.chunks, p.schedule, p.layers, p.sharding)
        return work.once(key, lambda: stages_of(p, World(Degrees(self.degrees.pipeline)), work.outline, work.tokens))

    def schedule(self, work: Workload) -> Schedule:
        """The order of a pipeline's passes, as the runtime makes it.

        Raises:
            ParallelError: there is none for these numbers.
        """
        ranks, stages = self.degrees.pipeline, len(self.stages(work)[1])
        return schedule_named(self.parallel.schedule, stages, ranks, self.micros(work))

    def __str__(self) -> str:
        d = self.degrees
        named = (("data", d.replicate * d.data), ("tensor", d.tensor), ("pipeline", d.pipeline), ("context", d.context))
        said = [f"{name} {size}" for name, size in (*named, ("expert", d.expert)) if size > 1] or ["one worker"]
        if d.pipeline > 1:
            chunks = f" x{self.parallel.chunks}" if self.parallel.chunks > 1 else ""
            said.append(f"{self.parallel.schedule}{chunks}")
        if self.replicas * d.context > 1:
            said.append(self.parallel.sharding)
        said.append(f"micro {self.micro}")
        if self.recompute != "none":
            said.append(f"recompute {self.recompute}")
        if self.offload != "none":
            said.append(f"inputs to {self.offload}")
        return ", ".join(said)


def _number(degree: int | str) -> int:
    if isinstance(degree, str):
        raise ValueError("an arrangement has every degree as a number, not auto")
    return degree
