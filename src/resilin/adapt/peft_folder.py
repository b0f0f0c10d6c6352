"""Adapters from and to PEFT folders: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from resilin.adapt.attach import adapted_maps, attach, attached_to, known
from resilin.adapt.linear import Attached
from resilin.adapt.peft_config import CONFIG_FILE, config_of, settings_of
from resilin.adapt.settings import AdapterSettings
from resilin.adapt.targets import AdapterError, ends_with, layer_of, other_name
from resilin.models.decoder import Decoder
from resilin.models.weight_files import ModelFolderError, read_json, write_atomically

TENSOR_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_TENSORS = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_magnitude_vector": "magnitude",
    "miss_block": "block",
    "bone_block": "block",
}
_STORED = {
    "lora": {"down": "lora_A.weight", "up": "lora_B.weight", "magnitude": "lora_magnitude_vector"},
    "block": {"block": "miss_block"},
}


# -- writing ----------------------------------------------------------------------------------------------------------


def _stored_parameter(model: nn.Module, path: str) -> str:
    module, _, name = path.rpartition(".")
    return f"{other_name(model, module)}.{name}"


def _value(model: nn.Module, attached: Attached, path: str) -> Tensor:
    """A fully trained parameter as trained, whichever value the model holds now."""
    return attached.originals[path] if attached.swapped else model.get_parameter(path)


def _where(model: nn.Module, settings: AdapterSettings, adapted: list[str]) -> dict[str, Any]:
    """PEFT's words for the maps: endings and layers where these say exactly the same, else every name."""
    linears = [path for path, m in model.named_modules() if isinstance(m, nn.Linear) and ".adapters." not in path]
    names = {path: other_name(model, path) for path in linears}
    endings = sorted({names[path].rpartition(".")[2] for path in adapted})
    layers = sorted({layer for path in adapted if (layer := layer_of(names[path])) is not None})
    alike = [path for path in linears if any(ends_with(names[path], ending) for ending in endings)]
    within = [path for path in alike if layer_of(names[path]) in layers]
    # Whole names: PEFT takes every module whose name ends with these letters, `norm` being the end of `layernorm`.
    saved = {other_name(model, path) for path in _saved_modules(model, settings)}
    where: dict[str, Any] = {"layers_to_transform": None, "exclude_modules": None}
    if set(alike) == set(adapted):
        where["target_modules"] = endings
    elif set(within) == set(adapted):
        where |= {"target_modules": endings, "layers_to_transform": layers}
    else:
        where["target_modules"] = sorted(names[path] for path in adapted)
    return where | {"modules_to_save": sorted(saved) or None}


def _saved_modules(model: nn.Module, settings: AdapterSettings) -> list[str]:
    return [
        path
        for path, _ in model.named_modules()
        if path
        and ".adapters" not in path
        and any(ends_with(path, w) or ends_with(other_name(model, path), w) for w in settings.modules_to_save)
    ]


def save_adapter(model: nn.Module, folder: Path | str, name: str = "default", *, base: str | None = None) -> list[Path]:
    """Write one adapter as a folder that `peft.PeftModel.from_pretrained` opens.

    Args:
        model: with the adapter attached; of a decoder, modules get their Hugging Face names.
        folder: made where it does not exist.
        name: of the adapter.
        base: the folder or hub name of the base model, for PEFT to find it.

    Returns:
        The files written.

    Raises:
        AdapterError: an unknown name, a method PEFT lacks (bat_row, bat_ab), or something it could not open.
    """
    attached = attached_to(model)
    settings = attached.settings[known(attached, name)]
    maps = {path: m for path, m in adapted_maps(model).items() if name in m.adapters}
    config = config_of(settings, _where(model, settings, list(maps)), base=base, causal=isinstance(model, Decoder))
    kind = _STORED["lora" if config["peft_type"] == "LORA" else "block"]
    tensors: dict[str, Tensor] = {}
    for path, linear in maps.items():
        if isinstance(model, Decoder) and (other_name(model, path) == path or path.endswith("moe.router")):
            raise AdapterError(f"{path} is no linear map in transformers: PEFT could not attach {name!r} there")
        if config["peft_type"] == "MISS" and settings.rank > linear.in_features:
            raise AdapterError(f"{path}: PEFT refuses a rank ({settings.rank}) above the inputs ({linear.in_features})")
        for inner, parameter in linear.adapter(name).named_parameters():
            tensors[f"{_PREFIX}{other_name(model, path)}.{kind[inner]}"] = parameter
    if attached.owner == name:
        tensors |= _full_tensors(model, attached, settings, set(maps))
    written = {key: tensor.detach().to("cpu").contiguous().clone() for key, tensor in tensors.items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / (TENSOR_FILE + ".part")
    save_file(written, temporary, metadata={"format": "pt"})
    write_atomically(folder / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True) + "\n")
    temporary.chmod((folder / CONFIG_FILE).stat().st_mode)
    temporary.replace(folder / TENSOR_FILE)
    return [folder / CONFIG_FILE, folder / TENSOR_FILE]


def _full_tensors(model: nn.Module, attached: Attached, settings: AdapterSettings, maps: set[str]) -> dict[str, Tensor]:
    tied = isinstance(model, Decoder) and model.head is None
    tensors = {}
    for path in attached.originals:
        module, _, last = path.rpartition(".")
        if tied and path == "embed.weight":
            raise AdapterError(
                "modules_to_save holds the embedding, which is also the output head here: PEFT would train only one of "
                "the two; export the merged model instead"
            )
        stored = other_name(model, module)
        layer = ".base_layer" if module in maps else ""
        tensors[f"{_PREFIX}{stored}{layer}.{last}"] = _value(model, attached, path)
    return tensors


# -- reading ----------------------------------------------------------------------------------------------------------


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a dict
    except FileNotFoundError:
        pickle = path.with_name("adapter_model.bin")
        hint = "; its adapter_model.bin is a pickle, and Resilin opens none" if pickle.exists() else ""
        raise AdapterError(f"{path}: no such file{hint}") from None
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: not a whole safetensors file: {error}") from None


def read_folder(folder: Path | str) -> tuple[AdapterSettings, dict[str, Any], dict[str, Tensor]]:
    """The settings, the configuration and the tensors of a PEFT folder.

    Raises:
        AdapterError: something is missing, broken or not known here.
    """
    folder = Path(folder)
    if not (folder / CONFIG_FILE).is_file():
        inside = ", ".join(sorted(item.name for item in folder.iterdir())[:8]) if folder.is_dir() else ""
        held = f"; it holds {inside or 'nothing'}" if folder.is_dir() else "; there is no such folder"
        if (folder / "settings.toml").is_file():
            held = f": it is a run, whose adapter `resilin adapter save {folder} FOLDER` writes as one"
        raise AdapterError(f"{folder}: is not a PEFT folder: it should hold {CONFIG_FILE} and {TENSOR_FILE}{held}")
    path = folder / CONFIG_FILE
    try:
        config = read_json(path)
        settings = settings_of(config, str(path))
    except ModelFolderError as error:
        raise AdapterError(str(error)) from None
    except ValidationError as error:
        raise AdapterError(f"{path}: {error.errors()[0]['msg']}") from None
    return settings, config, _read_tensors(folder / TENSOR_FILE)


def _own_modules(model: nn.Module) -> dict[str, str]:
    """From the names in a PEFT folder to the model's own."""
    names = {other_name(model, path): path for path, _ in model.named_modules()}
    return names | {path: path for path, _ in model.named_modules()}


def _sort(
    tensors: Mapping[str, Tensor], model: nn.Module, folder: Path
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The tensors by map and parameter, and those of fully trained parameters by name."""
    own = _own_modules(model)
    of_maps: dict[str, dict[str, Tensor]] = {}
    full: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        inner = key.removeprefix(_PREFIX)
        for ending, parameter in _TENSORS.items():
            if inner.endswith(f".{ending}") and inner.removesuffix(f".{ending}") in own:
                of_maps.setdefault(own[inner.removesuffix(f".{ending}")], {})[parameter] = tensor
                break
        else:
            module, _, last = inner.replace(".base_layer.", ".").rpartition(".")
            if module not in own or own[module] + f".{last}" not in dict(model.named_parameters()):
                raise AdapterError(
                    f"{folder / TENSOR_FILE}: {key!r} has no place in this {type(model).__name__}: was the adapter "
                    "trained on another model?"
                )
            full[f"{own[module]}.{last}"] = tensor
    if not of_maps:
        raise AdapterError(f"{folder / TENSOR_FILE}: holds no adapter's tensor")
    return of_maps, full


@torch.no_grad()
def load_adapter(model: nn.Module, folder: Path | str, name: str = "default") -> AdapterSettings:
    """Attach the adapter of a PEFT folder, trainable.

    Args:
        model: its base.
        folder: with adapter_config.json and adapter_model.safetensors; LoRA, DoRA, rsLoRA, MiSS and the older Bone.
        name: it is called so from now on.

    Returns:
        Its settings, the maps named one by one.

    Raises:
        AdapterError: the folder is not one, or belongs to another model; nothing is attached then.
    """
    folder = Path(folder)
    settings, _, tensors = read_folder(folder)
    of_maps, full = _sort(tensors, model, folder)
    linears = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    strangers = sorted(set(of_maps) - set(linears))
    if strangers:
        raise AdapterError(f"{folder}: adapts {strangers[0]}, which is no linear map in this {type(model).__name__}")
    saved = {path.rpartition(".")[0] for path in full if not path.endswith(".bias")}
    where = {"targets": tuple(sorted(of_maps)), "exclude": _shadowed(of_maps, linears)}
    exact = settings.model_copy(update={**where, "modules_to_save": tuple(sorted(saved))})
    _check_shapes(exact, of_maps, linears, folder)
    attached = attach(model, {name: exact})
    attached.loaded.add(name)
    for path, parts in of_maps.items():
        parameters = dict(adapted_maps(model)[path].adapter(name).named_parameters())
        for parameter, tensor in parts.items():
            parameters[parameter].copy_(tensor)
    for path, tensor in full.items():
        if path not in attached.originals:
            raise AdapterError(f"{folder}: holds {path}, which its {CONFIG_FILE} does not say is trained")
        model.get_parameter(path).copy_(tensor)
    return exact


def _shadowed(of_maps: Mapping[str, Any], linears: Mapping[str, nn.Linear]) -> tuple[str, ...]:
    """Maps whose names end with a whole adapted name without being it."""
    return tuple(path for path in linears if path not in of_maps and any(ends_with(path, own) for own in of_maps))


def _check_shapes(
    settings: AdapterSettings, of_maps: Mapping[str, Mapping[str, Tensor]], linears: Mapping[str, nn.Linear], at: Path
) -> None:
    from resilin.adapt.adapter import METHODS

    for path, parts in of_maps.items():
        linear = linears[path]
        made = METHODS[settings.method](settings, linear.in_features, linear.out_features, device="meta")  # type: ignore[call-arg]
        expected = {inner: tuple(p.shape) for inner, p in made.named_parameters()}
        got = {inner: tuple(t.shape) for inner, t in parts.items()}
        if expected != got:
            raise AdapterError(
                f"{at / TENSOR_FILE}: {path} should have {expected} for {settings.method} of rank {settings.rank} on a "
                f"{linear.out_features} x {linear.in_features} map, and has {got}"
            )
