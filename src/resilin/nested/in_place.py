"""Running a sub-model inside the full one: `with budget(model, b): ...`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import nn

from resilin.models.cut import Cut, cut_of, running
from resilin.models.decoder import Decoder
from resilin.nested.budgets import Budget, BudgetError
from resilin.nested.regions import cut_for, shapes_of


def decoder_in(model: nn.Module) -> Decoder:
    """The decoder that a model is, or has inside (a compiled model, a policy beside its value model).

    Raises:
        BudgetError: there is none, or more than one.
    """
    if isinstance(model, Decoder):
        return model
    found = [module for module in model.modules() if isinstance(module, Decoder)]
    if len(found) != 1:
        raise BudgetError(
            f"budgets are for decoders, and this {type(model).__name__} has {len(found) or 'none'} inside"
        )
    return found[0]


def budget(model: nn.Module, wanted: Budget) -> AbstractContextManager[None]:
    """Inside the block, the model is the sub-model that a budget selects: same weights, less work.

    Nothing is copied or changed: the forward pass uses views of what the budget selects and leaves out the rest, and
    gradients of what it leaves out are exactly zero (or None). It holds for the thread (or task) that entered it, may
    be entered again inside with another budget, and ends with the block, also by an exception. A backward pass may run
    after the block. The full budget is the plain model, bit for bit.

        with budget(model, Budget(ffn=512)):
            loss = objective(model, batch, keys).sum

    Args:
        model: a decoder, compiled or not, or a module that has one inside.
        wanted: what to use of it.

    Raises:
        BudgetError: the budget does not fit the model, or the model is divided such that it cannot be run in part.
    """
    decoder = decoder_in(model)
    cut = cut_for(decoder.settings, wanted)
    if cut is not None:
        _check_here(decoder, cut)
    return running(decoder, cut)


@contextmanager
def full(model: nn.Module) -> Iterator[None]:
    """Inside the block, all of the model, whatever budget is around it."""
    with running(decoder_in(model), None):
        yield


def is_cut(model: nn.Module) -> bool:
    """Whether this thread now runs less than all of the model."""
    return cut_of(decoder_in(model)) is not None


def _check_here(decoder: Decoder, cut: Cut) -> None:
    """Refuse models of which this process has parts such that a cut would take the wrong ones.

    Of a block that tensor parallelism divides, each rank leaves out neurons and heads of its own part. The router,
    which every rank has whole, says which experts are chosen among, wherever they lie.
    """
    settings, cuts = decoder.settings, [one for one in cut.blocks if one is not None]
    here = range(len(decoder.blocks)) if decoder.span is None else decoder.span.blocks
    shapes, in_attention = shapes_of(settings), any(one.in_attention for one in cuts)
    block, prefix = decoder.blocks[here[0]], f"blocks.{here[0]}."
    for name, parameter in block.named_parameters():
        whole = shapes.get(prefix + name)
        if whole is None or parameter.shape == whole or not any(name in one.regions for one in cuts):
            continue
        if getattr(parameter, "box_in_whole", None) is None:
            raise BudgetError(
                f"{prefix}{name} is here a part of shape {tuple(parameter.shape)} of {whole}: experts that are divided "
                "among ranks can be left out, and not made narrower; use data, tensor or pipeline parallelism"
            )
    if decoder.sequence is not None and in_attention:
        raise BudgetError("rows are divided over ranks by heads or pieces: budgets of heads cannot be run there")
