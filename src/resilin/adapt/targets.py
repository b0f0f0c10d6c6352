"""Which linear maps an adapter goes to."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable

from torch import Tensor, nn

from resilin.adapt.adapter import misfit
from resilin.adapt.settings import AdapterSettings
from resilin.config.errors import UserError
from resilin.models.chain_freeze import chain_of
from resilin.models.chain_linear import Chained
from resilin.models.decoder import Decoder
from resilin.models.huggingface_names import stored_module
from resilin.models.linear import Linear

ALL = "all-linear"
_NUMBER = re.compile(r"\.(\d+)\.")
_CHAIN = re.compile(r"\.chains\.\d+$")


class AdapterError(UserError):
    """Adapters that cannot be attached, read or written as asked; the text says why."""


def other_name(model: nn.Module, name: str) -> str:
    """A module's Hugging Face name where the model is a decoder, else its own."""
    return (stored_module(name) or name) if isinstance(model, Decoder) else name


def ends_with(name: str, ending: str) -> bool:
    """Whether a module's name is `ending`, or ends with it after a dot."""
    return name == ending or name.endswith(f".{ending}")


def _matcher(patterns: str | tuple[str, ...], where: str) -> Callable[[str], bool]:
    """Names: the end of a module's name. A single text: a regular expression for all of it."""
    if isinstance(patterns, str):
        try:
            compiled = re.compile(patterns)
        except re.error as error:
            raise AdapterError(f"{where} ({patterns!r}) is not a regular expression: {error}") from None
        return lambda name: compiled.fullmatch(name) is not None or ends_with(name, patterns)
    return lambda name: any(ends_with(name, ending) for ending in patterns)


def layer_of(name: str) -> int | None:
    """The first number in a module's name."""
    found = _NUMBER.search(f".{name}.")
    return int(found[1]) if found else None


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def nearest(patterns: str | tuple[str, ...], names: Iterable[str]) -> str:
    """For people: names like those that were asked for."""
    known = sorted({_last(name) for name in names if name and not _last(name).isdigit() and ".adapters" not in name})
    asked = [patterns] if isinstance(patterns, str) else list(patterns)
    near: list[str] = []
    for pattern in asked:
        near += difflib.get_close_matches(_last(pattern), known, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(dict.fromkeys(near))}? " if near else ""
    return f"{hint}linear maps here end with: {', '.join(known) or 'none'}"


def _used_by_weight(model: nn.Module) -> frozenset[nn.Module]:
    """The head: losses compute its product in chunks from the weight itself, so an adapter on it would do nothing."""
    head = model.head if isinstance(model, Decoder) else None
    return frozenset(head.modules()) if head is not None else frozenset()


def _frozen_chains(model: nn.Module) -> int:
    """How many leading chains of a decoder are to stay as they are."""
    chains = model.settings.chains if isinstance(model, Decoder) else None
    return 0 if chains is None else chains.frozen


def _names_of(model: nn.Module, path: str) -> tuple[str, ...]:
    """What a module can be asked for by; a chain's part of a map also by the names of the map."""
    names = (path, other_name(model, path))
    return tuple(dict.fromkeys((*names, *(_CHAIN.sub("", name) for name in names))))


def targeted(model: nn.Module, settings: AdapterSettings, name: str) -> dict[str, nn.Linear]:
    """The linear maps that an adapter goes to, by name; of a decoder with frozen chains, those of later ones only.

    Args:
        model: not changed.
        settings: of the adapter.
        name: of the adapter, for messages.

    Raises:
        AdapterError: nothing matches (with near names), something matched is no linear map, a size does not fit the
            method (with the nearest that do), or a quantised weight stands where the weight itself is needed.
    """
    where = f"adapter {name!r}"
    linears = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    names = {path: _names_of(model, path) for path, _ in model.named_modules()}
    head, frozen = _used_by_weight(model), _frozen_chains(model)
    everything = settings.targets == ALL
    wanted = _matcher(settings.targets, f"{where}: targets")
    unwanted = _matcher(settings.exclude, f"{where}: exclude") if settings.exclude else (lambda _: False)
    found: dict[str, nn.Linear] = {}
    for path, module in model.named_modules():
        if not path or ".adapters." in path or isinstance(module, Chained) or chain_of(f"{path}.") < frozen:
            continue
        if everything:
            hit = path in linears and module not in head and _last(path) != "router"
        else:
            hit = any(map(wanted, names[path]))
        hit = hit and (settings.layers is None or layer_of(path) in settings.layers)
        if not hit or any(map(unwanted, names[path])):
            continue
        if module in head:
            raise AdapterError(
                f"{where}: {path} is the output head, which is used by its weight and not called: an adapter there "
                "would do nothing; train it in full with modules_to_save = ['head']"
            )
        if path not in linears:
            if isinstance(settings.targets, str):
                continue  # a regular expression may well match a block on the way
            raise AdapterError(f"{where}: {path} is a {type(module).__name__}; adapters go on linear maps only")
        found[path] = linears[path]
    if not found:
        asked = settings.targets if settings.layers is None else f"{settings.targets} in layers {settings.layers}"
        all_names = [other for path in linears for other in names[path]]
        raise AdapterError(f"{where}: {asked} matches no linear map; {nearest(settings.targets, all_names)}")
    problem = misfit(settings, {path: (m.out_features, m.in_features) for path, m in found.items()})
    if problem:
        raise AdapterError(f"{where}: {problem}")
    for path, linear in found.items():
        _check_weight(where, path, linear, settings)
    return found


def _check_weight(where: str, path: str, linear: nn.Linear, settings: AdapterSettings) -> None:
    if is_quantised(linear) and settings.method in ("bat_col", "dora"):
        raise AdapterError(
            f"{where}: {path} has a quantised weight ({linear.weight.dtype}), and {settings.method} computes with the "
            "weight itself: use miss, mini, lora, rslora, bat_row or bat_ab, which need its products only"
        )
    if not (is_plain_map(linear) or tells_weight(linear)) and settings.method in ("bat_col", "dora"):
        raise AdapterError(
            f"{where}: {path} is a {type(linear).__name__}, which does more than multiply by its weight, and "
            f"{settings.method} computes with the weight itself: use miss, mini, lora, rslora, bat_row or bat_ab, "
            "which need its products only"
        )


def is_plain_map(linear: nn.Linear) -> bool:
    """Whether the module computes `x W^T + b` and nothing else, whatever adapters it has."""
    own = next(c for c in type(linear).__mro__ if "forward" in vars(c) and c.__module__ != "resilin.adapt.linear")
    return own in (nn.Linear, Linear)


def tells_weight(linear: nn.Linear) -> bool:
    """Whether the module gives the matrix it multiplies by, as `whole_weight()`, whatever adapters it has."""
    mro = type(linear).__mro__
    return any("whole_weight" in vars(c) for c in mro if c.__module__ != "resilin.adapt.linear")


def is_quantised(linear: nn.Linear) -> bool:
    """Whether the weight is not a plain tensor of floating-point numbers, one for each place."""
    weight = linear.weight
    plain = type(weight.data) is Tensor and weight.dtype.is_floating_point
    full = tuple(weight.shape) == (linear.out_features, linear.in_features)
    return not (plain and full and weight.dtype.itemsize >= 2)
