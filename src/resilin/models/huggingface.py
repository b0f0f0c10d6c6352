"""Decoders from and to Hugging Face folders (config.json + safetensors): Llama, Mistral, Mixtral, Qwen2/2.5/3, and
the Qwen mixtures of experts.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.huggingface_config import settings_from_config
from resilin.models.huggingface_families import config_from_settings
from resilin.models.huggingface_names import Part, parts_of, stored_tensors
from resilin.models.weight_files import ModelFolderError, read_json, read_tensors, write_atomically, write_tensors

__all__ = ["ModelFolderError", "config_from_settings", "load_pretrained", "save_pretrained", "settings_from_config"]


def fill_part(parameters: Mapping[str, nn.Parameter], part: Part, name: str, tensor: Tensor) -> int:
    """Copy a stored tensor (or its half) into the piece of a parameter it belongs to.

    Returns:
        How many elements were filled.

    Raises:
        ModelFolderError: the settings have no such parameter, or its shape differs.
    """
    parameter = parameters.get(part.parameter)
    if parameter is None:
        raise ModelFolderError(
            f"tensor {name!r} has no place in a model of these settings: is config.json of this model?"
        )
    target = parameter.data
    if part.expert is not None:
        if part.expert >= len(target):
            raise ModelFolderError(f"tensor {name!r}: config.json gives the layer only {len(target)} experts")
        target = target[part.expert]
    if part.half is not None:
        tensor = tensor.chunk(2, dim=1)[part.half]
    if tensor.shape != target.shape:
        raise ModelFolderError(
            f"tensor {name!r} has shape {tuple(tensor.shape)}; config.json asks for {tuple(target.shape)}"
        )
    target.copy_(tensor)
    return target.numel()


def folder_settings(folder: Path | str) -> DecoderSettings:
    """The settings of the decoder a Hugging Face folder holds.

    Raises:
        ModelFolderError: there is no such folder, or its config.json is missing, broken or unsupported.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelFolderError(f"{folder}: no such folder")
    return settings_from_config(read_json(folder / "config.json"))


@torch.no_grad()
def load_pretrained(
    folder: Path | str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Decoder:
    """The decoder a Hugging Face folder holds.

    Args:
        folder: with config.json and safetensors, whole or sharded.
        dtype: of the parameters in memory, whatever the files hold.
        device: where they live.

    Raises:
        ModelFolderError: what is missing, broken, unsupported or superfluous, by name.
    """
    folder = Path(folder)
    settings = folder_settings(folder)
    model = Decoder(settings, seed=None, device="meta").to(dtype).to_empty(device=device)
    parameters = dict(model.named_parameters())
    filled = dict.fromkeys(parameters, 0)
    for name, tensor in read_tensors(folder):
        if name == "lm_head.weight" and settings.tie_embeddings:
            continue  # some writers store the tied matrix twice
        parts = parts_of(name)
        if parts is None:
            raise ModelFolderError(f"{folder}: tensor {name!r} is not part of any model family known here")
        for part in parts:
            filled[part.parameter] = filled.get(part.parameter, 0) + fill_part(parameters, part, name, tensor)
    missing = [name for name, count in filled.items() if count != parameters[name].numel()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelFolderError(f"{folder}: the files hold nothing, or not all, for {missing[0]!r}{more}")
    return model


@torch.no_grad()
def save_pretrained(
    model: Decoder,
    folder: Path | str,
    tokenizer_files: Iterable[Path] = (),
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    special_ids: Mapping[str, int | None] | None = None,
) -> list[Path]:
    """Write a decoder as a Hugging Face folder that `transformers` opens.

    Args:
        model: a decoder whose settings fit one of the families.
        folder: made where it does not exist.
        tokenizer_files: copied beside the weights.
        dtype: of the stored tensors; None: the parameters' own.
        max_shard_bytes: larger models are split over files with an index.
        special_ids: `bos_token_id`, `eos_token_id`, `pad_token_id` for config.json.

    Returns:
        The files written.

    Raises:
        ModelFolderError: the settings fit no family: which ones, and what would do. Nothing is written then.
    """
    folder = Path(folder)
    stored = dtype or model.embed.weight.dtype
    config = config_from_settings(model.settings, str(stored).removeprefix("torch."), special_ids)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.to(device="cpu", dtype=stored).contiguous()
        for name, tensor in stored_tensors(model, config["model_type"])
    }
    written = write_tensors(folder, tensors, max_shard_bytes)
    for source in tokenizer_files:
        written.append(Path(shutil.copy2(source, folder / Path(source).name)))
    write_atomically(folder / "config.json", json.dumps(config, indent=2) + "\n")
    return [*written, folder / "config.json"]
