"""A checkpoint of any tool, opened: which tensors there are, where their elements lie, and everything else.

Names of tensors:
    model/NAME               a parameter (the fp32 master where there is one) or buffer
    optimizer/STATE/NAME     a state that the optimizer keeps of it: exp_avg, exp_avg_sq, step, momentum_buffer, ...
    files/NAME               a file that goes with the model (config.json, the tokenizer), as bytes
    other/...                any other tensor, by the keys that lead to it in `other`
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resilin.checkpoint.errors import CheckpointError, DamagedError
from resilin.checkpoint.tensor_record import DTYPE_NAMES, DTYPES
from resilin.layout import Holding, Holdings, Layout, LayoutError, Place, Region, Span, plan

MODEL, OPTIMIZER, FILES, OTHER = "model/", "optimizer/", "files/", "other/"
MEMORY = Place("tier", "memory")
Read = Callable[[Place, str], Tensor]


def weight(name: str) -> str:
    """The tensor of a parameter or buffer."""
    return MODEL + name


def moment(state: str, name: str) -> str:
    """The tensor of what the optimizer keeps of a parameter."""
    if "/" in state:
        raise CheckpointError(f"optimizer state {state!r} of parameter {name!r}: a state's name cannot have a slash")
    return f"{OPTIMIZER}{state}/{name}"


def dtype_name(tensor: Tensor, where: object) -> str:
    """The name of a tensor's dtype in safetensors.

    Raises:
        CheckpointError: it has none.
    """
    if tensor.dtype not in DTYPE_NAMES:
        raise CheckpointError(f"{where}: has dtype {tensor.dtype}, which safetensors has no name for")
    return DTYPE_NAMES[tensor.dtype]


@dataclass(frozen=True)
class LeftOut:
    """Something of the source that the target does not get, and why."""

    name: str
    why: str


@dataclass(frozen=True, eq=False)
class Stored:
    """An opened checkpoint. Nothing but its small parts has been read yet.

    Attributes:
        title: what it is, such as "DeepSpeed ZeRO-2 (4 ranks)".
        layout: where the elements of every tensor lie; places are files, or parts of the process' memory.
        read: a buffer of a place as a row of elements; mapped where that is possible.
        step: optimizer steps taken; None: not known.
        groups: of the optimizer: hyper-parameters, and the names of the group's parameters under "parameters".
        other: everything else, a tree of dicts, lists and JSON values; a tensor in it is `{"$tensor": name}`.
        ties: further names of tensors: name -> the name it is stored under.
        averages: tensors that are the mean of others: name -> those of the layout.
        rounded: tensors of lower precision that are only the rounded ones of the same name here, to be compared.
        read_rounded: as `read`, of `rounded`.
        left_out: what was read and is not passed on.
        unread: what there is no rule for: name -> why. It must be left out by the user, or told (`with_ties`).
        frozen: names (without `model/`) of parameters that are not trained; None: they are not told from buffers.
    """

    title: str
    layout: Layout
    read: Read
    step: int | None = None
    groups: list[dict[str, Any]] = field(default_factory=list)
    other: dict[str, Any] = field(default_factory=dict)
    ties: Mapping[str, str] = field(default_factory=dict)
    averages: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rounded: Layout | None = None
    read_rounded: Read | None = None
    left_out: tuple[LeftOut, ...] = ()
    unread: Mapping[str, str] = field(default_factory=dict)
    frozen: frozenset[str] | None = None

    @property
    def names(self) -> list[str]:
        """Every tensor that is stored, without its further names."""
        parts = {part for names in self.averages.values() for part in names}
        return [*(name for name in self.layout.tensors if name not in parts), *self.averages]

    def holdings(self, name: str) -> Holdings:
        """Shape, dtype and places of a tensor."""
        return self.layout.tensors[self.averages[name][0] if name in self.averages else name]

    def under(self, prefix: str) -> list[str]:
        """The stored tensors of one kind, such as `MODEL`."""
        return [name for name in self.names if name.startswith(prefix)]

    def tied(self, prefix: str) -> dict[str, str]:
        """The further names of one kind."""
        return {alias: name for alias, name in self.ties.items() if alias.startswith(prefix)}

    def bytes(self, name: str) -> int:
        """Size of a tensor."""
        held = self.holdings(name)
        return held.numel * held.item_bytes

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, put together from its shards; each copy of an element must equal the others.

        Args:
            name: a stored one. Where it lies in one piece in a mapped file, it is a view of that file.

        Raises:
            CheckpointError: when copies differ, a file is cut short, or a rounded copy is not the rounded tensor.
        """
        if name in self.averages:
            parts = [self.tensor(part) for part in self.averages[name]]
            return sum(parts[1:], start=parts[0].clone()) / len(parts)
        held = self.layout.tensors[name]
        whole = self._one_piece(name, held)
        if whole is None:
            whole = torch.empty(held.shape, dtype=DTYPES[held.dtype])
            self._fill(name, whole)
        self._compare_copies(name, whole)
        if self.rounded is not None and name in self.rounded.tensors:
            self._compare_rounded(name, whole)
        return whole

    def _part(self, tensor: str, span: Span | Holding, sizes: tuple[int, ...], read: Read | None = None) -> Tensor:
        place, buffer = span.place, span.buffer
        row = (read or self.read)(place, buffer)
        last = span.start + sum((size - 1) * stride for size, stride in zip(sizes, span.strides, strict=True))
        if all(sizes) and not 0 <= span.start <= last < row.numel():
            raise DamagedError(
                f"{place}: tensor {tensor!r} should lie at elements {span.start} to {last} of {buffer!r}, which has "
                f"{row.numel()}; the file was cut, or its index is of another one"
            )
        return row.as_strided(sizes, span.strides, row.storage_offset() + span.start)

    def _one_piece(self, name: str, held: Holdings) -> Tensor | None:
        whole = np.flatnonzero(held.boxes.numel == held.numel) if held.numel else np.zeros(0, dtype=np.int64)
        if not len(whole):
            return None
        one = list(self.layout.select([name]))[int(whole[0])]
        found = self._part(name, one, held.shape)
        _check_dtype(found, held, name, one.place)
        return found if found.is_contiguous() else None

    def _fill(self, name: str, whole: Tensor) -> None:
        held = self.layout.tensors[name]
        wanted = Layout.of({name: (held.shape, held.dtype)}, [(name, MEMORY, Region.whole(held.shape))])
        try:
            moves = plan(self.layout, wanted, [name]) if held.numel else ()
        except LayoutError as error:
            raise CheckpointError(str(error)) from None
        for move in moves:
            part = self._part(name, move.source, move.region.sizes)
            _check_dtype(part, held, name, move.source.place)
            whole[move.region.slices] = part

    def _compare_copies(self, name: str, whole: Tensor) -> None:
        held = self.layout.tensors[name]
        if held.copies == 1 or int(held.boxes.numel.sum()) <= held.numel:
            return
        for one in self.layout.select([name]):
            part = self._part(name, one, one.region.sizes)
            if not same_bits(part, whole[one.region.slices]):
                raise CheckpointError(
                    f"{one.place}: holds other values of {name!r} {one.region} than the first file that has it; copies "
                    "should be equal. If they may differ (by rounding), give a rule that averages them"
                )

    def _compare_rounded(self, name: str, whole: Tensor) -> None:
        assert self.rounded is not None
        for one in self.rounded.select([name]):
            part = self._part(name, one, one.region.sizes, self.read_rounded)
            if not same_bits(part, whole[one.region.slices].to(part.dtype)):
                raise CheckpointError(
                    f"{one.place}: its {part.dtype} copy of {name!r} {one.region} is not the {whole.dtype} master, "
                    "rounded: one of them is of another step. Leave the copies out with --leave-out 'rounded/*' to "
                    "take the masters"
                )

    def without(self, patterns: Iterable[str]) -> Stored:
        """The same checkpoint with some things left out, and listed.

        Args:
            patterns: of names, with `*` for any text: tensors, "optimizer/groups", "other/KEY", "rounded/*".

        Raises:
            CheckpointError: for a pattern that matches nothing.
        """
        patterns = list(patterns)
        if not patterns:
            return self
        used: set[str] = set()

        def out(name: str) -> bool:
            hits = [pattern for pattern in patterns if fnmatchcase(name, pattern)]
            used.update(hits)
            return bool(hits)

        gone = [name for name in self.names if out(name)]
        tied = [alias for alias in self.ties if out(alias) or self.ties[alias] in gone]
        groups = bool(self.groups) and out("optimizer/groups")
        keys = [key for key in self.other if out(OTHER + key)]
        unread = [name for name in self.unread if out(name)]
        copies = [] if self.rounded is None else [f"rounded/{n.removeprefix(MODEL)}" for n in self.rounded.tensors]
        rounded = {name for name in copies if out(name)}
        idle = [pattern for pattern in patterns if pattern not in used]
        if idle:
            raise CheckpointError(f"--leave-out {idle[0]!r} matches nothing in this {self.title}")
        names = [*gone, *tied, *(["optimizer/groups"] if groups else []), *(OTHER + key for key in keys), *unread]
        parts = {part for name in gone for part in self.averages.get(name, ())}
        keep = [name for name in self.layout.tensors if name not in gone and name not in parts]
        return replace(
            self,
            layout=self.layout.select(keep),
            groups=[] if groups else self.groups,
            other={key: value for key, value in self.other.items() if key not in keys},
            ties={alias: name for alias, name in self.ties.items() if alias not in tied},
            averages={name: found for name, found in self.averages.items() if name not in gone},
            rounded=None
            if self.rounded is None
            else self.rounded.select(
                n for n in self.rounded.tensors if f"rounded/{n.removeprefix(MODEL)}" not in rounded
            ),
            left_out=(*self.left_out, *(LeftOut(name, "asked for") for name in names)),
            unread={name: why for name, why in self.unread.items() if name not in unread},
        )

    def with_ties(self, ties: Mapping[str, str]) -> Stored:
        """Say of names that hold nothing which parameters they are tied to.

        Args:
            ties: name -> the parameter, both without `model/`.

        Raises:
            CheckpointError: the name holds something else already, or there is no such parameter.
        """
        made = dict(self.ties)
        unread = dict(self.unread)
        for alias, name in ties.items():
            if weight(name) not in self.names or weight(alias) in self.names:
                raise CheckpointError(
                    f"--tie {alias}={name}: this {self.title} "
                    + (f"has no {name!r}" if weight(name) not in self.names else f"has a tensor {alias!r} already")
                )
            made[weight(alias)] = weight(name)
            unread.pop(weight(alias), None)
        return replace(self, ties=made, unread=unread)

    def with_frozen(self, patterns: Iterable[str]) -> Stored:
        """Say which tensors of the model are parameters that are not trained.

        Args:
            patterns: of names without `model/`, with `*` for any text; an empty one matches nothing: there are none.

        Raises:
            CheckpointError: for a pattern that matches nothing, or a parameter of a group.
        """
        names = [name.removeprefix(MODEL) for name in self.under(MODEL)]
        trained = {name for group in self.groups for name in group["parameters"]}
        found: set[str] = set()
        for pattern in filter(None, patterns):
            hits = {name for name in names if fnmatchcase(name, pattern)}
            if not hits or hits & trained:
                raise CheckpointError(
                    f"--frozen {pattern!r} matches "
                    + (f"{min(hits & trained)!r}, which a parameter group has" if hits else f"nothing in {self.title}")
                )
            found |= hits
        return replace(self, frozen=frozenset(found))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal element by element as they are stored: NaN equals itself, -0 is not 0."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    kind = kinds[a.element_size()]
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def _check_dtype(tensor: Tensor, held: Holdings, name: str, place: Place) -> None:
    if tensor.dtype != DTYPES[held.dtype]:
        raise DamagedError(f"{place}: {name!r} should be {held.dtype}, and is {tensor.dtype}")
