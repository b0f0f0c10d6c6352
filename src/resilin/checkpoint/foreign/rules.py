"""How the tensor-parallel shards of a parameter make up the whole, in the words of DeepSpeed's universal checkpoints.

A table has lists of regular expressions on parameter names, which must match from the beginning of the name:

    tp_replicated_parameter_patterns            every rank has the same values
    parameter_to_average_patterns               the mean of what the ranks have
    parameter_with_row_parallelism_patterns     cut along dimension 1
    parameter_with_2_sub_params_cat_dim_0       two parameters in one (gate and up), each cut along dimension 0
    parameter_with_sub_params                   [{"patterns", "shape", "partition_dim"}]: several in one, such as
                                                {"shape": [[512, 128, 128], -1], "partition_dim": 0} for a fused QKV
    sub_param_shard_widths                      {pattern: [[width on each rank] for each of the several]}
    vocabulary_parameter_patterns               rows beyond `original_vocab_size` are padding
    pipeline_replicated_parameter_patterns      tied over pipeline stages: the first stage's is taken
    parameter_with_column_parallelism_patterns  cut along dimension 0
Anything else is cut along dimension 0 too, or refused where the table has a list of those that are (the last one).
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.foreign.shards import Piece, Shape, Slice
from resilin.layout import Region

REPLICATED = "tp_replicated_parameter_patterns"
AVERAGE = "parameter_to_average_patterns"
ROWS = "parameter_with_row_parallelism_patterns"
TWO = "parameter_with_2_sub_params_cat_dim_0"
SUB_PARAMS = "parameter_with_sub_params"
WIDTHS = "sub_param_shard_widths"
VOCABULARY = "vocabulary_parameter_patterns"
COLUMNS = "parameter_with_column_parallelism_patterns"
PIPELINE = "pipeline_replicated_parameter_patterns"
VOCABULARY_SIZE = "original_vocab_size"
_LISTS = (REPLICATED, AVERAGE, ROWS, TWO, COLUMNS, VOCABULARY, PIPELINE)
_CUTS = (REPLICATED, AVERAGE, ROWS, TWO, COLUMNS)
_SILENT = {"universal_checkpoint_version", "affine_map", "padded_vocab_size"}
_KNOWN_NAMES = {*_LISTS, SUB_PARAMS, WIDTHS, VOCABULARY_SIZE, *_SILENT}


@dataclass(frozen=True)
class Union:
    """What the shards of a parameter are of the whole.

    Attributes:
        shape: of the whole, without padding.
        slices: of each rank.
        copies: how often an element is held.
        average: the whole is the mean of the shards, each of which has its shape.
    """

    shape: Shape
    slices: tuple[Slice, ...]
    copies: int = 1
    average: bool = False


@dataclass
class Rules:
    """A table of rules, with a note of which were used.

    Args:
        table: as described above.
        where: what to call it in messages.
    """

    table: Mapping[str, Any]
    where: str
    used: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        for name in _LISTS:
            patterns = self.table.get(name, [])
            if not isinstance(patterns, (list, tuple)) or not all(isinstance(p, str) for p in patterns):
                raise CheckpointError(f"{self.where}: {name} should be a list of regular expressions")
        unknown = [name for name in self.table if name not in _KNOWN_NAMES]
        if unknown:
            raise CheckpointError(f"{self.where}: {unknown[0]!r} is not a rule known here; known: {', '.join(_LISTS)}")

    def _match(self, kind: str, name: str) -> str | None:
        found = [pattern for pattern in self.table.get(kind, []) if re.match(pattern, name)]
        if len(found) > 1:
            raise CheckpointError(f"{self.where}: {kind}: both {found[0]!r} and {found[1]!r} match {name!r}")
        self.used.update(found)
        return found[0] if found else None

    def _sub_params(self, name: str) -> tuple[str, Mapping[str, Any]] | None:
        for entry in self.table.get(SUB_PARAMS, []):
            for pattern in entry["patterns"]:
                if re.match(pattern, name):
                    self.used.add(pattern)
                    return pattern, entry
        return None

    def unused(self) -> list[str]:
        """Patterns that no parameter matched: modules that were renamed since the rules were written."""
        listed = [pattern for kind in _LISTS for pattern in self.table.get(kind, [])]
        listed += [pattern for entry in self.table.get(SUB_PARAMS, []) for pattern in entry["patterns"]]
        return [pattern for pattern in listed if pattern not in self.used]

    def in_first_stage_only(self, name: str) -> bool:
        """Whether a parameter is tied over pipeline stages, so that the first one's is taken."""
        return self._match(PIPELINE, name) is not None

    def union(self, name: str, shapes: Sequence[Shape]) -> Union:
        """Put the shards of a parameter together.

        Args:
            name: of the parameter.
            shapes: of its shard on each tensor-parallel rank.

        Raises:
            CheckpointError: rules contradict each other, or do not fit the shapes.
        """
        found = [kind for kind in _CUTS if self._match(kind, name)]
        sub = self._sub_params(name)
        if len(found) + (sub is not None) > 1:
            kinds = [*found, *([SUB_PARAMS] if sub else [])]
            raise CheckpointError(f"{self.where}: {name!r} matches rules of {kinds[0]} and of {kinds[1]}: leave it one")
        kind = found[0] if found else None
        if kind is None and sub is None and COLUMNS in self.table and len(shapes) > 1:
            raise CheckpointError(
                f"{self.where}: no rule says how the shards {_listed(shapes)} of {name!r} make it up: give a table "
                "that does with --rules"
            )
        if kind in (REPLICATED, AVERAGE):
            if len(set(shapes)) > 1:
                raise CheckpointError(f"{self.where}: {kind}: {name!r} has several shapes: {_listed(shapes)}")
            made = Union(shapes[0], tuple(Slice.whole(s) for s in shapes), len(shapes), kind == AVERAGE)
        else:
            dim, widths = self._widths(name, kind, sub, shapes)
            made = _joined(f"{self.where}: {name!r}", shapes, dim, widths)
        if self._match(VOCABULARY, name):
            made = self._clipped(name, made)
        return made

    def dimension(self, name: str) -> int | None:
        """The dimension that a parameter is cut along; None: every rank has all of it."""
        found = [kind for kind in _CUTS if self._match(kind, name)]
        sub = self._sub_params(name)
        if found and found[0] in (REPLICATED, AVERAGE):
            return None
        return 1 if found and found[0] == ROWS else int(sub[1]["partition_dim"]) if sub else 0

    def marks(self, name: str, shape: Shape) -> dict[str, Any]:
        """What an atom of a universal folder says of how it is cut again.

        Args:
            name: of the parameter.
            shape: of the whole.

        Returns:
            DeepSpeed's own marks; `sub_param_shape` (several parameters in one) with the fields of its object.

        Raises:
            CheckpointError: a rule does not fit the shape.
        """
        vocabulary = {"vocab_tensor": True} if self.is_vocabulary(name) else {}
        sub, dim = self._sub_params(name), self.dimension(name) or 0
        if dim >= max(len(shape), 1):
            raise CheckpointError(f"{self.where}: {name!r} {list(shape)} has no dimension {dim} to be cut along")
        if sub is None:
            two = {"param_n_sub_params": 2} if self._match(TWO, name) is not None else {}
            return {"cat_dim": dim} | two | vocabulary
        parts = _parts(sub[1], dim, shape[dim])
        if sum(parts) != shape[dim]:
            raise CheckpointError(
                f"{self.where}: sub-parameters of {parts} do not make up dimension {dim} of {name!r} {list(shape)}"
            )
        whole = (*shape[:dim], tuple(parts), *shape[dim + 1 :])
        return {"sub_param_shape": {"patterns": [sub[0]], "shape": whole, "partition_dim": dim}} | vocabulary

    def is_vocabulary(self, name: str) -> bool:
        """Whether rows of its shards may be padding."""
        return self._match(VOCABULARY, name) is not None

    def _widths(
        self, name: str, kind: str | None, sub: tuple[str, Mapping[str, Any]] | None, shapes: Sequence[Shape]
    ) -> tuple[int, list[list[int]]]:
        """The dimension that is cut, and (sub-parameter, rank) -> how many indices of it."""
        where = f"{self.where}: {name!r}"
        dim = 1 if kind == ROWS else int(sub[1]["partition_dim"]) if sub else 0
        if any(dim >= len(shape) for shape in shapes):
            raise CheckpointError(
                f"{where}: its shards {_listed(shapes)} have no dimension {dim} to be cut along; if every rank holds "
                f"the same, add it to {REPLICATED}"
            )
        sizes = [shape[dim] for shape in shapes]
        if kind == TWO:
            if any(size % 2 for size in sizes):
                raise CheckpointError(f"{where}: {TWO}: the shards {_listed(shapes)} cannot be halved")
            return dim, [[size // 2 for size in sizes]] * 2
        if sub is None:
            return dim, [sizes]
        pattern, entry = sub
        recorded = self.table.get(WIDTHS, {}).get(pattern)
        if recorded is not None:
            widths = [list(map(int, row)) for row in recorded]
        else:
            total, ranks = sum(sizes), len(shapes)
            parts = _parts(entry, dim, total)
            if any(part % ranks for part in parts) or sum(parts) != total:
                raise CheckpointError(
                    f"{where}: sub-parameters of {parts} do not divide over {ranks} ranks into shards "
                    f"{_listed(shapes)}; give their widths on each rank in {WIDTHS}"
                )
            widths = [[part // ranks] * ranks for part in parts]
        for number, size in enumerate(sizes):
            held = [row[number] for row in widths if number < len(row)]
            if len(held) != len(widths) or sum(held) != size:
                raise CheckpointError(f"{where}: {WIDTHS} {held} of rank {number} do not add up to its {size}")
        return dim, widths

    def _clipped(self, name: str, made: Union) -> Union:
        rows = self.table.get(VOCABULARY_SIZE)
        if not isinstance(rows, int) or rows > made.shape[0]:
            raise CheckpointError(
                f"{self.where}: {name!r} is a vocabulary of {made.shape[0]} rows with padding, and {VOCABULARY_SIZE} "
                f"is {rows!r}: give the number of rows without it"
            )
        slices = tuple(
            Slice(one.shape, tuple(p for p in (piece.clipped(rows) for piece in one.pieces) if p is not None))
            for one in made.slices
        )
        return Union((rows, *made.shape[1:]), slices, made.copies, made.average)


def _joined(where: str, shapes: Sequence[Shape], dim: int, widths: Sequence[Sequence[int]]) -> Union:
    others = {shape[:dim] + shape[dim + 1 :] for shape in shapes}
    if len(others) > 1:
        raise CheckpointError(f"{where}: shards {_listed(shapes)} differ in more than dimension {dim}")
    total = sum(map(sum, widths))
    slices = []
    for rank, shape in enumerate(shapes):
        pieces, local, whole = [], 0, 0
        for row in widths:
            at = whole + sum(row[:rank])
            offsets = [0] * len(shape)
            offsets[dim] = at
            inner = [0] * len(shape)
            inner[dim] = local
            sizes = (*shape[:dim], row[rank], *shape[dim + 1 :])
            pieces.append(Piece(Region(tuple(inner), sizes), tuple(offsets)))
            local += row[rank]
            whole += sum(row)
        slices.append(Slice(shape, tuple(pieces)))
    return Union((*shapes[0][:dim], total, *shapes[0][dim + 1 :]), tuple(slices))


def _parts(entry: Mapping[str, Any], dim: int, total: int) -> list[int]:
    """The sizes of several parameters in one along the dimension that is cut; a number of them are equal."""
    spec = entry["shape"][dim]
    return list(map(int, spec)) if isinstance(spec, (list, tuple)) else [total // spec] * spec


def _listed(shapes: Sequence[Shape]) -> str:
    return ", ".join(str(list(shape)) for shape in shapes)


def unsharded(shape: Shape) -> Union:
    """A parameter that one rank has whole."""
    return Union(shape, (Slice.whole(shape),))


def read_table(path: Path, what: str) -> Any:
    """What a TOML file (by its suffix), or else a JSON file, holds.

    Args:
        path: of the file.
        what: it is read as, for the message.

    Raises:
        CheckpointError: it is missing, or neither.
    """
    try:
        text = path.read_text(encoding="utf-8")
        return tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as {what} ({error})") from None


def load_rules(path: Path) -> dict[str, Any]:
    """A table of rules from a JSON or TOML file.

    Raises:
        CheckpointError: it is missing, or not such a file.
    """
    table: Any = read_table(path, "a table of rules")
    if not isinstance(table, dict):
        raise CheckpointError(f"{path}: should hold a table, holds a {type(table).__name__}")
    return table
