"""Decoders from GGUF files, the format of llama.cpp: Llama (and Mistral), Qwen2 and Qwen3.

Quantised tensors become float32 exactly as the `gguf` package (an extra: `pip install resilin[gguf]`) defines them.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from resilin.config.errors import explain
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.gguf_file import GGUFFile, TensorPlace, open_gguf
from resilin.models.weight_files import ModelFolderError

ARCHITECTURES = ("llama", "qwen2", "qwen3")

_PLAIN = {"token_embd.weight": "embed.weight", "output_norm.weight": "norm.weight", "output.weight": "head.weight"}
_IN_LAYER = {
    "attn_norm": "attention_norm",
    "attn_q": "attention.q",
    "attn_k": "attention.k",
    "attn_v": "attention.v",
    "attn_output": "attention.o",
    "attn_q_norm": "attention.q_norm",
    "attn_k_norm": "attention.k_norm",
    "ffn_norm": "mlp_norm",
    "ffn_gate": "mlp.gate",
    "ffn_up": "mlp.up",
    "ffn_down": "mlp.down",
}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_ROPE_FACTORS = "rope_freqs.weight"


def _shortest(value: float) -> float:
    """The decimal a float32 was written from: 1e-05 rather than 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(meta: dict[str, Any], factors: Tensor | None, positions: int) -> dict[str, Any] | None:
    kind = meta.pop("rope.scaling.type", "none")
    factor = meta.pop("rope.scaling.factor", None)
    original = meta.pop("rope.scaling.original_context_length", None)
    attention = meta.pop("rope.scaling.attn_factor", None)
    if factors is not None:
        # Llama 3.1: the divisors of the speeds are stored ready made.
        divisors = [float(value) for value in factors]
        shared = {"short_factor": divisors, "long_factor": divisors}
        return {"kind": "longrope", **shared, "original_max_positions": positions, "attention_factor": 1.0}
    if kind == "none":
        return None
    if kind == "linear":
        return {"kind": "linear", "factor": factor}
    if kind == "yarn" and attention is None:
        return {"kind": "yarn", "factor": factor, "original_max_positions": original or positions}
    raise ModelFolderError(f"rope.scaling.type {kind!r}, as this file uses it, is not supported; linear and yarn are")


def settings_from_metadata(
    metadata: Mapping[str, Any], tensors: Mapping[str, TensorPlace], factors: Tensor | None = None
) -> DecoderSettings:
    """Decoder settings from GGUF metadata.

    Args:
        metadata: of the file.
        tensors: of the file: which of them are there says what the model has.
        factors: the values of `rope_freqs.weight`, where the file has it.

    Raises:
        ModelFolderError: another architecture, or a key that this decoder would have to ignore, by name.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ModelFolderError(f"general.architecture {architecture!r} is not one of {', '.join(ARCHITECTURES)}")
    prefix = f"{architecture}."
    meta = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}

    def need(key: str) -> Any:
        if key not in meta:
            raise ModelFolderError(f"the metadata lack {prefix}{key}")
        return meta.pop(key)

    heads, hidden, positions = need("attention.head_count"), need("embedding_length"), need("context_length")
    head_size = meta.pop("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if meta.pop(key, head_size) != head_size:
            raise ModelFolderError(f"{prefix}{key} differs from the head size {head_size}: not supported")
    vocabulary = meta.pop("vocab_size", None) or tensors["token_embd.weight"].shape[0]
    tree = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "layers": need("block_count"),
        "heads": heads,
        "kv_heads": meta.pop("attention.head_count_kv", heads),
        "head_size": None if head_size * heads == hidden else head_size,
        "mlp_size": need("feed_forward_length"),
        "norm_eps": _shortest(need("attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(meta.pop("rope.freq_base", 10000.0)),
        "rope_scaling": _rope_scaling(meta, factors, positions),
        "max_positions": positions,
        "qk_norm": "rms" if "blk.0.attn_q_norm.weight" in tensors else "none",
        "qkv_bias": "blk.0.attn_q.bias" in tensors,
        "out_bias": "blk.0.attn_output.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "tie_embeddings": "output.weight" not in tensors,
        "sliding_window": meta.pop("attention.sliding_window", None),
    }
    if meta:
        raise ModelFolderError(f"{prefix}{next(iter(meta))} is not known; it may change what the model computes")
    try:
        return DecoderSettings.model_validate(tree)
    except ValidationError as error:
        raise ModelFolderError(str(explain(error, tree, "GGUF metadata"))) from None


def _dequantised(file: GGUFFile, place: TensorPlace) -> Tensor:
    """A tensor of the file in float32."""
    try:
        constants, quants = importlib.import_module("gguf.constants"), importlib.import_module("gguf.quants")
    except ImportError:
        raise ModelFolderError("reading GGUF weights needs the gguf package: pip install 'resilin[gguf]'") from None
    try:
        kind = constants.GGMLQuantizationType(place.kind)
    except ValueError:
        raise ModelFolderError(f"{file.path}: {place.name}: unknown GGML type {place.kind}") from None
    block, block_bytes = constants.GGML_QUANT_SIZES[kind]
    *rows, width = place.shape
    row_bytes = width // block * block_bytes
    size = int(np.prod(rows, dtype=np.int64)) * row_bytes
    if place.start + size > len(file.data) or width % block:
        raise ModelFolderError(f"{file.path}: {place.name}: the file ends before the tensor does: it is cut short")
    raw = np.frombuffer(file.data, np.uint8, size, place.start).reshape(*rows, row_bytes)
    if kind.name == "F32":
        values = raw.view(np.float32)
    elif kind.name == "F16":
        values = raw.view(np.float16).astype(np.float32)
    else:
        values = quants.dequantize(raw, kind)
    if not values.flags.writeable:  # still the mapped file
        values = values.copy()
    return torch.from_numpy(values.reshape(place.shape))


def _undo_interleaving(weight: Tensor, heads: int) -> Tensor:
    """Rows of a llama.cpp Llama query or key matrix, in which the partners of a pair lie side by side, as ours."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, half, 2, -1).transpose(1, 2).reshape(weight.shape)


def _place_in_decoder(name: str) -> str | None:
    if name in _PLAIN:
        return _PLAIN[name]
    match = _BLOCK.fullmatch(name)
    if match is None or match[2] not in _IN_LAYER:
        return None
    return f"blocks.{match[1]}.{_IN_LAYER[match[2]]}.{match[3]}"


def _settings_of(file: GGUFFile) -> DecoderSettings:
    factors = _dequantised(file, file.tensors[_ROPE_FACTORS]) if _ROPE_FACTORS in file.tensors else None
    if "token_embd.weight" not in file.tensors:
        raise ModelFolderError(f"{file.path}: has no tensor 'token_embd.weight': is it a language model?")
    try:
        return settings_from_metadata(file.metadata, file.tensors, factors)
    except ModelFolderError as error:
        raise ModelFolderError(f"{file.path}: {error}") from None


def gguf_settings(path: Path | str) -> DecoderSettings:
    """The settings of the decoder a GGUF file holds; its weights are not read.

    Raises:
        ModelFolderError: as `load_gguf`.
    """
    return _settings_of(open_gguf(path))


@torch.no_grad()
def load_gguf(path: Path | str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Decoder:
    """The decoder a GGUF file holds, its weights dequantised.

    Args:
        path: the .gguf file.
        dtype: of the parameters in memory.
        device: where they live.

    Raises:
        ModelFolderError: not such a file, cut short, another architecture, or something this decoder does not have.
    """
    file = open_gguf(path)
    settings = _settings_of(file)
    model = Decoder(settings, seed=None, device="meta").to(dtype).to_empty(device=device)
    parameters = dict(model.named_parameters())
    interleaved = file.metadata["general.architecture"] == "llama"
    for name, place in file.tensors.items():
        if name == _ROPE_FACTORS:
            continue
        ours = _place_in_decoder(name)
        parameter = parameters.pop(ours, None) if ours else None
        if parameter is None:
            raise ModelFolderError(f"{file.path}: tensor {name!r} has no place in a model of these metadata")
        values = _dequantised(file, place)
        if values.shape != parameter.shape:
            raise ModelFolderError(
                f"{file.path}: {name} has shape {tuple(values.shape)}; the metadata ask for {tuple(parameter.shape)}"
            )
        if interleaved and ".attn_q." in name:
            values = _undo_interleaving(values, settings.heads)
        elif interleaved and ".attn_k." in name:
            values = _undo_interleaving(values, settings.key_heads)
        parameter.copy_(values)
    if parameters:
        raise ModelFolderError(f"{file.path}: has no tensor for {next(iter(parameters))!r}")
    return model
