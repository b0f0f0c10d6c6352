"""Who is about to get something reads the states that it will own, and weights, while a step is computed.

A newcomer does so while the others compute, a member that gets blocks beside its own work. All come out once their
micro-batches are done, and end that step in the next view: then nobody has waited for what was read. What is read here
is what `resilin.cluster.restore` will ask for then; if it asks for anything else, it reads that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from resilin.checkpoint.tensor_record import DTYPES
from resilin.cluster.restore import Ahead, Need, Owners, Piece, Restorer, pieces_held, pieces_owned


def read_ahead(
    before: Sequence[Owners],
    after: Sequence[Owners],
    member: int,
    weights: str,
    restorer: Restorer,
    lacking: Sequence[str] | None = None,
) -> Ahead:
    """Read all that a member needs of others' copies.

    Args:
        before: who owns what of all parameters.
        after: of those that the member will have.
        member: whose place it will be.
        weights: the path of weights in copies.
        restorer: of the copies.
        lacking: names of the parameters whose weights it does not have; None: it has nothing yet.

    Raises:
        CopyError, PeerError: they cannot be read (yet).
    """
    counts = {
        (name, owner): sum(run.size for run in each.ownership.runs_of(number, place))
        for each in before
        for number, name in enumerate(each.names)
        for place, owner in enumerate(each.members)
    }

    def need(name: str, path: str, pieces: Sequence[Piece]) -> Need:
        slot = restorer.slots(pieces[0].owner)[name, path]
        values = math.prod(slot.shape)
        if values == counts.get((name, pieces[0].owner)):  # of elements; else one for all, such as a count of steps
            values = max(piece.at + piece.values for piece in pieces)
        return Need(name, path, torch.empty(values, dtype=DTYPES[slot.dtype]), pieces)

    names = [name for each in after for name in each.names] if lacking is None else lacking
    needs = [need(name, weights, pieces) for name, pieces in pieces_held(before, after, names, member).items()]
    for name, pieces in pieces_owned(before, after, member).items():
        paths = [path for parameter, path in restorer.slots(pieces[0].owner) if parameter == name and path != weights]
        needs += [need(name, path, pieces) for path in paths]
    if lacking is not None:
        return restorer.fetch(needs)
    first = before[0].members[0]
    shared = [
        (path, math.prod(slot.shape)) for (parameter, path), slot in restorer.slots(first).items() if not parameter
    ]
    needs += [need("", path, [Piece(first, 0, 0, values)]) for path, values in shared]
    return restorer.fetch(needs)
