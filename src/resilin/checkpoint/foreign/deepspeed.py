"""Reading DeepSpeed checkpoints of every ZeRO stage, with tensor and pipeline parallelism.

Stages 1 and 2 lay the parameters of a group one after the other and cut the row over W ranks; `param_slice_mappings`
says where a rank has its fragment of each. Stage 3 cuts every parameter on its own into W slots of ceil(n / W), and
lays the slots of a sub-group one after the other, so that a slot's padding counts. States that have the flat buffer's
length are cut like it, whatever their name; single numbers (step) are the same for all parameters of a group.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.foreign.buffers import Gathered, as_tensor, same_everywhere
from resilin.checkpoint.foreign.deepspeed_files import DeepSpeedFiles, open_files
from resilin.checkpoint.foreign.deepspeed_parameters import Parameters
from resilin.checkpoint.foreign.deepspeed_rest import frozen_names, model_rest, other_values
from resilin.checkpoint.foreign.pickles import plain
from resilin.checkpoint.foreign.rules import Union
from resilin.checkpoint.foreign.shards import Slice
from resilin.checkpoint.foreign.stored import Stored, dtype_name, moment, weight

_STAGE_3 = "fp32_flat_groups"


def read_deepspeed(folder: Path, rules: Mapping[str, Any] | None = None, allow: Iterable[str] = ()) -> Stored:
    """Open a DeepSpeed checkpoint.

    Args:
        folder: of one tag, or with a `latest` file.
        rules: how tensor-parallel shards make up parameters (see `rules.py`); None: as the checkpoint itself says.
        allow: classes in its pickles to take as plain data.

    Raises:
        CheckpointError: files are missing, damaged or contradict each other, or a state has no rule; by name.
    """
    files = open_files(folder, allow)
    parameters = Parameters(files, rules)
    gathered, rounded = Gathered(), Gathered()
    groups: list[dict[str, Any]] = []
    if files.optimizers:
        stage_3 = _STAGE_3 in files.optimizers[0, 0][1]["optimizer_state_dict"]
        for tp in range(files.tensor):
            for pp in range(files.pipeline):
                mp = pp * files.tensor + tp
                (_stage_3 if stage_3 else _stage_1_or_2)(gathered, parameters, mp)
        parameters.check_kept()
        groups = _groups(files, parameters, stage_3)
        title = f"DeepSpeed ZeRO-{3 if stage_3 else _stage(files)} ({files.data} data"
    else:
        title = f"DeepSpeed without ZeRO ({files.data} data"
    title += f", {files.tensor} tensor, {files.pipeline} pipeline ranks)"
    ties, unread = model_rest(files, parameters, gathered, rounded)
    other, left_out = other_values(files, gathered, unread)
    parameters.check_used()
    return Stored(
        title,
        gathered.builder.layout(files.folder),
        gathered.read,
        int(files.model(0)[1].get("global_steps") or 0),
        groups,
        other,
        ties,
        averages=parameters.averages,
        rounded=rounded.builder.layout(files.folder),
        read_rounded=rounded.read,
        left_out=left_out,
        unread=unread,
        frozen=frozen_names(files, parameters),
    )


def _stage(files: DeepSpeedFiles) -> int:
    stage = plain(files.optimizers[0, 0][1]["optimizer_state_dict"].get("zero_stage", 1), "zero_stage")
    return int(stage)


def _states(state: Any, group: int, where: str) -> dict[str, Any]:
    table = state.get(group) if isinstance(state, dict) else state[group] if group < len(state) else None
    if table is None:
        raise CheckpointError(f"{where}: has no optimizer state of group {group}")
    return dict(table)


def _stage_1_or_2(gathered: Gathered, parameters: Parameters, mp: int) -> None:
    files = parameters.files
    reached: dict[str, int] = {}
    for dp in range(files.data):
        where, content = files.optimizers[dp, mp]
        state = content["optimizer_state_dict"]
        for key in ("param_slice_mappings", "single_partition_of_fp32_groups", "base_optimizer_state"):
            if key not in state:
                raise CheckpointError(f"{files.folder / where}: lacks {key!r}; DeepSpeed 0.14 and later write it")
        masters = state["single_partition_of_fp32_groups"]
        base = state["base_optimizer_state"]
        for group, fragments in enumerate(state["param_slice_mappings"]):
            if not fragments:
                continue
            padding = state.get("group_paddings", [0] * len(masters))[group]
            rows = {"fp32": masters[group]}
            moments = _states(base["state"] if isinstance(base, dict) else base, group, where)
            lengths = {masters[group].numel(), masters[group].numel() + padding}
            singles = _sort(moments, rows, lengths, where, group)
            for own_name, address in fragments.items():
                name = parameters.whole_name(own_name, group, dp)
                found = parameters.here(name, mp) if name in parameters.all_shapes(mp) else None
                if name not in parameters.all_shapes(mp):
                    raise CheckpointError(f"{files.folder / where}: has a fragment of {name!r}, which is no parameter")
                first = reached.get(name, 0)
                reached[name] = first + int(address.numel)
                if found is None:
                    continue
                flat = first, first + int(address.numel)
                if flat[1] > math.prod(found[2].shape):
                    raise CheckpointError(
                        f"{files.folder / where}: with its fragment of {name!r} the ranks have {flat[1]} of its "
                        f"{math.prod(found[2].shape)} elements: fragments are doubled, or of another checkpoint"
                    )
                _keep(gathered, parameters, found, mp, where, group, rows, singles, int(address.start), flat)


def _stage_3(gathered: Gathered, parameters: Parameters, mp: int) -> None:
    files, ranks = parameters.files, parameters.files.data
    for dp in range(ranks):
        where, content = files.optimizers[dp, mp]
        state = content["optimizer_state_dict"]
        if "optimizer_state_dict" not in state:
            raise CheckpointError(f"{files.folder / where}: has no states of the optimizer (they were swapped out?)")
        masters = state[_STAGE_3]
        if len(masters) != len(parameters.shapes[mp]):
            raise CheckpointError(
                f"{files.folder / where}: has {len(masters)} sub-groups, the model file {len(parameters.shapes[mp])}"
            )
        for group, shapes in enumerate(parameters.shapes[mp]):
            rows = {"fp32": masters[group]}
            moments = _states(state["optimizer_state_dict"]["state"], group, where)
            singles = _sort(moments, rows, {masters[group].numel()}, where, group)
            at = 0
            for name in shapes:
                found = parameters.here(name, mp)
                count = math.prod(shapes[name])
                slot = -(-count // ranks)
                first = min(dp * slot, count)
                flat = first, min(first + slot, count)
                if found is not None:
                    _keep(gathered, parameters, found, mp, where, group, rows, singles, at, flat)
                at += slot  # the slot's padding counts


def _sort(
    moments: Mapping[str, Any], rows: dict[str, Tensor], lengths: set[int], where: str, group: int
) -> dict[str, Tensor]:
    """Put states that lie like the masters into `rows`, and give those that are single numbers.

    Raises:
        CheckpointError: for a state that is neither.
    """
    singles = {}
    for key, value in moments.items():
        if key != "step" and isinstance(value, Tensor) and value.dim() == 1 and value.numel() in lengths:
            rows[key] = value
        elif isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1):
            singles[key] = as_tensor(value)
        else:
            what = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise CheckpointError(
                f"{where}: optimizer state {key!r} of group {group} is {what}: neither as long as the parameters "
                f"({' or '.join(map(str, sorted(lengths)))} elements) nor one number; there is no rule for such a state"
            )
    return singles


def _keep(
    gathered: Gathered,
    parameters: Parameters,
    found: tuple[str, Union, Slice],
    mp: int,
    where: str,
    group: int,
    rows: Mapping[str, Tensor],
    singles: Mapping[str, Tensor],
    at: int,
    flat: tuple[int, int],
) -> None:
    name, union, slice_ = found
    if flat[1] > flat[0]:
        parameters.note(name, mp, {*rows, *singles}, where)
    tp = mp % parameters.files.tensor
    for key, row in rows.items():
        tensor = weight(name) if key == "fp32" else moment(key, name)
        part = parameters.declare(gathered, tensor, union, tp, dtype_name(row, where))
        gathered.keep_flat(part, where, f"{key} of group {group}", row, at, slice_, flat)
    for key, value in singles.items():
        gathered.whole(moment(key, name), where, f"{key} of group {group}", value, copies=None)


def _groups(files: DeepSpeedFiles, parameters: Parameters, stage_3: bool) -> list[dict[str, Any]]:
    tables = []
    for (_, _), (where, content) in files.optimizers.items():
        state = content["optimizer_state_dict"]
        base = state["optimizer_state_dict" if stage_3 else "base_optimizer_state"]
        groups = base["param_groups"] if isinstance(base, dict) else [{} for _ in base]
        tables.append((where, plain(groups, "param_groups")))
    chosen = same_everywhere(tables, "the optimizer's param_groups")
    assert isinstance(chosen, list)
    made = []
    for number, group in enumerate(chosen):
        sub_groups = group.get("params", []) if stage_3 else [number]
        names: dict[str, None] = {}
        for shapes in parameters.shapes:
            for sub_group in sub_groups:
                names.update(dict.fromkeys(shapes[sub_group]))
        made.append({**{k: v for k, v in group.items() if k != "params"}, "parameters": list(names)})
    return made
