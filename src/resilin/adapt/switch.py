"""Choosing at run time which adapters a model uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from resilin.adapt.attach import adapter_parameters, attached_to, known
from resilin.adapt.linear import Attached
from resilin.adapt.targets import AdapterError


def _parameter(model: nn.Module, path: str) -> nn.Parameter:
    module, _, name = path.rpartition(".")
    found = model.get_submodule(module)._parameters[name]
    assert found is not None
    return found


@torch.no_grad()
def _swap(model: nn.Module, attached: Attached) -> None:
    """Exchange the fully trained parameters' values with those before training.

    The memory is exchanged, not written: a graph that is still to be walked back keeps what it saw.
    """
    for path, other in attached.originals.items():
        parameter = _parameter(model, path)
        held = parameter.data
        parameter.data = other.to(device=held.device, dtype=held.dtype)
        attached.originals[path] = held
    attached.swapped = not attached.swapped


def _set(model: nn.Module, attached: Attached, active: dict[str, float]) -> None:
    if attached.merged is not None:
        raise AdapterError(
            f"adapters {', '.join(attached.merged)} are merged into the weights: unmerge before choosing others"
        )
    wants_original = attached.owner is not None and attached.owner not in active
    if wants_original != attached.swapped:
        _swap(model, attached)
    attached.active = active


def use_adapters(model: nn.Module, adapters: str | Sequence[str] | Mapping[str, float]) -> None:
    """Use these adapters from now on.

    Args:
        model: with adapters attached.
        adapters: a name; names in the order in which they are applied; or names with strengths, by which what an
            adapter adds (D, B or s B A) is multiplied. Maps that have none of them compute as the base.

    Raises:
        AdapterError: for an unknown name, a dora adapter with a strength other than 1, or while some are merged.
    """
    attached = attached_to(model)
    if isinstance(adapters, str):
        adapters = [adapters]
    active = dict(adapters) if isinstance(adapters, Mapping) else dict.fromkeys(adapters, 1.0)
    for name, strength in active.items():
        if attached.settings[known(attached, name)].method == "dora" and strength != 1:
            raise AdapterError(f"adapter {name!r} is dora, which rescales the weight: its strength can only be 1")
    _set(model, attached, active)


@contextmanager
def with_adapters(model: nn.Module, adapters: str | Sequence[str] | Mapping[str, float]) -> Iterator[None]:
    """Use these adapters inside the block, and afterwards again those of before."""
    attached = attached_to(model)
    before = attached.active
    use_adapters(model, adapters)
    try:
        yield
    finally:
        _set(model, attached, before)


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The base, inside the block: without any adapter, and with the biases and modules it had before training."""
    with with_adapters(model, {}):
        yield


@contextmanager
def before_training(model: nn.Module) -> Iterator[None]:
    """The model as it was before training, inside the block: adapters that are trained are off, frozen ones stay on.

    So the reference of an adapted policy needs no second model:

        with torch.no_grad(), before_training(policy):
            reference = policy(tokens)

    Raises:
        AdapterError: an adapter that came with values is trained further: what it was is not kept.
    """
    attached = attached_to(model)
    trained = {
        name
        for name in attached.active
        if any(parameter.requires_grad for _, parameter in adapter_parameters(model, name))
    }
    further = sorted(trained & attached.loaded)
    if further:
        raise AdapterError(
            f"adapter {further[0]!r} was loaded with values and is trained further, so that switching it off does not "
            f"give the model as it was: keep it as it is (model.frozen = [{further[0]!r}]) and train another one in "
            "model.adapters, or take reference = 'cached'"
        )
    with with_adapters(model, {name: s for name, s in attached.active.items() if name not in trained}):
        yield
