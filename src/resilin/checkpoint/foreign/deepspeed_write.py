"""Writing the folder that a DeepSpeed engine of a given ZeRO stage and number of data-parallel ranks saves itself.

Every rank's flat rows are mapped files that are filled tensor by tensor: memory holds one whole tensor, and of the
rows no more than the disk cache does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resilin.checkpoint.atomic import write_file
from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.foreign.deepspeed_objects import fragment_address, loss_scaler, no_scaling
from resilin.checkpoint.foreign.deepspeed_rest import KEPT_OF_OPTIMIZER
from resilin.checkpoint.foreign.deepspeed_states import (
    VERSION,
    Trained,
    float32,
    hyper_parameters,
    model_states,
    trained_of,
)
from resilin.checkpoint.foreign.mapped import mapped_zeros
from resilin.checkpoint.foreign.pickle_write import save_pickle
from resilin.checkpoint.foreign.stored import MODEL, Stored, same_bits, weight
from resilin.checkpoint.foreign.zero_rows import Rows, group_rows, slot_rows, sub_group_rows
from resilin.checkpoint.tensor_record import DTYPES


@dataclass(frozen=True)
class Zero:
    """The engine that a folder is for.

    Attributes:
        stage: of ZeRO, 1 to 3.
        ranks: data-parallel ones.
        sub_group_size: DeepSpeed's setting of that name (stage 3).
        dtype: that the model computes in; None: as the source says, or its weights are.
    """

    stage: int = 1
    ranks: int = 1
    sub_group_size: int = 1_000_000_000
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.stage not in (1, 2, 3):
            raise CheckpointError(f"there is no ZeRO stage {self.stage}: 1, 2 or 3 (a 'universal' folder is for any)")
        if self.ranks < 1 or self.sub_group_size < 1:
            raise CheckpointError("a ZeRO folder is of one data-parallel rank or more, with sub-groups of one element")


def write_deepspeed(stored: Stored, target: Path, zero: Zero) -> int:
    """Write `TARGET/global_stepN/` with the files of every rank, and `latest`, which comes last.

    Returns:
        Bytes written.

    Raises:
        CheckpointError: the source has no optimizer or no groups, a state has no place in flat rows, parameters of one
            group are at different steps, or it is not known which untrained tensors are parameters (stage 3).
    """
    trained = trained_of(stored, "a ZeRO folder")
    tag = f"global_step{stored.step or 0}"
    writer = _Writer(stored, target.parent, zero, trained)
    writer.fill()
    folder = target / tag
    folder.mkdir()
    written = writer.model_files(folder) + writer.optimizer_files(folder)
    write_file(target / "latest", tag)
    return written


class _Writer:
    """What the files of all ranks are made of."""

    def __init__(self, stored: Stored, scratch: Path, zero: Zero, trained: Trained) -> None:
        self.stored, self.scratch, self.zero, self.trained = stored, scratch, zero, trained
        self.dtype = zero.dtype or _precision(stored, trained.names)
        self.rows = self._rows()
        self.states = [self._states(rows) for rows in self.rows]
        self.singles: list[dict[str, Tensor]] = [{} for _ in self.rows]
        self.flat: list[list[dict[str, Tensor]]] = [[] for _ in self.rows]  # (row, rank) -> state -> elements
        self.module: dict[str, Tensor] = {}
        self.fragments: list[dict[str, Tensor]] = [{} for _ in range(zero.ranks)]  # of frozen parameters

    def _rows(self) -> list[Rows]:
        found: list[Rows] = []
        for number, group in enumerate(self.trained.groups):
            shapes = {name: self.stored.holdings(weight(name)).shape for name in group}
            empty = [name for name, shape in shapes.items() if not math.prod(shape)]
            if empty or not shapes:
                raise CheckpointError(
                    f"parameter group {number} has "
                    + (f"{empty[0]!r}, which has no elements" if empty else "no parameters")
                    + ": DeepSpeed trains no such; leave it out of the optimizer"
                )
            if self.zero.stage == 3:
                found += sub_group_rows(number, shapes, self.zero.ranks, self.zero.sub_group_size)
            else:
                found.append(group_rows(number, shapes, self.zero.ranks))
        return found

    def _states(self, rows: Rows) -> dict[str, bool]:
        """State -> whether it is a row (or one number), the same for all parameters of the rows.

        Raises:
            CheckpointError: they have different states, or one of another shape.
        """
        chosen: dict[str, bool] | None = None
        first = next(iter(rows.shapes))
        for name, shape in rows.shapes.items():
            made = {}
            for state, tensor in self.trained.moments.get(name, {}).items():
                held = self.stored.holdings(tensor).shape
                single = math.prod(held) == 1 and (state == "step" or held != shape)
                if not single and held != shape:
                    raise CheckpointError(
                        f"{tensor!r} is {list(held)}, neither as its parameter {list(shape)} nor one number: there is "
                        "no place for it in ZeRO's flat rows"
                    )
                made[state] = not single
            if chosen is not None and made != chosen:
                differing = min(set(made.items()) ^ set(chosen.items()))[0]
                raise CheckpointError(
                    f"of {first!r} and {name!r}, which are of one parameter group, only one has {differing}: ZeRO "
                    "keeps the states of a group in one row"
                )
            chosen = made
        return chosen or {}

    def fill(self) -> None:
        """Put every tensor where the ranks have it."""
        ranks = range(self.zero.ranks)
        for rows, states, singles, flat in zip(self.rows, self.states, self.singles, self.flat, strict=True):
            wide = ["fp32", *(state for state, is_row in states.items() if is_row)]
            flat += [{state: self._zeros((rows.size,), torch.float32) for state in wide} for _ in ranks]
            for name in rows.shapes:
                tensors = {"fp32": weight(name), **self.trained.moments.get(name, {})}
                for state, tensor in tensors.items():
                    value = self.stored.tensor(tensor)
                    if not (state == "fp32" or states[state]):
                        self._single(singles, state, value, tensor)
                        continue
                    value = float32(value, tensor)
                    rows.scatter(name, value, [flat[rank][state] for rank in ranks])
                    if state == "fp32":
                        self.module[name] = self._copy(value)
        self._untrained()

    def _single(self, singles: dict[str, Tensor], state: str, value: Tensor, name: str) -> None:
        known = singles.setdefault(state, value.reshape(()).clone())
        if not same_bits(known, value.reshape(())):
            raise CheckpointError(
                f"{name!r} is {value.item()}, and {known.item()} for others of its parameter group: ZeRO keeps one for "
                "all of them"
            )

    def _zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return mapped_zeros(self.scratch, shape, dtype)

    def _copy(self, value: Tensor) -> Tensor:
        """What the model file has of a trained parameter: rounded; in stage 3 an empty one."""
        if self.zero.stage == 3:
            return torch.empty(0, dtype=self.dtype)
        made = self._zeros(tuple(value.shape), self.dtype)
        made.copy_(value)
        return made

    def _untrained(self) -> None:
        """Frozen parameters (cut over the ranks in stage 3) and buffers, as they are."""
        frozen = self.frozen
        for tensor in self.stored.under(MODEL):
            name = tensor.removeprefix(MODEL)
            if name in self.module:
                continue
            value = self.stored.tensor(tensor)
            if name in frozen and self.zero.stage == 3:
                rows = slot_rows(0, {name: tuple(value.shape)}, self.zero.ranks)
                for own in self.fragments:
                    own[name] = self._zeros((rows.size,), value.dtype)
                rows.scatter(name, value, [own[name] for own in self.fragments])
                self.module[name] = torch.empty(0, dtype=value.dtype)
                continue
            self.module[name] = self._zeros(tuple(value.shape), value.dtype)
            self.module[name].copy_(value)
            if name in frozen:
                for own in self.fragments:
                    own[name] = self.module[name]
        for alias, name in self.stored.tied(MODEL).items():
            self.module[alias.removeprefix(MODEL)] = self.module[name.removeprefix(MODEL)]

    @cached_property
    def frozen(self) -> frozenset[str]:
        """Parameters that are not trained.

        Raises:
            CheckpointError: stage 3 has to tell them from buffers, and the source does not.
        """
        trained = set(self.trained.names)
        rest = [n.removeprefix(MODEL) for n in self.stored.under(MODEL) if n.removeprefix(MODEL) not in trained]
        if self.stored.frozen is None and rest and self.zero.stage == 3:
            raise CheckpointError(
                f"{rest[0]!r} is not trained, and this {self.stored.title} does not say whether it is a frozen "
                "parameter, which stage 3 cuts over its ranks, or a buffer. Name the frozen ones: --frozen PATTERN, or "
                "--frozen '' where there are none"
            )
        return frozenset(self.stored.frozen or ()) & frozenset(rest)

    def model_files(self, folder: Path) -> int:
        """The model's files: one, or with stage 3 one for each rank."""
        shapes = [dict(rows.shapes) for rows in self.rows]
        written = 0
        for rank in range(self.zero.ranks if self.zero.stage == 3 else 1):
            of_rank = f"zero_pp_rank_{rank}_" if self.zero.stage == 3 else ""
            frozen = None if self.stored.frozen is None else self.fragments[rank]
            apart = (*KEPT_OF_OPTIMIZER, "dtype")
            content = model_states(self.stored, self.module, shapes, self.zero.ranks, frozen, apart)
            written += save_pickle(folder / f"{of_rank}mp_rank_00_model_states.pt", content)
            self.fragments[rank].clear()
        self.module.clear()
        return written

    def optimizer_files(self, folder: Path) -> int:
        """The optimizer's files, one for each rank; a rank's rows are given up when they are written."""
        prefix = "bf16_" if self.dtype == torch.bfloat16 else ""
        written = 0
        for rank in range(self.zero.ranks):
            content = {
                "optimizer_state_dict": self._stage_3(rank) if self.zero.stage == 3 else self._stage_1_or_2(rank),
                "ds_config": {},
                "ds_version": VERSION,
            }
            written += save_pickle(folder / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", content)
            for ranks in self.flat:
                ranks[rank].clear()
        return written

    def _base(self, rank: int) -> dict[str, Any]:
        """The state dict of the optimizer that a rank has of flat rows."""
        state = {
            number: {
                **{state: tensor.clone() for state, tensor in self.singles[number].items()},
                **{state: row for state, row in self.flat[number][rank].items() if state != "fp32"},
            }
            for number in range(len(self.rows))
        }
        params: list[list[int]] = [[] for _ in self.stored.groups]
        for number, rows in enumerate(self.rows):
            params[rows.group].append(number)
        groups = [hyper_parameters(group, own) for group, own in zip(self.stored.groups, params, strict=True)]
        return {"state": state, "param_groups": groups}

    def _masters(self, rank: int) -> list[Tensor]:
        """Without the padding at a row's end."""
        return [
            flat[rank]["fp32"][: rows.size - rows.paddings[rank]]
            for rows, flat in zip(self.rows, self.flat, strict=True)
        ]

    def _stage_1_or_2(self, rank: int) -> dict[str, Any]:
        own = self.stored.other.get("deepspeed", {})
        scaler = loss_scaler(own)
        return {
            **({"loss_scaler": scaler} if scaler is not None else {}),
            **{key: own[key] for key in KEPT_OF_OPTIMIZER if key in own and key != "loss_scaler"},
            "base_optimizer_state": self._base(rank),
            "single_partition_of_fp32_groups": self._masters(rank),
            "zero_stage": self.zero.stage,
            "group_paddings": [rows.paddings[rank] for rows in self.rows],
            "param_alignment_paddings": [[0] * len(rows.shapes) for rows in self.rows],
            "partition_count": [self.zero.ranks] * len(self.rows),
            "ds_version": VERSION,
            "param_slice_mappings": [
                {
                    name: fragment_address(*address)
                    for name in rows.shapes
                    if (address := rows.address(name, rank)) is not None
                }
                for rows in self.rows
            ],
        }

    def _stage_3(self, rank: int) -> dict[str, Any]:
        own = self.stored.other.get("deepspeed", {})
        scaler = loss_scaler(own)
        if scaler is None and self.dtype == torch.float16:
            raise CheckpointError(
                f"stage 3 of DeepSpeed takes its loss scaler from the folder, and this {self.stored.title} has "
                "none for float16: write stage 1 or 2, whose engines keep the one of their settings, or 'universal'"
            )
        return {
            "zero_stage": 3,
            "loss_scaler": scaler or no_scaling(),
            "dynamic_loss_scale": own.get("dynamic_loss_scale", False),
            "overflow": own.get("overflow", False),
            "partition_count": self.zero.ranks,
            "optimizer_state_dict": self._base(rank),
            "fp32_flat_groups": self._masters(rank),
            **({"clip_grad": own["clip_grad"]} if "clip_grad" in own else {}),
        }


def _precision(stored: Stored, names: list[str]) -> torch.dtype:
    """What the model computes in: as the source says, or the weights are if all are of a low precision."""
    told = stored.other.get("deepspeed", {}).get("dtype")
    if told is not None:
        return getattr(torch, told)  # type: ignore[no-any-return]
    kinds = {DTYPES[stored.holdings(weight(name)).dtype] for name in names}
    return kinds.pop() if kinds in ({torch.bfloat16}, {torch.float16}) else torch.float32
