"""Reading DeepSpeed checkpoints of every ZeRO stage, with tensor and pipeline parallelism.

Stages 1 and 2 lay the parameters of a group one after the other and cut the row over W ranks; `param_slice_mappings`
says where a rank has its fragment of each. Stage 3 cuts every parameter on its own into W slots of ceil(n / W), and
lays the slots of a sub-group one after the other, so that a slot's padding counts. States that have the flat buffer's
length are cut like it, whatever their name; single numbers (step) are the same for all parameters of a group.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.foreign.buffers import Gathered, as_tensor, same_everywhere
from resilin.checkpoint.foreign.deepspeed_files import DeepSpeedFiles, open_files
from resilin.checkpoint.foreign.deepspeed_rest import model_rest, other_values
from resilin.checkpoint.foreign.pickles import plain
from resilin.checkpoint.foreign.rules import Rules, Union, unsharded
from resilin.checkpoint.foreign.shards import Slice
from resilin.checkpoint.foreign.stored import Stored, dtype_name, moment, weight

_STAGE_3 = "fp32_flat_groups"
TIED = "tied_modules."


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
    )


def _stage(files: DeepSpeedFiles) -> int:
    stage = plain(files.optimizers[0, 0][1]["optimizer_state_dict"].get("zero_stage", 1), "zero_stage")
    return int(stage)


class Parameters:
    """The trained parameters of a checkpoint: what each model rank has of them.

    Args:
        files: of the checkpoint.
        rules: given by the user; they come before the checkpoint's own.

    Attributes:
        shapes: for each model rank, by group (or sub-group), name -> shape of the shard.
        averages: names of tensors that are averaged, with their parts.
    """

    def __init__(self, files: DeepSpeedFiles, rules: Mapping[str, Any] | None) -> None:
        self.files = files
        self.averages: dict[str, tuple[str, ...]] = {}
        self._kept: dict[tuple[int, str], tuple[set[str], str]] = {}
        self.shapes: list[list[dict[str, tuple[int, ...]]]] = []
        for mp in range(files.pipeline * files.tensor):
            name, content = files.model(mp)
            listed = content.get("param_shapes") or []
            if files.optimizers and not listed:
                raise CheckpointError(f"{files.folder / name}: has no 'param_shapes', which name what ZeRO cut")
            self.shapes.append([{key: tuple(shape) for key, shape in group.items()} for group in listed])
        self.rules = self._rules(rules)
        self._unions: dict[str, Union] = {}

    def _rules(self, given: Mapping[str, Any] | None) -> Rules | None:
        if given is not None:
            return Rules(given, "--rules")
        name, content = self.files.model(0)
        table = content.get("universal_checkpoint_info")
        if table is None and self.files.optimizers:
            name, optimizer = self.files.optimizers[0, 0]
            table = optimizer["optimizer_state_dict"].get("universal_checkpoint_info")
        return (
            None if table is None else Rules(plain(table, "universal_checkpoint_info"), f"{self.files.folder / name}")
        )

    def all_shapes(self, mp: int) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the shard, over all groups of a model rank."""
        return {name: shape for group in self.shapes[mp] for name, shape in group.items()}

    def union(self, name: str, shapes: list[tuple[int, ...]]) -> Union:
        """What the shards of tensor-parallel ranks are of a parameter."""
        if name not in self._unions:
            if len(shapes) == 1 and self.rules is None:
                self._unions[name] = unsharded(shapes[0])
            elif self.rules is None:
                raise CheckpointError(
                    f"{self.files.folder}: {self.files.tensor} tensor-parallel ranks hold parts of {name!r}, and "
                    "nothing says how they make it up (no 'universal_checkpoint_info'): give a table with --rules"
                )
            else:
                self._unions[name] = self.rules.union(name, shapes)
        return self._unions[name]

    def here(self, name: str, mp: int) -> tuple[str, Union, Slice] | None:
        """What a model rank has of a parameter: (tensor, what it is made of, this rank's slice).

        None for a tied copy in a later pipeline stage.
        """
        tensor, pipeline = self.files.tensor, self.files.pipeline
        stage, tp = divmod(mp, tensor)
        if pipeline > 1 and self.rules is not None and stage and self.rules.in_first_stage_only(name):
            return None
        shapes = [self.all_shapes(stage * tensor + rank)[name] for rank in range(tensor)]
        union = self.union(name, shapes)
        if name.startswith(TIED):  # DeepSpeed's own name for what several stages keep equal; the copies are compared
            stages = sum(name in self.all_shapes(other * tensor) for other in range(pipeline))
            union = replace(union, copies=union.copies * stages)
        return name, union, union.slices[tp]

    def declare(self, gathered: Gathered, tensor: str, union: Union, tp: int, dtype: str) -> str:
        """Tell the layout of a tensor; returns the name that this rank's shard goes under."""
        if not union.average:
            gathered.builder.tensor(tensor, union.shape, dtype, union.copies)
            return tensor
        part = f"{tensor} (tensor rank {tp})"
        gathered.builder.tensor(part, union.shape, dtype)
        self.averages[tensor] = tuple(f"{tensor} (tensor rank {rank})" for rank in range(self.files.tensor))
        return part

    def note(self, name: str, mp: int, states: set[str], where: str) -> None:
        """Remember which states a file has of a parameter.

        Raises:
            CheckpointError: another file has other states of it.
        """
        known, other = self._kept.setdefault((mp, name), (states, where))
        if known != states:
            differing = ", ".join(sorted(known ^ states))
            raise CheckpointError(f"{self.files.folder}: of {other} and {where} only one has {differing} of {name!r}")

    def check_kept(self) -> None:
        """That some file has each of the parameters, with the states that the rest of its group has.

        Raises:
            CheckpointError: naming one that none has.
        """
        for mp, groups in enumerate(self.shapes):
            for group in groups:
                first: tuple[str, set[str]] | None = None
                for name, shape in group.items():
                    if not math.prod(shape) or self.here(name, mp) is None:
                        continue
                    states, where = self._kept.get((mp, name), (set(), ""))
                    if not states:
                        raise CheckpointError(
                            f"{self.files.folder}: no file of model rank {mp:02d} has any part of {name!r} "
                            f"{list(shape)}: fragments are missing"
                        )
                    first = first or (name, states)
                    if states != first[1]:
                        differing = ", ".join(sorted(states ^ first[1]))
                        raise CheckpointError(
                            f"{self.files.folder / where}: of {first[0]!r} and {name!r}, which are of one group, only "
                            f"one has {differing}"
                        )

    def check_used(self) -> None:
        """That every rule matched a parameter.

        Raises:
            CheckpointError: naming one that did not.
        """
        unused = self.rules.unused() if self.rules is not None else []
        if unused and self.rules is not None:
            raise CheckpointError(
                f"{self.rules.where}: the pattern {unused[0]!r} matches no parameter: was a module renamed? "
                "Correct the table, or give one with --rules"
            )


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
            for name, address in fragments.items():
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
