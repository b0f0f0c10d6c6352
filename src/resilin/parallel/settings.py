"""`[parallel]`: how a run's work is divided over workers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from resilin.config import Settings
from resilin.parallel.degrees import AXES, Degrees, solve

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Degree = Positive | Literal["auto"]


class ParallelSettings(Settings):
    """Degrees of parallelism. Their product is the number of workers; one of them may be auto."""

    workers: Count = 0
    """Processes that this command starts on this machine; 0: none, it is a worker itself (the only one, or one of those
    that torchrun or Slurm started)."""
    data: Degree = "auto"
    """Workers among which the slots of a step are divided."""
    tensor: Degree = 1
    """Workers among which each matrix is divided."""
    pipeline: Degree = 1
    """Workers among which the blocks are divided, in order."""
    context: Degree = 1
    """Workers among which each sequence is divided."""
    expert: Positive = 1
    """Workers among which the experts are divided: those of data and context."""
    replicate: Degree = 1
    """sharding = fsdp: copies of the sharded model (HSDP)."""
    sharding: Literal["zero1", "fsdp"] = "zero1"
    """zero1: every worker has all weights of its part of the model, and updates a share of them. fsdp: it keeps a share
    of the weights too, and gathers the others block by block (torch's fully_shard)."""
    gather: Literal["auto", "block", "step"] = "auto"
    """sharding = fsdp: block: a block's weights are gathered for each pass of a micro-batch and given up after it, and
    gradients are summed then; step: weights are gathered once a step and gradients summed once, so that both are there
    in whole while it lasts. auto: step in a pipeline, block elsewhere."""
    reduction: Literal["exact", "fast"] = "exact"
    """exact: gradients are added in the order of one process, so that data and pipeline parallelism do not change a
    bit; fast: each worker adds its own first."""
    sequence: bool = True
    """tensor > 1: between blocks, divide sequences too."""
    context_kind: Literal["ulysses", "ring"] = "ulysses"
    """How attention sees whole sequences: heads and tokens change places (all-to-all), or keys and values go round."""
    schedule: str = "1f1b"
    """The order of forward and backward passes in a pipeline: gpipe, 1f1b, interleaved, zb-h1, ... or the path of a
    .csv with one line of actions for each worker."""
    chunks: Positive = 1
    """Stages that each worker of the pipeline has; more than one needs an interleaved schedule."""
    layers: tuple[Count, ...] = ()
    """Blocks of each stage of the pipeline, in order; empty: shared so that the slowest stage has the least to compute,
    the head counted."""
    trace: Count = 0
    """The step whose passes through the pipeline are measured, and written to `workers/schedule.csv` in the run's
    folder, for `resilin layout schedule --measured`; 0: none."""
    timeout: Annotated[float, Field(gt=0)] = 300.0
    """Seconds that a worker waits for another one before it gives up."""

    @model_validator(mode="after")
    def _at_most_one_auto(self) -> ParallelSettings:
        auto = [name for name in AXES if getattr(self, name) == "auto"]
        if len(auto) > 1:
            raise ValueError(f"{' and '.join(auto)} are both auto; one degree may be")
        if self.replicate != 1 and self.sharding != "fsdp":
            raise ValueError("replicate has a meaning with sharding = 'fsdp' only; use data")
        if self.gather != "auto" and self.sharding != "fsdp":
            raise ValueError("gather has a meaning with sharding = 'fsdp' only: zero1 keeps all weights")
        return self

    def gathers_by_step(self, pipeline: int) -> bool:
        """Whether FSDP keeps what it has gathered for all of a step's micro-batches, in a pipeline of so many ranks."""
        return self.gather == "step" or (self.gather == "auto" and pipeline > 1)

    def degrees(self, workers: int) -> Degrees:
        """The degrees for so many workers.

        Raises:
            ParallelError: their product is another.
        """
        auto = next((name for name in AXES if getattr(self, name) == "auto"), None)
        given = {name: getattr(self, name) for name in AXES if name != auto}
        if auto == "data":
            given["data"] = self.expert  # stands in for the degree that is looked for
        return solve(workers, auto, Degrees(**given, expert=self.expert))
