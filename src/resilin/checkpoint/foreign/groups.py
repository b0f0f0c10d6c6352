"""Parameter groups and first optimizer states for sources that have none: said by the user, never guessed.

A file of groups is TOML or JSON:

    [[group]]
    parameters = ["*.weight"]     # names, with * for any text; the first group that matches takes a parameter
    lr = 1e-3
    betas = [0.9, 0.95]
    eps = 1e-8
    weight_decay = 0.1

    [[group]]
    parameters = ["*"]
    lr = 1e-3
    ...
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.foreign.rules import read_table
from resilin.checkpoint.foreign.shards import LayoutBuilder, Slice
from resilin.checkpoint.foreign.stored import MODEL, OPTIMIZER, Stored, moment
from resilin.checkpoint.tensor_record import DTYPES
from resilin.layout import Place, merge

ZEROS = Place("tier", "zeros")
_MOMENTS = ("exp_avg", "exp_avg_sq")


def load_groups(path: Path) -> list[dict[str, Any]]:
    """The groups of a file.

    Raises:
        CheckpointError: it is missing, or not such a file.
    """
    table: Any = read_table(path, "groups of parameters")
    groups = table.get("group") if isinstance(table, dict) else None
    if not isinstance(groups, list) or not groups or set(table) != {"group"}:
        raise CheckpointError(
            f"{path}: should hold a list `group` alone, each a table of `parameters`, `lr` and others"
        )
    for number, group in enumerate(groups):
        patterns = group.get("parameters") if isinstance(group, dict) else None
        if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns) or not patterns:
            raise CheckpointError(f"{path}: group {number} should have `parameters`, a list of names")
        if not isinstance(group.get("lr"), (int, float)):
            raise CheckpointError(f"{path}: group {number} should have `lr`, a number")
    return groups


def with_groups(stored: Stored, groups: Sequence[Mapping[str, Any]], zero_states: bool = False) -> Stored:
    """The same checkpoint with these groups in place of its own.

    Args:
        stored: whose parameters with optimizer states are grouped; with `zero_states` any tensor of the model.
        groups: hyper-parameters, and under "parameters" patterns of names; the first that matches takes a parameter.
        zero_states: whether parameters begin with the zeros of AdamW (exp_avg, exp_avg_sq, step).

    Raises:
        CheckpointError: a pattern matches nothing, no group has a parameter that the optimizer has states of, or there
            are no states and none are asked for.
    """
    kept = {name.removeprefix(OPTIMIZER).partition("/")[2] for name in stored.under(OPTIMIZER)}
    if zero_states and kept:
        raise CheckpointError(f"this {stored.title} has optimizer states: --zero-states would take their place")
    if not zero_states and not kept:
        raise CheckpointError(
            f"this {stored.title} has no optimizer states to be grouped; --zero-states begins with those of a new AdamW"
        )
    names = [name.removeprefix(MODEL) for name in stored.under(MODEL)]
    taken: list[list[str]] = [[] for _ in groups]
    used: set[tuple[int, str]] = set()
    for name in names:
        if name not in kept and not zero_states:
            continue
        hits = [(n, p) for n, group in enumerate(groups) for p in group["parameters"] if fnmatchcase(name, p)]
        used.update(hits)
        if hits:
            taken[hits[0][0]].append(name)
        elif name in kept:
            raise CheckpointError(f"no group of --groups has {name!r}, which the optimizer keeps states of")
    for number, group in enumerate(groups):
        idle = [pattern for pattern in group["parameters"] if (number, pattern) not in used]
        if idle or not taken[number]:
            what = repr(idle[0]) if idle else f"group {number}"
            raise CheckpointError(
                f"--groups: {what} matches no parameter" + ("" if idle else " that is not taken before")
            )
    made = [{**group, "parameters": own} for group, own in zip(groups, taken, strict=True)]
    grouped = replace(stored, groups=made, frozen=_without(stored.frozen, taken))
    return _with_zeros(grouped) if zero_states else grouped


def _without(frozen: frozenset[str] | None, taken: Sequence[Sequence[str]]) -> frozenset[str] | None:
    return None if frozen is None else frozen - {name for own in taken for name in own}


def _with_zeros(stored: Stored) -> Stored:
    builder = LayoutBuilder()
    sizes: dict[str, int] = {}
    for group in stored.groups:
        for name in group["parameters"]:
            held = stored.holdings(MODEL + name)
            if not DTYPES[held.dtype].is_floating_point:
                raise CheckpointError(f"--groups: {MODEL + name!r} is {held.dtype}, which no optimizer trains")
            for tensor, shape in [(moment(one, name), held.shape) for one in _MOMENTS] + [(moment("step", name), ())]:
                builder.tensor(tensor, shape, "F32")
                builder.shard(tensor, ZEROS, tensor, Slice.whole(shape), 0)
                sizes[tensor] = torch.Size(shape).numel()

    def read(place: Place, buffer: str) -> Tensor:
        return torch.zeros(sizes[buffer]) if place == ZEROS else stored.read(place, buffer)

    layout = merge(stored.layout, builder.layout("zero states"))
    return replace(stored, layout=layout, read=read)
