"""A weight that is both embedding and head, at the two ends of a pipeline: who has it, and who adds up its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from resilin.models.decoder import Decoder
from resilin.parallel.group import Group, make_groups
from resilin.parallel.settings import ParallelSettings
from resilin.parallel.world import World

WEIGHT = "embed.weight"


@dataclass(frozen=True)
class TiedEnds:
    """A weight that is both embedding and head, where a pipeline has these at its two ends.

    Attributes:
        ends: the ranks that have it, of this worker's pipeline: the first stage's, then the last one's.
        in_order: whether the last stage adds up all of its gradient, in the order of one process. It has to keep some
            of the head's part until the embedding's comes; otherwise each end has a sum of its own, and both are added.
    """

    ends: Group
    in_order: bool

    @classmethod
    def of(cls, settings: ParallelSettings, world: World, decoder: Decoder, rank_of: Sequence[int]) -> TiedEnds | None:
        """None where nothing is tied, or there is one stage."""
        if decoder.head is not None or world.axis("pp") == 1:
            return None
        return cls(_ends(world, rank_of), adds_tied_in_order(settings, world, decoder))


def adds_tied_in_order(settings: ParallelSettings, world: World, decoder: Decoder) -> bool:
    """Whether the last stage of a pipeline adds up the whole gradient of a tied weight, in the order of one process."""
    if decoder.head is not None or not decoder.embed.weight.requires_grad or world.axis("pp") == 1:
        return False
    rounds = any(world.axis(axis) > 1 for axis in ("tp", "cp", "ep")) or settings.sharding == "fsdp"
    return settings.reduction == "exact" and not rounds


def _ends(world: World, rank_of: Sequence[int]) -> Group:
    """The ends of this worker's pipeline, who share a tied embedding; where it is at neither, or both, it by itself."""
    lines = world.members("pp")
    at = rank_of[0], rank_of[-1]  # a pipeline in a V has both ends at one rank
    ends = [tuple(line[place] for place in dict.fromkeys(at)) for line in lines]
    others = [(rank,) for line in lines for place, rank in enumerate(line) if place not in at]
    return make_groups([*ends, *others], world.rank, "tied")
