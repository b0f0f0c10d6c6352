"""Decoders from and to Hugging Face folders (config.json + safetensors): Llama, Mistral, Mixtral, Qwen2/2.5/3, and
the Qwen mixtures of experts, GLM-4's, OLMo 2, FlexOlmo and Nemotron-H.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.huggingface_config import settings_from_config
from resilin.models.huggingface_families import config_from_settings
from resilin.models.huggingface_hybrid import hybrid_config, hybrid_parts, hybrid_tensors
from resilin.models.huggingface_names import Part, parts_of, stored_tensors
from resilin.models.hybrid_settings import HybridSettings
from resilin.models.own_config import has_own_config, own_config
from resilin.models.weight_files import (
    ModelFolderError,
    StoredTensor,
    open_tensors,
    read_json,
    write_atomically,
    write_tensors,
)

__all__ = ["ModelFolderError", "config_from_settings", "load_pretrained", "save_pretrained", "settings_from_config"]


Piece = tuple[tuple[slice, ...], tuple[slice, ...]]
"""Where a piece lies in a whole parameter, and where in the tensor that is to be filled."""


@dataclass(frozen=True, slots=True)
class Target:
    """A parameter to be filled, or the pieces of it that are there.

    Attributes:
        tensor: its memory.
        shape: of the whole parameter.
        pieces: which of it `tensor` has.
    """

    tensor: Tensor
    shape: tuple[int, ...]
    pieces: Sequence[Piece]

    @classmethod
    def whole(cls, tensor: Tensor) -> Target:
        """All of a parameter."""
        everything = tuple(slice(0, size) for size in tensor.shape)
        return cls(tensor, tuple(tensor.shape), ((everything, everything),))

    @property
    def wanted(self) -> int:
        """How many elements are to be filled."""
        return sum(math.prod(place.stop - place.start for place in source) for source, _ in self.pieces)


def fill_part(targets: Mapping[str, Target], part: Part, stored: StoredTensor) -> int:
    """Copy of a stored tensor (or its half) what a target has of the parameter it belongs to.

    Returns:
        How many elements were filled.

    Raises:
        ModelFolderError: the settings have no such parameter, or its shape differs.
    """
    target, name = targets.get(part.parameter), stored.name
    if target is None:
        raise ModelFolderError(
            f"tensor {name!r} has no place in a model of these settings: is config.json of this model?"
        )
    shape = target.shape
    if part.expert is not None:
        if part.expert >= shape[0]:
            raise ModelFolderError(f"tensor {name!r}: config.json gives the layer only {shape[0]} experts")
        shape = shape[1:]
    if part.half is not None:
        shape = (shape[0], 2 * shape[1], *shape[2:])
    if part.rows is not None:
        shape = (part.rows[1], *shape[1:])
    if stored.shape != shape:
        raise ModelFolderError(f"tensor {name!r} has shape {stored.shape}; config.json asks for {shape}")
    filled = 0
    for source, place in target.pieces:
        view = target.tensor[place]
        if part.expert is not None:
            first, *rest = source
            if not first.start <= part.expert < first.stop:
                continue
            source, view = tuple(rest), view[part.expert - first.start]
        elif part.half is not None:
            behind = part.half * target.shape[1]
            source = (source[0], slice(source[1].start + behind, source[1].stop + behind), *source[2:])
        elif part.rows is not None:
            source = (slice(source[0].start + part.rows[0], source[0].stop + part.rows[0]), *source[1:])
        view.copy_(stored.part(source))
        filled += view.numel()
    return filled


@torch.no_grad()
def fill_targets(folder: Path, targets: Mapping[str, Target], settings: DecoderSettings) -> None:
    """Read a folder's weights into parameters, or parts of them: no more bytes of a file than they take.

    Args:
        folder: with safetensors, whole or sharded.
        targets: every parameter of the model.
        settings: of the model; where the head is the embedding, some writers store it twice.

    Raises:
        ModelFolderError: what is missing, broken or superfluous, by name.
    """
    filled = dict.fromkeys(targets, 0)
    known: Callable[[str], list[Part] | None] = partial(parts_of, norms_after=settings.norm_place == "after")
    if isinstance(settings, HybridSettings):
        known = hybrid_parts(settings)
    for stored in open_tensors(folder):
        if stored.name == "lm_head.weight" and settings.tie_embeddings:
            continue
        if 0 in stored.shape:  # of no shared expert, say
            continue
        parts = known(stored.name)
        if parts is None:
            raise ModelFolderError(f"{folder}: tensor {stored.name!r} is not part of any model family known here")
        for part in parts:
            filled[part.parameter] = filled.get(part.parameter, 0) + fill_part(targets, part, stored)
    missing = [name for name, count in filled.items() if count != targets[name].wanted]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelFolderError(f"{folder}: the files hold nothing, or not all, for {missing[0]!r}{more}")


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
    model = settings.on_meta().to(dtype).to_empty(device=device)
    targets = {name: Target.whole(parameter.data) for name, parameter in model.named_parameters()}
    fill_targets(folder, targets, settings)
    return model


def folder_config(
    settings: DecoderSettings, dtype: torch.dtype, special_ids: Mapping[str, int | None] | None = None
) -> dict[str, Any]:
    """The content of a folder's `config.json`: of a stock architecture, or of our own for what no family has.

    Args:
        settings: of the decoder.
        dtype: of the stored tensors.
        special_ids: as in `save_pretrained`.

    Raises:
        ModelFolderError: the settings fit no family.
    """
    name, ours = str(dtype).removeprefix("torch."), has_own_config(settings)
    if isinstance(settings, HybridSettings) and not ours:
        return hybrid_config(settings, name, special_ids)
    describe = own_config if ours else config_from_settings
    return describe(settings, name, special_ids)


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
    """Write a decoder as a Hugging Face folder that `transformers` opens; where its blocks have different sizes, are
    looped or have chains, or its experts have offsets that no family has, as a folder with a config of our own
    (`resilin.models.own_config`), which only `load_pretrained` opens.

    Args:
        model: a decoder whose settings fit one of the families, or that `folder_config` describes otherwise.
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
    config = folder_config(model.settings, stored, special_ids)
    folder.mkdir(parents=True, exist_ok=True)
    named = (
        hybrid_tensors(model, model.settings)
        if isinstance(model.settings, HybridSettings)
        else stored_tensors(model, config["model_type"])
    )
    tensors = {name: tensor.to(device="cpu", dtype=stored).contiguous() for name, tensor in named}
    written = write_tensors(folder, tensors, max_shard_bytes)
    for source in tokenizer_files:
        written.append(Path(shutil.copy2(source, folder / Path(source).name)))
    write_atomically(folder / "config.json", json.dumps(config, indent=2) + "\n")
    return [*written, folder / "config.json"]
