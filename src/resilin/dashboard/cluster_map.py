"""Who holds what now, as a grid of stages and replicas: of a view and the launcher's answer, or of settings alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from resilin.cluster.step_cut import StepCut
from resilin.cluster.view import View, ViewError
from resilin.config import SettingsError, parse_settings
from resilin.layout.dealing import deal
from resilin.parallel.degrees import Degrees
from resilin.parallel.errors import ParallelError
from resilin.parallel.settings import ParallelSettings


def runs(numbers: Sequence[int]) -> list[list[int]]:
    """Ascending numbers as [first, last] of each run of neighbours."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return found


def micro_batches(settings: Mapping[str, Any]) -> int:
    """How many a step has; 0: nobody knows."""
    train = settings.get("train", {})
    batch, micro = train.get("batch_size") or 0, train.get("micro_batch_size") or 0
    return -(-batch // micro) if micro else 0


def step_cut(settings: Mapping[str, Any]) -> StepCut:
    """How the steps of an elastic run are cut."""
    train, parallel = settings.get("train", {}), settings.get("parallel", {})
    exact = parallel.get("reduction", "exact") == "exact" and parallel.get("expert", 1) == 1
    return StepCut(train.get("batch_size") or 0, train.get("micro_batch_size") or 0, exact)


def map_of_view(told: Mapping[str, Any], status: Mapping[str, Any] | None, cut: StepCut) -> dict[str, Any]:
    """The map of an elastic run, as JSON values.

    Args:
        told: the view, as JSON values.
        status: the launcher's answer; None: there is none.
        cut: of a step.

    Returns:
        `stages`, each with `layers` and `members`, and `others`: those who wait for a place, or leave.
    """
    try:
        view = View.of_json(told)
    except ViewError as error:
        return {"kind": "unknown", "why": str(error)}
    alive = {one["number"]: one for one in status["members"]} if status is not None else {}
    keeps: dict[int, list[int]] = {}
    for owner, holders in view.holders.items():
        for holder in holders:
            keeps.setdefault(holder, []).append(owner)
    stages, counts = [], cut.counts(view)
    for place, stage in enumerate(view.stages):
        owned: dict[int, list[int]] = {}
        for shard, owner in enumerate(stage.shards):
            owned.setdefault(owner, []).append(shard)
        dealt = [[first, end - 1] if first < end else None for first, end in counts[place]]
        cells = []
        for at, number in enumerate(stage.members):
            one = alive.get(number)
            state = "ended" if status is None else "lost" if one is None else _state(one)
            cells.append(
                {
                    **_doing(number, one),
                    "state": state,
                    "host": view.hosts[number],
                    "part": at % stage.tensor if stage.tensor > 1 else None,
                    "experts": runs(stage.experts_of(at // stage.tensor % stage.sharing)) if stage.experts else None,
                    "micros": dealt[at // stage.tensor],
                    "shards": runs(owned.get(view.team_of(number)[0], [])),
                    "shard_count": len(owned.get(view.team_of(number)[0], [])),
                    "copies_at": list(view.holders[number]),
                    "keeps": keeps.get(number, []),
                }
            )
        layers = [view.layers[place], view.layers[place + 1]] if view.layers else None
        stages.append({"layers": layers, "shards": len(stage.shards), "members": cells})
    inside = set(view.members)
    others = [
        {**_doing(number, one), "state": _state(one), "host": one["host"]}
        for number, one in alive.items()
        if number not in inside
    ]
    micros = max(end for stage in counts for _, end in stage)
    return {"kind": "elastic", "epoch": view.epoch, "micros": micros, "stages": stages, "others": others}


def map_of_starting(status: Mapping[str, Any]) -> dict[str, Any]:
    """The map before there is a view: workers that are getting ready, as the launcher knows them."""
    others = [{**_doing(one["number"], one), "state": _state(one), "host": one["host"]} for one in status["members"]]
    return {"kind": "elastic", "epoch": None, "micros": 0, "stages": [], "others": others}


def _doing(number: int, one: Mapping[str, Any] | None) -> dict[str, Any]:
    one = one or {}
    return {
        "number": number,
        "process": one.get("process"),
        "step": one.get("step"),
        "doing": one.get("doing", ""),
        "seconds": one.get("seconds"),
    }


def _state(one: Mapping[str, Any]) -> str:
    return {"in": "running", "warm": "waiting"}.get(one["state"], str(one["state"]))


def runs_of_micros(micros: int, members: int) -> list[list[int] | None]:
    """By member the first and last of its micro-batches, where nothing is redone; None: it has none."""
    if not micros:
        return [None] * members
    mine: list[list[int]] = [[] for _ in range(members)]
    for micro, owner in enumerate(deal(micros, members)):
        mine[owner].append(micro)
    return [[one[0], one[-1]] if one else None for one in mine]


def map_of_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What settings tell of the layout of a run that is not elastic, as JSON values."""
    try:
        parallel = parse_settings(ParallelSettings, settings.get("parallel", {}), "the run's settings")
        degrees = parallel.degrees(parallel.workers or _product(parallel))
    except (SettingsError, ParallelError) as error:
        return {"kind": "unknown", "why": str(error)}
    columns = degrees.replicate * degrees.data
    dealt = runs_of_micros(micro_batches(settings), columns)
    inner = degrees.context * degrees.tensor
    stages = []
    for stage in range(degrees.pipeline):
        cells = []
        for column in range(columns):
            first = (stage * columns + column) * inner
            cells.append({"ranks": [first, first + inner - 1], "micros": dealt[column]})
        stages.append({"layers": None, "members": cells})
    return {
        "kind": "fixed",
        "degrees": str(degrees),
        "workers": degrees.workers,
        "context": degrees.context,
        "tensor": degrees.tensor,
        "sharding": parallel.sharding,
        "micros": micro_batches(settings),
        "stages": stages,
    }


def _product(parallel: ParallelSettings) -> int:
    """Workers, where other launchers started them and one degree may be automatic: then at least so many."""
    given = (parallel.pipeline, parallel.replicate, parallel.data, parallel.context, parallel.tensor)
    return Degrees(*(1 if value == "auto" else value for value in given)).workers
