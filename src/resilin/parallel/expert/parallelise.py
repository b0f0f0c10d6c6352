"""A model whose experts are divided among ranks."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from resilin.models.decoder_settings import DecoderSettings
from resilin.models.moe import Experts
from resilin.parallel.errors import ParallelError
from resilin.parallel.expert.dispatch import Dispatch
from resilin.parallel.expert.exchange import Exchange, FlatExchange
from resilin.parallel.expert.table import ExpertTable
from resilin.parallel.group import Group
from resilin.parallel.local_model import LocalModel

AXIS = "ep"


def stacked_experts(model: nn.Module) -> frozenset[str]:
    """The names of a model's parameters that are matrices of all experts of a layer, stacked."""
    return frozenset(
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, Experts)
        for name, _ in module.named_parameters(recurse=False)
    )


def refuse_too_few(settings: DecoderSettings, expert: int) -> None:
    """Refuse to divide more than there is.

    Args:
        settings: of the model.
        expert: `parallel.expert`.

    Raises:
        ParallelError: its layers have fewer experts.
    """
    experts = settings.moe.experts if settings.moe is not None else 0
    if experts < expert:
        raise ParallelError(
            f"parallel.expert = {expert} divides experts, of which this model has {experts or 'none'}: set model.moe, "
            "or parallel.expert to no more than it has"
        )


def parallelise_experts(
    model: nn.Module | LocalModel,
    group: Group,
    exchange: Exchange | None = None,
    dealt: Callable[[int, int], ExpertTable] = ExpertTable.of,
) -> LocalModel:
    """Give each rank its experts of every layer, in place; everything else stays whole.

    The ranks of the group have different tokens. A rank's gradient of its experts sums over the tokens of them all, so
    what is left to sum is over the axes "rep" and "edp" of the expert mesh, where a dense parameter's is over "rep",
    "dp" and "cp". That a parameter is an expert's is seen in its spec: a cut of the axis "ep".

    Args:
        model: with all its experts. Where tensor parallelism cuts them too, it comes after this.
        group: the axis "ep"; a group of one changes nothing.
        exchange: how rows travel among the group; None: one all-to-all.
        dealt: who has which of so many experts, among so many ranks.

    Returns:
        The same module, with the cuts made.

    Raises:
        ParallelError: the model has no experts, or a layer has fewer than there are ranks.
    """
    local = model if isinstance(model, LocalModel) else LocalModel.of(model)
    layers = {name: module for name, module in local.module.named_modules() if isinstance(module, Experts)}
    if group.size == 1:
        return local
    if not layers:
        raise ParallelError("parallel.expert divides experts, and the model has none: set model.moe, or leave it 1")
    exchange = exchange if exchange is not None else FlatExchange(group)
    cuts = {}
    for prefix, layer in layers.items():
        table = dealt(len(layer.up), group.size)
        mine = list(table.held(group.index))
        for name, parameter in list(layer.named_parameters(recurse=False)):
            whole = parameter.detach()
            # Indices of a meta tensor are looked at in Python, for whose sake torch imports sympy.
            part = whole.new_empty((len(mine), *whole.shape[1:])) if whole.is_meta else whole[mine]
            setattr(layer, name, nn.Parameter(part, requires_grad=parameter.requires_grad))
            cuts[f"{prefix}.{name}" if prefix else name] = (table.cut(AXIS),)
        layer.dispatch = Dispatch(table, exchange)
    return local.extended(AXIS, group, cuts)
