"""The trained parameters of a DeepSpeed checkpoint: what each model rank has of them, and what that is of the whole."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.foreign.buffers import Gathered
from resilin.checkpoint.foreign.deepspeed_experts import ExpertNames
from resilin.checkpoint.foreign.deepspeed_files import DeepSpeedFiles
from resilin.checkpoint.foreign.pickles import plain
from resilin.checkpoint.foreign.rules import Rules, Union, unsharded
from resilin.checkpoint.foreign.shards import Slice

TIED = "tied_modules."


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
        self._experts = self._shared_out()
        for number, names in self._experts.items():
            self.shapes[0][number] = names.all_shapes()
        self.rules = self._rules(rules)
        self._unions: dict[str, Union] = {}

    def _shared_out(self) -> dict[int, ExpertNames]:
        """The groups whose parameters are experts, of which a rank has a part."""
        if not self.files.optimizers:
            return {}
        name, content = self.files.optimizers[0, 0]
        counts = content["optimizer_state_dict"].get("partition_count")
        if not isinstance(counts, list):
            return {}
        data, where = self.files.data, self.files.folder / name
        settings = content.get("ds_config")
        consecutive = isinstance(settings, dict) and bool(settings.get("use_data_before_expert_parallelism"))
        return {
            number: ExpertNames(self.shapes[0][number], data // count, count, consecutive, where)
            for number, count in enumerate(counts)
            if count < data
        }

    def whole_name(self, name: str, group: int, dp: int) -> str:
        """What a parameter of a group is called in the whole: ranks number the experts that they have from 0."""
        return self._experts[group].whole(name, dp) if group in self._experts else name

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
