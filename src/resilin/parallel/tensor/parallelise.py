"""A model cut over the ranks of tensor parallelism by the plan that lies beside it (Shoeybi et al., 2019)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from resilin.adapt.adapter import Adapter
from resilin.layout import Cut, LayoutError, Mesh, ParamSpec, Region, specs_of
from resilin.models.linear import Embedding, Linear
from resilin.models.tensor_plan import TENSOR, TensorPlan
from resilin.objective.vocabulary import VocabularyShard
from resilin.parallel.errors import ParallelError
from resilin.parallel.group import Group
from resilin.parallel.local_model import LocalModel, cut_out, holders, pieces_of
from resilin.parallel.tensor.hooks import Call, Stream
from resilin.parallel.tensor.modules import PartLinear, VocabularyEmbedding, cut_norm
from resilin.parallel.tensor.vocabulary import WholeLogits, vocabulary_shard


def parallelise(model: nn.Module | LocalModel, plan: TensorPlan, group: Group, *, sequence: bool) -> LocalModel:
    """The model with this rank's parts of its parameters, cut in place; all ranks of the group call it together.

    The result computes what the whole model does: the same output on every rank, and gradients that are parts of the
    whole ones once they are summed as `LocalParameter.sum_over` says (`LocalModel.sum_gradients`).

    Args:
        model: with all its parameters, or on the meta device, to be filled afterwards. One that other axes have cut
            comes as a LocalModel.
        plan: of the model.
        group: the ranks; with one rank nothing changes.
        sequence: whether activations between regions are cut along their positions (Korthikanti et al., 2022).

    Raises:
        ParallelError: naming the module or parameter that the plan does not know or the ranks cannot divide.
    """
    known = model if isinstance(model, LocalModel) else LocalModel.of(model)
    if group.size == 1:
        return known
    work = _Work(known.module.get_submodule(plan.root), plan, group, sequence)
    work.cut()
    work.connect()
    prefix = f"{plan.root}." if plan.root else ""
    local = known.extended(TENSOR, group, {prefix + name: spec.cuts for name, spec in work.specs.items()})
    made = {}
    for name, parameter in local.parameters.items():
        inside = name.removeprefix(prefix)
        if not name.startswith(prefix):
            made[name] = replace(parameter, first=parameter.first and group.index == 0)
            continue
        spec = parameter.spec
        if work.specs[inside].padded:
            spec = replace(spec, padded=work.specs[inside].padded)
        sums, first = work.sums_of(inside)
        groups = parameter.sum_over if sums is None else (*parameter.sum_over, sums)
        made[name] = replace(parameter, spec=spec, sum_over=groups, first=parameter.first and first)
    return LocalModel(local.module, made, local.axes)


def plan_of(model: nn.Module) -> TensorPlan:
    """The plan that a model brings, as its method `tensor_plan()`.

    Raises:
        ParallelError: it has none.
    """
    make = getattr(model, "tensor_plan", None)
    if make is None:
        raise ParallelError(
            f"a {type(model).__name__} has no tensor_plan(), which says how it is cut: use parallel.tensor = 1 and "
            "parallel.expert = 1, or write one (docs/add-a-model.md)"
        )
    plan: TensorPlan = make()
    return plan


@dataclass
class _Work:
    module: nn.Module
    plan: TensorPlan
    group: Group
    sequence: bool

    def __post_init__(self) -> None:
        self.mesh = Mesh(((TENSOR, self.group.size),))
        self.modules = dict(self.module.named_modules())
        self.regions = [name for name in self.modules if _matches(name, self.plan.regions)]
        if not self.regions:
            raise ParallelError(
                f"{type(self.module).__name__}: no module matches the plan's regions ({', '.join(self.plan.regions)})"
            )
        self.specs = self._specs()
        self._groups: dict[tuple[int, ...], Group] = {}
        self._check()

    def _specs(self) -> dict[str, ParamSpec]:
        """Of every parameter as it is now, with the cuts of this axis only."""
        shapes = {name: (tuple(p.shape), "F32") for name, p in self.module.named_parameters()}
        rules = [replace(rule, cuts=_of_axis(rule.cuts)) for rule in self.plan.rules]
        try:
            return specs_of(shapes, rules, strict=False)
        except LayoutError as error:
            raise ParallelError(str(error)) from None

    def _check(self) -> None:
        known: dict[int, str] = {}
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            if known.setdefault(id(parameter), name) != name:
                raise ParallelError(
                    f"{name} is the same parameter as {known[id(parameter)]}: tie matrices in the model's settings, so "
                    "that its plan knows of it"
                )
        for name, module in self.modules.items():
            if isinstance(module, Adapter) and module.settings.dropout:
                raise ParallelError(
                    f"{name} has dropout, which ranks that each have a part of its map draw differently: set its "
                    "dropout to 0, or parallel.tensor to 1"
                )
        for name, spec in self.specs.items():
            if self._inside(name) and not spec.cuts and not _matches(name, self.plan.copied):
                raise ParallelError(
                    f"{name} lies in a region whose weights are cut, but the plan says neither how it is cut nor that "
                    "every rank has a copy: of adapters lora and rslora are cut; other additions need a rule of their "
                    "own, or parallel.tensor = 1"
                )
            if spec.cuts:
                self._divisible(name, spec)
            elif name in (self._head(), f"{self.plan.embedding}.weight"):
                raise ParallelError(f"{name}: the plan names it as embedding or head, but no rule cuts it")

        for name, _ in self.module.named_buffers():
            if self._inside(name):
                raise ParallelError(
                    f"{name} is a buffer in a region whose weights are cut, and a plan cuts parameters only: use "
                    "parallel.tensor = 1"
                )

    def _divisible(self, name: str, spec: ParamSpec) -> None:
        try:
            shapes = spec.local_shapes(self.mesh)
        except LayoutError as error:
            raise ParallelError(
                f"{name} {list(spec.shape)} cannot be cut over {self.group.size} ranks: {error}; use as many ranks as "
                "there are units or groups of them (key heads, for attention), fewer, or a multiple"
            ) from None
        empty = [rank for rank, shape in enumerate(shapes) if shape is None or 0 in shape]
        if empty:
            raise ParallelError(
                f"{name} {list(spec.shape)} leaves rank {empty[0]} of {self.group.size} without anything (heads, for "
                "attention): use fewer ranks of tensor parallelism"
            )

    def _head(self) -> str | None:
        return next((name for name in self.plan.head if name in self.specs), None)

    def _inside(self, name: str) -> str | None:
        """The region that a parameter or module is in."""
        return next((region for region in self.regions if name.startswith(f"{region}.")), None)

    # -- parameters ---------------------------------------------------------------------------------------------

    def cut(self) -> None:
        """Put this rank's parts in the parameters' places, one tensor after the other."""
        for name, spec in self.specs.items():
            if not spec.cuts:
                continue
            owner, attribute = self._owner(name)
            whole: nn.Parameter = getattr(owner, attribute)
            with torch.no_grad():
                part = cut_out(spec, self.mesh, self.group.index, whole.data)
            made = nn.Parameter(part, requires_grad=whole.requires_grad)
            made.__dict__.update(whole.__dict__)
            pieces = list(pieces_of(spec.local(self.mesh), self.mesh, self.group.index))
            if len(pieces) == 1:  # which box of the whole it is: whoever computes a part of the model asks
                made.box_in_whole = Region.of_slices(pieces[0][0])  # type: ignore[attr-defined]
            setattr(owner, attribute, made)
            if isinstance(owner, nn.Linear) and attribute == "weight":
                owner.out_features, owner.in_features = part.shape

    def sums_of(self, name: str) -> tuple[Group | None, bool]:
        """The ranks over which a parameter's gradient is to be summed, and whether this one counts in norms."""
        spec = self.specs[name]
        if not spec.cuts:
            partial = self._inside(name) is not None or self.sequence
            return (self.group if partial else None), self.group.index == 0
        same = holders(spec, self.mesh)[self.group.index]
        return (self._shared(same) if len(same) > 1 else None), same[0] == self.group.index

    def _shared(self, members: tuple[int, ...]) -> Group:
        """The group of those ranks that hold copies of a cut parameter."""
        if members not in self._groups:
            self._groups[members] = self.group.among(members)
        return self._groups[members]

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        path, _, attribute = name.rpartition(".")
        return self.module.get_submodule(path), attribute

    # -- modules ------------------------------------------------------------------------------------------------

    def connect(self) -> None:
        """Change the modules that need other ranks, and hang the stream's hooks on the rest."""
        for count in self.plan.counts:
            for name in self._named(count.modules):
                spec = self.specs[f"{name}.{count.like}"]
                local, whole = self.modules[name].get_parameter(count.like).shape[0], spec.shape[0]
                setattr(
                    self.modules[name], count.attribute, getattr(self.modules[name], count.attribute) * local // whole
                )
        for name in [name for pattern in self.plan.biases for name in self._named(pattern)]:
            module = self.modules[name]
            if getattr(module, "bias", None) is None:
                continue
            if type(module) not in (Linear, nn.Linear):  # a subclass may do more than a linear map does
                raise ParallelError(
                    f"{name}: a {type(module).__name__} cannot be told to add its bias on one rank only, as a plain "
                    "Linear can"
                )
            self._replace(name, PartLinear(module, self.group))
        for norm in self.plan.norms:
            for name in self._named(norm.modules):
                spec = self.specs[f"{name.rpartition('.')[0]}.{norm.like}"]
                copies = len(holders(spec, self.mesh)[self.group.index])
                self._replace(name, cut_norm(self.modules[name], name, spec.shape[0], copies, self.group))
        stream = Stream(self.group, self.sequence, self.plan.sequence_dim)
        for name in self.regions:
            self.modules[name].register_forward_pre_hook(stream.enter)
            self.modules[name].register_forward_hook(stream.leave)
        self._vocabulary(stream)
        if self.plan.last is not None:
            self.modules[self.plan.last].register_forward_hook(stream.end)
        call = Call(stream, self.plan)
        self.module.register_forward_pre_hook(call.before, with_kwargs=True)
        if self.sequence:
            self.module.register_forward_hook(call.after)

    def _vocabulary(self, stream: Stream) -> None:
        model: Any = self.module
        name = self.plan.embedding
        if name is not None and f"{name}.weight" in self.specs:  # a stage of a pipeline may lack it
            shard = self._shard(f"{name}.weight")
            table = self.modules[name]
            if type(table) not in (Embedding, nn.Embedding):
                raise ParallelError(
                    f"{name}: the plan's embedding should be a plain Embedding, not a {type(table).__name__}"
                )
            self._replace(name, VocabularyEmbedding(table, shard)).register_forward_hook(stream.leave)
        head = self._head()
        if head is not None:
            model.vocabulary_shard = self._shard(head)
            sizes = tuple(size for _, size in self._rows(head))
            if hasattr(model, "logits"):
                model.logits = WholeLogits(model.logits, model.vocabulary_shard, sizes, self.group)

    def _shard(self, name: str) -> VocabularyShard:
        """This rank's tokens, of a table of the vocabulary."""
        return vocabulary_shard(*self._rows(name)[self.group.index], self.specs[name].shape[0], self.group)

    def _rows(self, name: str) -> list[tuple[int, int]]:
        """For each rank the first row of a table that it has, and how many."""
        local, found = self.specs[name].local(self.mesh), []
        for rank in range(self.group.size):
            pieces = [source[0] for source, _ in pieces_of(local, self.mesh, rank)]
            if len(pieces) != 1:
                raise ParallelError(
                    f"{name}: rank {rank} of {self.group.size} has {len(pieces)} runs of the {local.shape[0]} tokens; "
                    "it should be one: use fewer ranks of tensor parallelism, or pad the vocabulary less"
                )
            found.append((pieces[0].start, pieces[0].stop - pieces[0].start))
        return found

    def _named(self, pattern: str) -> Iterator[str]:
        return (name for name in self.modules if re.fullmatch(pattern, name))

    def _replace(self, name: str, module: nn.Module) -> nn.Module:
        path, _, attribute = name.rpartition(".")
        module.train(self.modules[name].training)
        setattr(self.module.get_submodule(path), attribute, module)
        self.modules[name] = module
        return module


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _of_axis(cuts: tuple[Cut, ...]) -> tuple[Cut, ...]:
    return tuple(cut for cut in cuts if cut.axis == TENSOR)
