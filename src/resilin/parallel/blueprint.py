"""What all workers know of the whole model: how it is cut, what is trained, and who owns which optimizer states."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from torch import nn

from resilin.layout import Cut, Deal, Layout, Mesh, Only, ParamSpec, Shard, layout_of, merge
from resilin.layout.dealing import ALIGN, VIRTUAL_SHARDS, deal
from resilin.parallel.degrees import Degrees
from resilin.parallel.errors import ParallelError
from resilin.parallel.local_model import shapes_of

DENSE, EXPERTS = "dense", "experts"
REDUCED_OVER = {DENSE: ("rep", "dp", "cp"), EXPERTS: ("rep", "edp")}
"""The mesh axes over which gradients are summed and optimizer states divided."""
_OWNERS = "owners"  # those axes as one


@dataclass(frozen=True)
class Blueprint:
    """A model on a mesh.

    Attributes:
        degrees: of parallelism.
        specs: how the mesh cuts each parameter, without the optimizer's own cut; frozen ones too.
        trained: names of the parameters that are trained, in the model's order.
        keep_whole: those of them that one rank has to own in whole.
        virtual: owners of the virtual shards of all others, for each reduction; None: equal runs.
        sharded: whether weights are divided like the optimizer's states, along one dimension (FSDP).
    """

    degrees: Degrees
    specs: Mapping[str, ParamSpec]
    trained: tuple[str, ...]
    keep_whole: frozenset[str] = frozenset()
    virtual: Mapping[str, tuple[int, ...]] | None = None
    sharded: bool = False

    @classmethod
    def uncut(cls, model: nn.Module, degrees: Degrees, keep_whole: Collection[str] = ()) -> Blueprint:
        """Of a model that every worker has in whole."""
        specs = {name: ParamSpec(*known) for name, known in shapes_of(model).items()}
        trained = tuple(name for name, p in model.named_parameters() if p.requires_grad)
        return cls(degrees, specs, trained, frozenset(keep_whole))

    @cached_property
    def rows(self) -> dict[str, int]:
        """The number of each trained parameter."""
        return {name: row for row, name in enumerate(self.trained)}

    def reduction_of(self, name: str) -> str:
        """Which sums a parameter belongs to: the experts' tensors have other copies than the rest."""
        cut = self.degrees.expert > 1 and any(cut.axis == "ep" for cut in self.specs[name].cuts)
        return EXPERTS if cut else DENSE

    def ranks(self, reduction: str) -> int:
        """How many ranks divide the optimizer's states."""
        d = self.degrees
        return d.replicate * d.data * d.context // (d.expert if reduction == EXPERTS else 1)

    def table(self, reduction: str) -> tuple[int, ...]:
        """(V,) the owner of each virtual shard.

        Raises:
            ParallelError: there are more ranks than shards.
        """
        ranks = self.ranks(reduction)
        if self.virtual is not None and reduction in self.virtual:
            return self.virtual[reduction]
        if ranks > VIRTUAL_SHARDS:
            raise ParallelError(
                f"{ranks} ranks cannot share the {VIRTUAL_SHARDS} virtual shards of a parameter: use "
                "parallel.sharding = 'fsdp'"
            )
        return deal(VIRTUAL_SHARDS, ranks)

    @cached_property
    def whole_owners(self) -> dict[str, int]:
        """The owner of each parameter that is owned in whole: of its pipeline stage, whom had least before it."""
        loads: dict[tuple[str, object], list[int]] = {}
        found = {}
        for name in self.trained:
            if name in self.keep_whole:
                spec, kind = self.specs[name], self.reduction_of(name)
                stage = next((cut.at for cut in spec.cuts if isinstance(cut, Only) and cut.axis == "pp"), None)
                load = loads.setdefault((kind, stage), [0] * self.ranks(kind))
                owner = min(range(len(load)), key=lambda rank: (load[rank], rank))
                load[owner] += math.prod(spec.shape)
                found[name] = owner
        return found

    def sharded_dim(self, name: str) -> int:
        """The dimension along which FSDP divides a parameter: 0, but 1 of experts, a few of which lie along 0."""
        if self.reduction_of(name) == DENSE:
            return 0
        parts = self.degrees.tensor * self.ranks(EXPERTS) // self.degrees.replicate
        return 0 if self.specs[name].shape[1] % parts else 1

    # -- where everything is ------------------------------------------------------------------------------------

    def mesh(self, reduction: str) -> Mesh:
        """All ranks, those that divide optimizer states on one axis."""
        d, owners = self.degrees, self.ranks(reduction)
        sizes = [("pp", d.pipeline), (_OWNERS, owners)]
        if self.sharded:
            sizes[1:] = [("rep", d.replicate), (_OWNERS, owners // d.replicate)]
        if reduction == EXPERTS:
            sizes.append(("ep", d.expert))
        return Mesh((*sizes, ("tp", d.tensor)))

    def layout(self, tensors: Mapping[str, tuple[str, str, tuple[int, ...], str]]) -> Layout:
        """The layout of a run's state on all ranks.

        Args:
            tensors: name in the state -> (kind, parameter, shape, dtype): kind is "weight", "state" (of the optimizer,
                of its parameter's shape) or "copy", which all ranks hold in whole and whose parameter is "".
        """
        by_kind: dict[str, dict[str, ParamSpec]] = {DENSE: {}, EXPERTS: {}}
        for name, (kind, parameter, shape, dtype) in tensors.items():
            if kind == "copy":
                by_kind[DENSE][name] = ParamSpec(tuple(shape), dtype)
                continue
            reduction, spec = self.reduction_of(parameter), replace(self.specs[parameter], dtype=dtype)
            # One rank alone keeps its parameters' shapes.
            if (kind == "state" or self.sharded) and self.ranks(reduction) > 1:
                spec = replace(spec, cuts=(*spec.cuts, self._owned(parameter, reduction)))
            by_kind[reduction][name] = spec
        parts = [layout_of(specs, self.mesh(kind)) for kind, specs in by_kind.items() if specs]
        return parts[0] if len(parts) == 1 else merge(*parts)

    def _owned(self, name: str, reduction: str) -> Cut:
        if self.sharded:
            return Shard(_OWNERS, self.sharded_dim(name))
        if name in self.keep_whole:
            return Only(_OWNERS, (self.whole_owners[name],))
        return Deal(_OWNERS, self.table(reduction), rule="even", align=ALIGN)
