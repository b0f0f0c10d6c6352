"""After a change in the middle of a step that is all computed: an engine that ends it with what others have of it."""

from __future__ import annotations

from resilin.cluster.protocol.messages import Adopt
from resilin.cluster.view_blueprint import ViewBlueprint
from resilin.parallel.handing import Handing
from resilin.parallel.workers import Workers
from resilin.run.elastic_dealing import moving
from resilin.run.elastic_moves import experts_between, moved_between


def hand_on(engine: Workers, change: Adopt, before: ViewBlueprint, after: ViewBlueprint) -> None:
    """Blocks, experts or stages have others who own them now: gradients follow them, and are kept nowhere else.

    Args:
        engine: of the next view; it has what this worker has kept.
        change: to that view.
        before: the view in which the step was computed.
        after: the next one.
    """
    rank, stage, kept = engine.world.rank, engine.stage, engine.kept
    moved = moved_between(before, after, change.kept, whole=not engine.exact) if change.handed else []
    mine = [kept.sums(one.name) if rank in one.givers and kept is not None else [] for one in moved]
    for one, places in experts_between(before, after, change.kept):
        sums = kept.sums(one.name) if rank in one.givers and kept is not None else []
        mine.append([None if each is None else each[places[rank]] for each in sums])
        moved.append(one)
    if kept is not None:
        given = change.handed and stage in moving(change)
        engine.kept = kept.given(engine.collected) if given else kept.without(after.experts)
    like = next(iter(engine.trained.values())).parameter.detach()
    engine.handing = Handing(change.version, engine.world.everyone, moved, mine, like)
