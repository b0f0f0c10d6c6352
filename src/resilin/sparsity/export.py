"""A sparse model on disk: weights with exact zeros that any program opens, the masks, and SLoRB beside them.

    folder/config.json, model.safetensors     the masked weights, a Hugging Face folder
    folder/sparsity/masks.safetensors         one boolean tensor for each masked weight, under its name in the folder
    folder/sparsity/sparsity.json             the pattern, and what is kept
    folder/slorb/                             S and X as a LoRA adapter that `peft` opens (A = X, B = S, scale 1)

Nothing is decided here: the masks are those the model was last evaluated with.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from resilin.models.decoder import Decoder
from resilin.models.huggingface import save_pretrained
from resilin.models.huggingface_families import config_from_settings
from resilin.models.huggingface_names import stored_tensors
from resilin.models.weight_files import write_atomically
from resilin.sparsity.linear import SparseLinear
from resilin.sparsity.masks import sparse_layers
from resilin.sparsity.settings import NAME, SparsityError

MASKS, ABOUT, ADAPTER = Path("sparsity/masks.safetensors"), Path("sparsity/sparsity.json"), Path("slorb")


def zeroed(model: Decoder) -> Decoder:
    """A copy of a sparse model with ordinary layers that hold exact zeros; a correction is left out.

    Raises:
        SparsityError: the model has no masks.
    """
    _needed(model)
    plain = copy.deepcopy(model)
    for name, layer in list(sparse_layers(plain)):
        parent, _, last = name.rpartition(".")
        setattr(plain.get_submodule(parent), last, layer.sparse_form())
    delattr(plain, NAME)
    return plain


def export_sparse(
    model: Decoder,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    special_ids: Mapping[str, int | None] | None = None,
) -> list[Path]:
    """Write masked weights, masks and, where there is one, the correction.

    Args:
        model: a decoder with masks, as trained (`open_model(run, plain=False)`).
        folder: made where it does not exist.
        dtype: of the stored weights. In bfloat16 and float16 a kept weight may round to zero; the masks tell.
        special_ids: for config.json, as `save_pretrained` takes them.

    Returns:
        The files written.

    Raises:
        SparsityError: the model has no masks.
        ModelFolderError: its settings fit no Hugging Face family.
    """
    layers = _needed(model)
    written = save_pretrained(zeroed(model), folder, dtype=dtype, special_ids=special_ids)
    names = _names(model)
    (folder / MASKS.parent).mkdir(exist_ok=True)
    masks = {f"{names[name]}.weight": layer.mask.cpu().contiguous() for name, layer in layers.items()}
    save_file(masks, folder / MASKS)
    any_layer = next(iter(layers.values()))
    about = {
        "pattern": f"{any_layer.n}:{any_layer.m}" if any_layer.density is None else "unstructured",
        "density": sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values()),
        "metric": any_layer.metric,
        "layers": len(masks),
    }
    write_atomically(folder / ABOUT, json.dumps(about, indent=2) + "\n")
    written += [folder / MASKS, folder / ABOUT]
    if any_layer.boost is not None:
        written += _write_adapter({names[name]: layer for name, layer in layers.items()}, folder / ADAPTER, dtype)
    return written


def read_masks(folder: Path) -> dict[str, Tensor]:
    """The masks of an exported folder, by the stored name of each weight.

    Raises:
        SparsityError: there are none, or the file is broken.
    """
    try:
        return load_file(folder / MASKS)
    except FileNotFoundError:
        raise SparsityError(f"{folder / MASKS}: no such file; was the folder written by export_sparse?") from None
    except SafetensorError as error:
        raise SparsityError(f"{folder / MASKS}: not a whole safetensors file: {error}") from None


def _needed(model: nn.Module) -> dict[str, SparseLinear]:
    layers = dict(sparse_layers(model))
    if not layers:
        raise SparsityError("the model has no masks: it is not sparse, or was opened in its plain form")
    return layers


def _names(model: Decoder) -> dict[str, str]:
    """The stored name of each masked layer."""
    plain = zeroed(model)
    family = config_from_settings(model.settings, "float32", None)["model_type"]
    stored = [name.removesuffix(".weight") for name, _ in stored_tensors(plain, family)]
    # Without experts, which hold no linear layers, every parameter is stored as one tensor and in order.
    ours = [name.removesuffix(".weight") for name, _ in plain.named_parameters()]
    if len(stored) != len(ours):
        raise SparsityError("masks of a mixture of experts cannot be written: its experts are stored one by one")
    names = dict(zip(ours, stored, strict=True))
    return {name: names[name] for name, _ in sparse_layers(model)}


def _write_adapter(layers: Mapping[str, SparseLinear], folder: Path, dtype: torch.dtype) -> list[Path]:
    folder.mkdir(exist_ok=True)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, layer in layers.items():
        matrices = layer.correction_matrices()
        assert matrices is not None
        outward, pooling = (matrix.detach().cpu().to(dtype).contiguous() for matrix in matrices)
        tensors[f"base_model.model.{name}.lora_A.weight"] = pooling
        tensors[f"base_model.model.{name}.lora_B.weight"] = outward
        ranks[name] = len(pooling)
    rank = min(ranks.values())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(folder.parent.resolve()),
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_atomically(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")
    return [folder / "adapter_model.safetensors", folder / "adapter_config.json"]
