"""The state of a run whose work is divided: where on which worker each tensor of it lies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from resilin.layout import Layout, ParamSpec
from resilin.nouns import Deferred
from resilin.parallel.dtypes import DTYPES
from resilin.parallel.group import Group
from resilin.parallel.messages import tell_all

Entry = tuple[str, str, tuple[int, ...], str]


def tensors_of(state: Mapping[str, Any], path: str = "") -> dict[str, Tensor | Deferred]:
    """The tensors of a tree by their names in a checkpoint: keys and places joined by `/`."""
    found: dict[str, Tensor | Deferred] = {}
    for key, value in state.items():
        name = f"{path}/{key}" if path else str(key)
        if isinstance(value, Tensor | Deferred):
            found[name] = value
        elif isinstance(value, Mapping):
            found |= tensors_of(value, name)
        elif isinstance(value, list | tuple):
            found |= tensors_of({str(place): item for place, item in enumerate(value)}, name)
    return found


class Lays(Protocol):
    """What knows where tensors lie: a `Blueprint`."""

    @property
    def specs(self) -> Mapping[str, ParamSpec]:
        """Of the whole parameters."""

    def layout(self, tensors: Mapping[str, Entry]) -> Layout:
        """See `Blueprint.layout`."""


class StateLayout:
    """Tells the layout of a run's state, once all workers have told each other what they have.

    Args:
        blueprint: of the model.
        everyone: all workers, who call together.
    """

    def __init__(self, blueprint: Lays, everyone: Group) -> None:
        self._blueprint, self._everyone = blueprint, everyone
        self._known: tuple[dict[str, Entry], Layout] | None = None

    def __call__(self, state: Mapping[str, Any]) -> Layout:
        """The layout of a state like this on all workers; the same object as long as nothing changes."""
        mine = self._entries(state)
        changed = self._known is None or self._known[0] != mine
        if any(tell_all(changed, self._everyone)):
            everything: dict[str, Entry] = {}
            for told in tell_all(mine, self._everyone):
                for name, (kind, parameter, shape, dtype) in told.items():
                    everything[name] = (kind, parameter, tuple(shape), dtype)
            self._known = mine, self._blueprint.layout(dict(sorted(everything.items())))
        assert self._known is not None
        return self._known[1]

    def _entries(self, state: Mapping[str, Any]) -> dict[str, Entry]:
        found: dict[str, Entry] = {}
        specs = self._blueprint.specs
        for name, tensor in tensors_of(state).items():
            part, _, rest = name.partition("/")
            parameter = rest.rpartition("/")[0].rpartition("/")[2]
            dtype = DTYPES[tensor.dtype]
            if part in ("model", "frozen") and rest in specs:
                found[name] = ("weight", rest, specs[rest].shape, dtype)
            elif not tensor.shape:
                continue  # the same at every worker that has it
            elif part == "optimizer" and parameter in specs:
                found[name] = ("state", parameter, specs[parameter].shape, dtype)
            else:
                found[name] = ("copy", "", tuple(tensor.shape), dtype)
        return found


def like(loaded: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A loaded tree without what this worker has nothing of."""
    found: dict[str, Any] = {}
    for key, value in loaded.items():
        if key in own:
            mine = own[key]
            both = isinstance(value, Mapping) and isinstance(mine, Mapping)
            found[key] = like(value, mine) if both else value
    return found
