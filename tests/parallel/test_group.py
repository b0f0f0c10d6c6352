"""Whoever waits for a message waits as its group wants it: that is how an elastic worker comes out of a lost view."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import resilin.parallel

COLLECTIVES = {
    "all_gather", "all_gather_into_tensor", "all_reduce", "all_to_all", "all_to_all_single", "barrier", "broadcast",
    "gather", "reduce", "reduce_scatter_tensor", "scatter", "_all_gather", "_reduce_scatter",
}  # fmt: skip
BLOCKING = {"recv", "send", "all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list"}
FOLDERS = [Path(resilin.parallel.__path__[0]), Path(resilin.parallel.__path__[0]).parent / "run"]


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    """Of torch.distributed: where, the function's name, and the call."""
    for path in sorted(file for folder in FOLDERS for file in folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = node.func
            if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and called.value.id == "dist":
                yield f"{path.name}:{node.lineno}", called.attr, node
            elif isinstance(called, ast.Name) and called.id in {"_all_gather", "_reduce_scatter"}:
                yield f"{path.name}:{node.lineno}", called.id, node


def test_no_collective_waits_by_itself():
    found = list(calls())
    assert len([name for _, name, _ in found if name in COLLECTIVES]) > 5
    assert not [where for where, name, _ in found if name in BLOCKING]
    waits = [where for where, name, call in found if name in COLLECTIVES and not is_asynchronous(call)]
    assert not waits, f"these block where no cut of the group's links wakes them; see Group.wait: {waits}"


def is_asynchronous(call: ast.Call) -> bool:
    return any(
        word.arg == "async_op" and isinstance(word.value, ast.Constant) and word.value.value is True
        for word in call.keywords
    )
