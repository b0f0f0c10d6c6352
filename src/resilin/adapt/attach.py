"""Attaching adapters to a model, and taking them off."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from resilin.adapt.adapter import METHODS, Dora
from resilin.adapt.linear import AdaptedLinear, Attached, detached, prepare
from resilin.adapt.settings import AdapterSettings
from resilin.adapt.targets import AdapterError, ends_with, nearest, other_name, targeted
from resilin.keys import Keys

_NAME_FORM = r"[A-Za-z0-9_-]+"


def adapted_maps(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The adapted linear maps of a model, by name."""
    return {path: m for path, m in model.named_modules() if isinstance(m, AdaptedLinear)}


def attached_to(model: nn.Module) -> Attached:
    """What is attached to a model.

    Raises:
        AdapterError: nothing is.
    """
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            return module.attached
    raise AdapterError(f"this {type(model).__name__} has no adapters: attach some, or open a model that has")


def known(attached: Attached, name: str) -> str:
    """`name`, where there is such an adapter.

    Raises:
        AdapterError: there is none.
    """
    if name not in attached.settings:
        raise AdapterError(f"there is no adapter {name!r}; attached are: {', '.join(attached.settings) or 'none'}")
    return name


def attach(model: nn.Module, adapters: dict[str, AdapterSettings], *, seed: int = 0) -> Attached:
    """Attach adapters in place; the model is frozen but for them, and computes the same bits as before.

    Args:
        model: any module with linear maps; it stays of its class, and its parameters keep their names.
        adapters: by name, in the order in which they are applied; added to those attached before.
        seed: of random initial values, which are a function of it and of the map's and the adapter's names.

    Returns:
        What is now attached.

    Raises:
        AdapterError: nothing is attached then; see `targeted`. Also for names that are taken or cannot be used, and
            for a second adapter that trains parameters of the model itself.
    """
    before = adapted_maps(model)
    attached = next(iter(before.values())).attached if before else Attached()
    found = {name: targeted(model, settings, name) for name, settings in adapters.items()}
    for name, settings in adapters.items():
        _check_name(name, attached)
        if settings.dropout and not any(_takes_keys(module) for module in model.modules()):
            raise AdapterError(
                f"adapter {name!r}: dropout is drawn from keys, and no module of this {type(model).__name__} takes "
                "any (a `keys` argument of forward): set dropout = 0"
            )
    fully = {name: _fully_trained(model, settings, found[name], name) for name, settings in adapters.items()}
    owners = [name for name, parameters in fully.items() if parameters]
    if len(owners) + (attached.owner is not None) > 1:
        names = ", ".join(([attached.owner] if attached.owner else []) + owners)
        raise AdapterError(f"only one adapter may train parameters of the model itself, and {names} would: they share")
    if not before:
        model.requires_grad_(False)
    for name, settings in adapters.items():
        for path, linear in found[name].items():
            _attach_one(prepare(linear, attached, path), name, settings, seed)
        attached.settings[name] = settings
        attached.active[name] = 1.0
        if fully[name]:
            attached.owner = name
            for path, parameter in fully[name].items():
                attached.originals[path] = parameter.detach().clone()
                parameter.requires_grad_(True)
    _lend_keys(model, attached)
    return attached


def _check_name(name: str, attached: Attached) -> None:
    if re.fullmatch(_NAME_FORM, name) is None:
        raise AdapterError(f"adapter name {name!r}: use letters, digits, - and _ only")
    if name in attached.settings:
        raise AdapterError(f"an adapter called {name!r} is attached already; choose another name, or detach that one")


@torch.no_grad()
def _attach_one(linear: AdaptedLinear, name: str, settings: AdapterSettings, seed: int) -> None:
    weight = linear.weight
    floating = weight.dtype if weight.dtype.is_floating_point and weight.dtype.itemsize > 1 else torch.float32
    kind = {"device": weight.device, "dtype": torch.promote_types(floating, torch.float32)}
    adapter = METHODS[settings.method](settings, linear.in_features, linear.out_features, **kind)  # type: ignore[call-arg]
    if not weight.is_meta:
        adapter.fill(Keys.of_step(seed, 0).fold("initial adapter").fold(linear.path).fold(name))
        if isinstance(adapter, Dora):
            adapter.start_from(linear.whole_weight())
    linear.adapters[name] = adapter


def _fully_trained(
    model: nn.Module, settings: AdapterSettings, maps: dict[str, nn.Linear], name: str
) -> dict[str, nn.Parameter]:
    """The model's own parameters that an adapter trains, by name."""
    found: dict[str, nn.Parameter] = {}
    own = {path: p for path, p in model.named_parameters() if ".adapters." not in path}
    if settings.bias == "all":
        found |= {path: p for path, p in own.items() if path.rpartition(".")[2] == "bias"}
    elif settings.bias == "only":
        found |= {f"{path}.bias": m.bias for path, m in maps.items() if m.bias is not None}
    modules = dict(model.named_modules())
    for wanted in settings.modules_to_save:
        hits = [path for path in modules if path and ends_with(path, wanted)]
        hits = hits or [path for path in modules if path and ends_with(other_name(model, path), wanted)]
        inside = {path: p for hit in hits for path, p in own.items() if path.startswith(f"{hit}.")}
        if not inside:
            raise AdapterError(
                f"adapter {name!r}: modules_to_save names {wanted!r}, and no module with parameters is called so; "
                + nearest((wanted,), modules).replace("linear maps", "modules")
            )
        clash = sorted(set(hits) & set(maps))
        if clash:
            raise AdapterError(f"adapter {name!r}: {clash[0]} is both adapted and trained in full: exclude it")
        found |= inside
    return found


# -- keys -------------------------------------------------------------------------------------------------------------


def _takes_keys(module: nn.Module) -> bool:
    return "keys" in inspect.signature(module.forward).parameters


def _take_keys(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    keys = kwargs.get("keys")
    if keys is None and len(args) > module.keys_at:
        keys = args[module.keys_at]
    module.attached.keys.append(keys)


def _give_back_keys(module: Any, args: Any, output: Any) -> None:
    module.attached.keys.pop()


def _lend_keys(model: nn.Module, attached: Attached) -> None:
    """Let every module that is given keys lend them to the adapted maps inside it while it computes.

    A linear map is called with its input alone. The lending module is asked at every call, so a block that is
    computed again in the backward pass lends the keys of that call.
    """
    for module in model.modules():
        if hasattr(module, "keys_at") or not _takes_keys(module):
            continue
        if any(isinstance(inner, AdaptedLinear) for inner in module.modules()):
            names = list(inspect.signature(module.forward).parameters)
            holder: Any = module
            holder.keys_at, holder.attached = names.index("keys"), attached
            holder.key_hooks = [
                module.register_forward_pre_hook(_take_keys, with_kwargs=True),
                module.register_forward_hook(_give_back_keys, always_call=True),
            ]


def detach_all(model: nn.Module) -> None:
    """Take all adapters off, leaving the weights as they are; parameters stay frozen."""
    for module in list(model.modules()):
        if isinstance(module, AdaptedLinear):
            if module.merged_chain and module.kept is not None:
                module.kept = None
            detached(module)
    for module in model.modules():
        holder: Any = module
        if hasattr(module, "keys_at"):
            for hook in holder.key_hooks:
                hook.remove()
            for name in ("keys_at", "attached", "key_hooks"):
                delattr(holder, name)


def adapter_parameters(model: nn.Module, name: str | None = None) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of one adapter, or of all, by their names in the model."""
    for path, linear in adapted_maps(model).items():
        for adapter in linear.adapters:
            if name in (None, adapter):
                for inner, parameter in linear.adapters[adapter].named_parameters():
                    yield f"{path}.adapters.{adapter}.{inner}", parameter


def trainable_count(model: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
