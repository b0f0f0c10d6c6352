"""Where each tensor of a Hugging Face folder belongs in a decoder, and back."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from resilin.models.decoder import Decoder

_PLAIN = {
    "model.embed_tokens.weight": "embed.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
}
_IN_LAYER = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "mlp_norm",
    "self_attn.q_proj": "attention.q",
    "self_attn.k_proj": "attention.k",
    "self_attn.v_proj": "attention.v",
    "self_attn.o_proj": "attention.o",
    "self_attn.q_norm": "attention.q_norm",
    "self_attn.k_norm": "attention.k_norm",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.down",
    "modulation": "modulation",  # of looped decoders, which are in no family
    "mlp.gate": "moe.router",
    **{f"mlp.shared_experts.{matrix}_proj": f"moe.shared.{matrix}" for matrix in ("gate", "up", "down")},  # of GLM-4
    "mlp.shared_expert.gate_proj": "moe.shared.gate",
    "mlp.shared_expert.up_proj": "moe.shared.up",
    "mlp.shared_expert.down_proj": "moe.shared.down",
    "mlp.shared_expert_gate": "moe.shared_gate",
}
_PLAIN |= {
    f"model.loop.{phi}.{layer}.{kind}": f"loop.{phi}.{layer}.{kind}"
    for phi in ("time", "step")
    for layer in ("up", "down")
    for kind in ("weight", "bias")
}
_NORMS_AFTER = {"post_attention_layernorm": "attention_norm", "post_feedforward_layernorm": "mlp_norm"}
"""Of families that norm what a branch gives (OLMo 2): one of these names has another meaning elsewhere."""
_OUT_OF_LAYER = {ours: theirs for theirs, ours in _IN_LAYER.items()}
_MATRICES = {"w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
_BALANCE = "mlp.gate.e_score_correction_bias"
"""What experts are chosen by besides their affinity; DeepSeek-V3's name for it."""
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_CHAIN = re.compile(r"\.chains\.\d+(?=\.(?:weight|bias)$|$)")
"""Of decoders of chains, which are in no family: parts are named as the whole is, with their chain."""
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(\w+)\.weight")


class Part(NamedTuple):
    """A piece of a parameter and the piece of a stored tensor that fills it.

    Attributes:
        parameter: its name.
        expert: which of the stacked matrices; None for all of the parameter.
        half: (which half, of the stored rows) where gate and up are stored as one; None for the whole tensor.
        rows: (the first, of how many) stored rows, where several parameters are stored below each other.
    """

    parameter: str
    expert: int | None = None
    half: int | None = None
    rows: tuple[int, int] | None = None


def _chained(name: str, chain: str) -> str:
    """A parameter's name with its chain put in, before the kind of parameter."""
    stem, _, kind = name.rpartition(".")
    return f"{stem}{chain}.{kind}"


def parts_of(name: str, *, norms_after: bool = False) -> list[Part] | None:
    """What the stored tensor `name` fills: [] for buffers that are computed anew, None for an unknown name.

    Args:
        name: of the stored tensor.
        norms_after: whether the model norms what its branches give, not what they read.
    """
    chain = _CHAIN.search(name)
    if chain is not None:
        whole = parts_of(_CHAIN.sub("", name), norms_after=norms_after) or ()
        return [Part(_chained(part.parameter, chain[0])) for part in whole] or None
    if name in _PLAIN:
        return [Part(_PLAIN[name])]
    match = _LAYER.fullmatch(name)
    if match is None:
        return None
    layer, rest = match.groups()
    if rest == "self_attn.rotary_emb.inv_freq":
        return []
    prefix = f"blocks.{layer}."
    rest = rest.replace("block_sparse_moe.", "mlp.", 1)
    expert = _EXPERT.fullmatch(rest)
    if expert is not None and expert[2] in _MATRICES:
        return [Part(f"{prefix}moe.experts.{_MATRICES[expert[2]]}", int(expert[1]))]
    if rest == "mlp.experts.gate_up_proj":
        return [Part(f"{prefix}moe.experts.gate", half=0), Part(f"{prefix}moe.experts.up", half=1)]
    if rest == "mlp.experts.down_proj":
        return [Part(f"{prefix}moe.experts.down")]
    if rest == _BALANCE:
        return [Part(f"{prefix}moe.balance_bias")]
    stem, _, kind = rest.rpartition(".")
    ours = _NORMS_AFTER.get(stem) if norms_after and stem.endswith("layernorm") else _IN_LAYER.get(stem)
    if ours is not None and kind in ("weight", "bias"):
        return [Part(f"{prefix}{ours}.{kind}")]
    return None


def stored_module(name: str) -> str | None:
    """What the module of a decoder is called in a Hugging Face model: `blocks.0.attention.q` is
    `model.layers.0.self_attn.q_proj`; None for a module that has no counterpart.
    """
    chain = _CHAIN.search(name)
    if chain is not None:
        stored = stored_module(_CHAIN.sub("", name))
        return None if stored is None else stored + chain[0]
    whole = {ours.rpartition(".")[0]: theirs.rpartition(".")[0] for theirs, ours in _PLAIN.items()}
    if name in whole:
        return whole[name]
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if match is None or match[2] not in _OUT_OF_LAYER:
        return None
    return f"model.layers.{match[1]}.{_OUT_OF_LAYER[match[2]]}"


def stored_tensors(model: Decoder, family: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the model under the name that `family` stores it by; experts one by one, as published."""
    plain = {ours: theirs for theirs, ours in _PLAIN.items()}
    in_layer = _OUT_OF_LAYER
    if model.settings.norm_place == "after":
        in_layer = in_layer | {ours: theirs for theirs, ours in _NORMS_AFTER.items()}
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        chain = _CHAIN.search(name)
        if chain is not None:
            stem, _, kind = name.rpartition(".")
            yield f"{stored_module(stem)}.{kind}", tensor
            continue
        if name in plain:
            yield plain[name], tensor
            continue
        _, layer, rest = name.split(".", 2)
        prefix = f"model.layers.{layer}."
        if rest.startswith("moe.experts."):
            yield from _stored_experts(prefix, rest.removeprefix("moe.experts."), tensor, family)
        elif rest == "moe.router.weight" and family == "mixtral":
            yield f"{prefix}block_sparse_moe.gate.weight", tensor
        elif rest == "moe.balance_bias":
            yield prefix + _BALANCE, tensor
        else:
            stem, _, kind = rest.rpartition(".")
            there = in_layer[stem]
            if family == "glm4_moe":
                there = there.replace("shared_expert.", "shared_experts.")
            yield f"{prefix}{there}.{kind}", tensor


def _stored_experts(prefix: str, matrix: str, stacked: Tensor, family: str) -> Iterator[tuple[str, Tensor]]:
    for expert, tensor in enumerate(stacked):
        if family == "mixtral":
            old = {"gate": "w1", "up": "w3", "down": "w2"}[matrix]
            yield f"{prefix}block_sparse_moe.experts.{expert}.{old}.weight", tensor
        else:
            yield f"{prefix}mlp.experts.{expert}.{matrix}_proj.weight", tensor
