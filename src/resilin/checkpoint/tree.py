"""A state tree taken apart into JSON and tensors, and put together again.

In the JSON a tensor is `{"$tensor": name}` and a float that JSON cannot hold is `{"$float": "nan"}`; a key of the
user's own that begins with `$` is written with one `$` more. Names are the keys joined by `/`; inside a key `~` is
written `~0` and `/` is `~1` (JSON pointer, RFC 6901), and a lone surrogate, which UTF-8 has no bytes for, `~u` and
its four hexadecimal digits. So ordinary keys read as they are and no two tensors can have one name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from resilin.checkpoint.errors import CheckpointError
from resilin.nouns import Deferred

Json = dict[str, Any] | list[Any] | str | int | float | bool | None

_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_SURROGATE = re.compile("[\ud800-\udfff]")
# Python refuses to read back decimal numbers of more digits than this (its default limit is 4300).
_LARGEST_INT_BITS = 14_000


def escape(key: str) -> str:
    """A key as one part of a name."""
    key = key.replace("~", "~0").replace("/", "~1")
    return _SURROGATE.sub(lambda match: f"~u{ord(match[0]):04x}", key)


@dataclass
class TakenApart:
    """A tree without its tensors, and the tensors by name.

    Attributes:
        json: the tree as strict JSON.
        tensors: each stored tensor once, by the name of its first place in the tree.
    """

    json: Json = None
    tensors: dict[str, Tensor | Deferred] = field(default_factory=dict)


def _same_memory(tensor: Tensor | Deferred) -> object:
    """Equal for two tensors that show the same elements of the same memory in the same way: tied weights."""
    if isinstance(tensor, Deferred):
        return id(tensor)
    if hasattr(tensor, "to_local"):  # a DTensor: shards of equal memory, empty ones too
        local = tensor.to_local()
        memory = local.untyped_storage()._cdata, local.storage_offset(), tuple(local.shape), local.stride()
        return *memory, tensor.dtype, tuple(tensor.shape)
    if tensor.numel() == 0 or tensor.is_meta or tensor.is_sparse:
        return None
    device = str(tensor.device)
    flags = tensor.is_conj(), tensor.is_neg()
    return device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), flags


def _refuse(where: str, value: object) -> CheckpointError:
    hints = {
        "tuple": "make it a list, which is what would come back",
        "set": "make it a sorted list",
        "ndarray": "use torch.from_numpy(...)",
        "bytes": "make it text, or a uint8 tensor",
    }
    kind = type(value)
    hint = hints.get("tuple" if isinstance(value, tuple) else kind.__name__)
    if hint is None:
        hint = "use .item()" if kind.__module__ == "numpy" else "save what it is made of"
    return CheckpointError(
        f"state {where!r}: a {kind.__module__}.{kind.__name__} cannot be saved ({hint}); "
        "a state holds tensors, dicts with text keys, lists, numbers, text, true, false and None"
    )


def _leaf(value: Any, where: str) -> Json:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # plain text also of an enum's member
    if isinstance(value, int):
        if value.bit_length() > _LARGEST_INT_BITS:
            raise CheckpointError(f"state {where!r}: an integer of {value.bit_length()} bits is too long; use a tensor")
        return int(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return {"$float": "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"}
    raise _refuse(where, value)


def take_apart(tree: Mapping[str, Any], separate: Collection[str] = ()) -> TakenApart:
    """Separate the tensors of a tree from the rest.

    Tensors that are the same view of the same memory (tied weights, a parameter listed twice) are kept once.

    Args:
        tree: dicts with text keys and lists; at its leaves tensors, `Deferred` ones too, and JSON values.
        separate: names of tensors that are kept as their own, whatever memory they lie in.

    Raises:
        CheckpointError: for a value or key that would not come back as it is, naming its place.
    """
    result = TakenApart()
    seen: dict[object, str] = {}

    def visit(node: Any, where: str, inside: str = "") -> Json:
        if isinstance(node, Tensor | Deferred):
            same = _same_memory(node)
            name = where if same is None or where in separate else seen.setdefault(same, where)
            if name == where:
                result.tensors[name] = node
            return {"$tensor": name}
        if isinstance(node, Mapping):
            out: dict[str, Any] = {}
            for key, item in node.items():
                if not isinstance(key, str):
                    raise CheckpointError(
                        f"state {where!r}: the key {key!r} is {type(key).__name__}, but keys must be text, "
                        f"since JSON has no others; use {str(key)!r}, or a list"
                    )
                plain = str.__str__(key)
                out[f"${plain}" if plain.startswith("$") else plain] = visit(
                    item, name := f"{inside}{escape(plain)}", f"{name}/"
                )
            return out
        if isinstance(node, list):
            return [visit(item, f"{inside}{index}", f"{inside}{index}/") for index, item in enumerate(node)]
        return _leaf(node, where)

    if not isinstance(tree, Mapping):
        raise CheckpointError(f"a state is a dict at the top, not a {type(tree).__name__}")
    result.json = visit(tree, "")
    return result


def put_together(node: Json, tensor: Callable[[str], Any]) -> Any:
    """The tree again.

    Args:
        node: the JSON of `take_apart`.
        tensor: gives a tensor by its name; asked for one name several times it should give the same object, so that
            tied weights are tied again.

    Raises:
        CheckpointError: for JSON that `take_apart` does not write.
    """
    if isinstance(node, list):
        return [put_together(item, tensor) for item in node]
    if not isinstance(node, dict):
        return node
    if len(node) == 1:
        key, value = next(iter(node.items()))
        if key == "$tensor" and isinstance(value, str):
            return tensor(value)
        if key == "$float" and value in _FLOATS:
            return _FLOATS[str(value)]
    out = {}
    for key, item in node.items():
        if key.startswith("$") and not key.startswith("$$"):
            raise CheckpointError(f"unknown mark {key!r} in the saved tree; was it written by a newer version?")
        out[key[1:] if key.startswith("$$") else key] = put_together(item, tensor)
    return out
