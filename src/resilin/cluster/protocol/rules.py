"""How patient the coordinator of an elastic run is."""

from __future__ import annotations

from dataclasses import dataclass

from resilin.cluster.axes import Clocks


@dataclass(frozen=True, slots=True)
class Rules:
    """How patient the coordinator is.

    Attributes:
        members: how many begin together.
        least: below how many the job ends.
        stages: of the pipeline.
        tensor: members of a team, who compute the same micro-batches with a part of every matrix each.
        expert: teams of a stage that have one set of experts between them: so many at least, if there are.
        layers: blocks of each stage, where they are not to follow their costs.
        micros: micro-batches of a step.
        copies: of every member's states in others' memory.
        silence: seconds without a beat after which a member counts as lost.
        hang: seconds that a member may do one thing without waiting for another.
        aborted: changes that nobody wished for, in a row without a step taken, after which the job ends.
        patient: whether others may come for those that are lost before the run begins; else that ends the job.
        failures: members whose own program may fail at one step, before the job ends with that failure.
        clocks: that stages can be set to; None: none.
        micro: slots of a micro-batch.
        slots: of a step; 0: micro-batches are all full.
        keeps_parts: whether what members have computed of a step is kept when others have not computed theirs; else
            all of it is, or nothing.
        even: whether steps are cut into micro-batches for whoever is there.
    """

    members: int
    least: int = 1
    stages: int = 1
    tensor: int = 1
    expert: int = 1
    layers: tuple[int, ...] = ()
    micros: int = 1
    copies: int = 1
    silence: float = 10.0
    hang: float = 600.0
    aborted: int = 10
    patient: bool = False
    failures: int = 2
    clocks: Clocks | None = None
    micro: int = 1
    slots: int = 0
    keeps_parts: bool = True
    even: bool = False
