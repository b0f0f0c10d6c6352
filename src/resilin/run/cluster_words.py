"""What was decided about the workers of an elastic run, in a line for people."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from resilin.run.events import Cluster


def in_words(event: Cluster) -> str:
    """The line; empty for what need not be told."""
    facts = event.facts
    if event.what == "lost":
        return f"worker {facts['member']} {facts['why']}"
    if event.what == "joined":
        return f"{facts['host']} joins with {facts['workers']} workers"
    if event.what == "homeward":
        return f"{facts['why']}: the run is saved, and ends"
    if event.what == "leaving":
        return f"worker {facts['member']} wants to leave"
    if event.what == "spare":
        return f"worker {facts['member']} waits: {facts['why']}"
    if event.what == "change" and facts["epoch"]:
        members, seconds = facts["members"], facts["halting"] + facts["adopting"]
        who = f"{len(members)} worker{'s' if len(members) != 1 else ''} ({', '.join(map(str, members[:16]))})"
        redone = f", {facts['redone']} of them anew" if facts["redone"] else ""
        kept = f"; {facts['kept']} micro-batches were kept" if facts["kept"] else ""
        return f"{who}{_stages(facts)} go on after {facts['version']} steps{redone}, {seconds:.2f} s later{kept}"
    if event.what == "digest":
        return f"digest of the weights: {facts['weights']}"
    return ""


def _stages(facts: Mapping[str, Any]) -> str:
    """Of a pipeline, how members and blocks are divided."""
    stages, layers = facts["stages"], facts["layers"]
    if len(stages) < 2:
        return ""
    blocks = ", ".join(f"{first}:{end}" for first, end in pairwise(layers))
    return f" in stages of {' + '.join(str(len(stage)) for stage in stages)} with blocks {blocks}"
