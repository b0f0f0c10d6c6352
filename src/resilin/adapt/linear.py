"""A linear map with adapters, made out of the model's own module in place.

The module keeps its identity, its parameters and their names (`blocks.0.attention.q.weight`); what is new lies under
`adapters` (`blocks.0.attention.q.adapters.default.block`). Its class becomes a subclass of what it was, so that
whatever the map itself does (a mask on its weight, say) goes on below the adapters.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from resilin.adapt.adapter import Adapter
from resilin.adapt.settings import AdapterSettings
from resilin.adapt.targets import is_plain_map, is_quantised
from resilin.keys import Keys
from resilin.models.linear import product
from resilin.models.plain import HasPlainForm


@dataclass
class Attached:
    """What all adapted maps of one model share.

    Attributes:
        settings: of every adapter, by name.
        active: the adapters in use, in the order in which they are applied, with their strengths.
        loaded: adapters that began with values of an earlier training.
        merged: those that the weights now hold, the first of `active`; None: nothing is merged.
        keys: of the forward passes under way; dropout asks the innermost.
        originals: the values before training of parameters that an adapter trains in full, by name.
        owner: the adapter these belong to, or None.
        swapped: whether the model now holds `originals` instead of what was trained.
    """

    settings: dict[str, AdapterSettings] = field(default_factory=dict)
    active: dict[str, float] = field(default_factory=dict)
    loaded: set[str] = field(default_factory=set)
    merged: tuple[str, ...] | None = None
    keys: list[Keys | None] = field(default_factory=list)
    originals: dict[str, Tensor] = field(default_factory=dict)
    owner: str | None = None
    swapped: bool = False

    @property
    def current_keys(self) -> Keys | None:
        """Of the innermost forward pass under way."""
        return self.keys[-1] if self.keys else None


class _Level:
    """The map with its first `count` adapters; what an adapter sees below itself."""

    def __init__(self, map_: AdaptedLinear, chain: list[tuple[str, float]], count: int) -> None:
        self.map, self.chain, self.count = map_, chain, count

    @property
    def bias(self) -> Tensor | None:
        return self.map.bias

    @property
    def plain(self) -> bool:
        return self.count == 0 and self.map.is_plain

    def _adapter(self) -> tuple[str, Adapter, float, _Level]:
        name, strength = self.chain[self.count - 1]
        return name, self.map.adapter(name), strength, _Level(self.map, self.chain, self.count - 1)

    def __call__(self, x: Tensor) -> Tensor:
        if self.count == 0:
            return self.map.base_forward(x)
        name, adapter, strength, below = self._adapter()
        keys = self.map.attached.current_keys
        drops = keys is not None and adapter.settings.dropout  # else nothing of this map alone is looked at: compiled
        own = keys.fold("adapter").fold(self.map.path).fold(name) if drops and keys is not None else None
        return adapter.output(x, below, strength, own)

    def weight(self) -> Tensor:
        if self.count == 0:
            return self.map.whole_weight()
        name, adapter, strength, below = self._adapter()
        if adapter.settings.dropout and self.map.attached.current_keys is not None:
            raise ValueError(
                f"adapter {name!r} has dropout, which an adapter applied after it cannot see: "
                f"{self.chain[self.count][0]!r} changes the weight; put it first, or set dropout = 0"
            )
        return adapter.changed(below.weight(), strength)


if TYPE_CHECKING:
    _Base = nn.Linear
else:
    _Base = object


class AdaptedLinear(_Base):
    """What `adapted_class` puts before a linear class.

    Attributes:
        adapters: by name; some may be unused now.
        attached: shared by all maps of the model.
        path: the module's name in the model, by which dropout is keyed.
        kept: the weight before merging, where a copy was wanted.
        merged_chain: what was merged, in order.
    """

    adapters: nn.ModuleDict
    attached: Attached
    path: str
    kept: Tensor | None
    merged_chain: list[tuple[str, float]]

    @property
    def is_plain(self) -> bool:
        """Whether the map below is `x W^T + b` with a frozen weight, and nothing else."""
        return is_plain_map(self) and not self.weight.requires_grad

    def base_forward(self, x: Tensor) -> Tensor:
        """The map without adapters."""
        return product(x, self.weight, self.bias) if is_plain_map(self) else super().forward(x)

    def whole_weight(self) -> Tensor:
        """The matrix that the map without adapters multiplies by."""
        if is_plain_map(self):
            return self.weight
        below = getattr(super(), "whole_weight", None)  # of a map that does more than hold it: a mask, say
        whole: Tensor = self.weight if below is None else below()
        return whole

    def adapter(self, name: str) -> Adapter:
        """By name."""
        found = self.adapters[name]
        assert isinstance(found, Adapter)
        return found

    def chain(self) -> list[tuple[str, float]]:
        """The adapters to apply in the forward pass, in order."""
        merged = self.attached.merged or ()
        active = self.attached.active.items()
        return [(name, strength) for name, strength in active if name in self.adapters and name not in merged]

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        chain = self.chain()
        return _Level(self, chain, len(chain))(x) if chain else self.base_forward(x)

    @torch.no_grad()
    def merge_(self, names: tuple[str, ...], *, keep: bool) -> None:
        """Put these adapters into the weight; computed in float32 at least."""
        chain = [(name, strength) for name, strength in self.chain() if name in names]
        if not chain:
            return
        weight = self.weight
        if self._parameters.get("weight") is not weight or is_quantised(self) or not is_plain_map(self):
            raise ValueError(
                f"{self.path}: its weight is quantised, computed anew from others, or not all that it computes with: "
                "nothing can be merged into it"
            )
        changed = weight.to(torch.promote_types(weight.dtype, torch.float32))
        for name, strength in chain:
            changed = self.adapter(name).changed(changed, strength)
        if not torch.isfinite(changed).all():
            raise ValueError(f"{self.path}: the merged weight is not finite; nothing was merged into it")
        self.kept = weight.detach().clone() if keep else None
        self.merged_chain = chain
        weight.copy_(changed)

    @torch.no_grad()
    def restored(self) -> Tensor | None:
        """The weight before `merge_`: its copy, or else computed back; None where nothing was merged.

        Raises:
            ValueError: it cannot be computed back.
        """
        if self.kept is not None or not self.merged_chain:
            return self.kept
        weight: Tensor = self.weight
        for name, strength in reversed(self.merged_chain):
            try:
                weight = self.adapter(name).restored(weight, strength)
            except ValueError as error:
                raise ValueError(f"{self.path}, adapter {name!r}: {error}") from None
        return weight

    @torch.no_grad()
    def unmerge_(self, weight: Tensor) -> None:
        """Put back what `restored` gave."""
        self.weight.copy_(weight)
        self.kept, self.merged_chain = None, []

    def plain_form(self) -> nn.Module:
        """The plain form of what the adapters are on, with the weight they give it."""
        chain = [(self.adapter(name), strength) for name, strength in self.chain()]
        path, below = self.path, detached(self)
        plain = below.plain_form() if isinstance(below, HasPlainForm) else below
        if not (isinstance(plain, nn.Linear) and is_plain_map(plain)) or is_quantised(plain):
            raise ValueError(f"{path}: a {type(plain).__name__} has no plain weight to merge adapters into")
        weight = plain.weight
        with torch.no_grad():
            changed = weight.to(torch.promote_types(weight.dtype, torch.float32))
            for adapter, strength in chain:
                changed = adapter.changed(changed, strength)
            weight.copy_(changed)
        return plain

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self.merged_chain:
            raise ValueError(
                f"{self.path}: adapters are merged into the weight, and saving would apply them twice: unmerge first"
            )
        super()._save_to_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        """As the linear map's, with the adapters' names."""
        return f"{super().extra_repr()}, adapters={', '.join(self.adapters)}"


_CLASSES: dict[type[nn.Linear], type[nn.Linear]] = {}


def adapted_class(linear: type[nn.Linear]) -> type[nn.Linear]:
    """The class that a linear class becomes when adapters are attached; always the same one."""
    if linear not in _CLASSES:
        made = type(f"Adapted{linear.__name__}", (AdaptedLinear, linear), {"__module__": linear.__module__})
        _CLASSES[linear] = made
    return _CLASSES[linear]


def prepare(linear: nn.Linear, attached: Attached, path: str) -> AdaptedLinear:
    """Make a module ready for adapters, in place."""
    if not isinstance(linear, AdaptedLinear):
        linear.__class__ = adapted_class(type(linear))
        assert isinstance(linear, AdaptedLinear)
        linear.adapters = nn.ModuleDict()
        linear.attached, linear.path = attached, path
        linear.kept, linear.merged_chain = None, []
    return linear


def detached(linear: AdaptedLinear) -> nn.Linear:
    """Take all adapters off, in place."""
    del linear.adapters
    for name in ("attached", "path", "kept", "merged_chain"):
        delattr(linear, name)
    linear.__class__ = type(linear).__mro__[2]
    return linear
