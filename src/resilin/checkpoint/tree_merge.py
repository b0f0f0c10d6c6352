"""The trees of several ranks as one: what each knows of the state, put together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.tree import Json, escape


def merge_trees(trees: Sequence[Json], tensors: Iterable[str] = ()) -> Json:
    """One tree with everything that is in any of them.

    Dicts are united, in the order of the first rank and then of the others; lists must be equally long; values that
    several ranks have must be equal. What must differ from rank to rank does not belong in a checkpoint that any
    number of ranks can load.

    Args:
        trees: as JSON, by rank.
        tensors: names that must be in the tree: one that no rank has a place for is added at the place of its name.

    Raises:
        CheckpointError: naming the place and the ranks that contradict each other.
    """
    merged: Any = trees[0]
    known = set(tensors)
    for rank, tree in enumerate(trees[1:], start=1):
        merged = _merged(merged, tree, "", rank, known)
    missing = known - set(_named(merged))
    for name in sorted(missing):
        _insert(merged, name)
    return merged  # type: ignore[no-any-return]


def _merged(first: Any, other: Any, where: str, rank: int, known: set[str]) -> Any:
    if isinstance(first, dict) and isinstance(other, dict) and not _is_mark(first) and not _is_mark(other):
        out = dict(first)
        for key, value in other.items():
            inside = f"{where}/{key}" if where else key
            out[key] = _merged(out[key], value, inside, rank, known) if key in out else value
        return out
    if isinstance(first, list) and isinstance(other, list) and len(first) == len(other):
        return [
            _merged(one, two, f"{where}/{number}", rank, known)
            for number, (one, two) in enumerate(zip(first, other, strict=True))
        ]
    if type(first) is not type(other) or first != other:
        marks = [node for node in (first, other) if isinstance(node, dict) and node.get("$tensor") in known]
        if len(marks) == 1:  # tied at the one; at the other an empty part, of which nobody can say whether it is tied
            return marks[0]
        raise CheckpointError(
            f"state {where!r}: rank {rank} has {_short(other)}, and a rank before it {_short(first)}; ranks that save "
            "together must agree on everything but the tensors that their layout divides"
        )
    return first


def _is_mark(node: dict[str, Any]) -> bool:
    return len(node) == 1 and next(iter(node)) in ("$tensor", "$float")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _named(node: Any) -> Iterable[str]:
    if isinstance(node, dict):
        if _is_mark(node) and "$tensor" in node:
            yield node["$tensor"]
        for value in node.values():
            yield from _named(value)
    elif isinstance(node, list):
        for value in node:
            yield from _named(value)


def _insert(tree: Any, name: str) -> None:
    node, keys = tree, [unescape(part) for part in name.split("/")]
    for key in keys[:-1]:
        key = f"${key}" if key.startswith("$") else key
        node = node.setdefault(key, {}) if isinstance(node, dict) and not _is_mark(node) else None
        if node is None:
            break
    last = f"${keys[-1]}" if keys[-1].startswith("$") else keys[-1]
    if not isinstance(node, dict) or _is_mark(node) or last in node:
        raise CheckpointError(
            f"tensor {name!r} is in the layout, but the trees have something else at its place, or a list on the way"
        )
    node[last] = {"$tensor": name}


def unescape(part: str) -> str:
    """The key that `escape` wrote; surrogates stay as they were written, since no layout names them."""
    key = part.replace("~1", "/").replace("~0", "~")
    return key if escape(key) == part else part
