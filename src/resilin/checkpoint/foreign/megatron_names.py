"""The names of Megatron's parameters: how tensor-parallel ranks cut each, and their numbers in the whole model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from resilin.checkpoint.foreign.rules import COLUMNS, REPLICATED, ROWS, TWO, VOCABULARY, VOCABULARY_SIZE

EMBEDDING = re.compile(r"(?:language_model\.)?embedding\.word_embeddings\.weight$")
_HEADS = ("output_layer.weight", "word_embeddings_for_head.weight")
_LAYER = re.compile(r"((?:.*\.)?(?:decoder|encoder|transformer)\.layers\.)(\d+)(\..*)")
_EXPERT = re.compile(r"(.*\.experts\.local_experts\.)(\d+)(\..*)")
_GROUPED_EXPERT = re.compile(r"(.*\.experts\.linear_fc[12]\.(?:weight|bias))(\d+)$")

_EXPERTS = r"(?:shared_experts\.|experts\.(?:local_experts\.\d+\.)?)?"
_FC1 = rf".*\.mlp\.({_EXPERTS}linear_fc1|dense_h_to_4h)\.(weight|bias)\d*$"
_TABLE = {
    REPLICATED: [
        r".*(layer_?norm|_layernorm|\.norm)\w*\.(weight|bias)$",
        r".*\.layer_norm_(weight|bias)$",
        r".*\.linear_proj\.bias$",
        rf".*\.mlp\.{_EXPERTS}linear_fc2\.bias\d*$",
        r".*\.(attention\.dense|mlp\.dense_4h_to_h)\.bias$",
        r".*\.mlp\.router\.(weight|expert_bias)$",
        r".*\.mlp\.shared_experts\.gate_weight$",
        r".*position_embeddings\.weight$",
        r".*rotary_pos_emb\.inv_freq$",
    ],
    ROWS: [
        r".*\.linear_proj\.weight$",
        rf".*\.mlp\.{_EXPERTS}linear_fc2\.weight\d*$",
        r".*\.(attention\.dense|mlp\.dense_4h_to_h)\.weight$",
    ],
    COLUMNS: [
        r"(.*\.)?word_embeddings\.weight$",
        r"(.*\.)?output_layer\.(weight|bias)$",
        r".*\.linear_qkv\.(weight|bias)$",
        r".*\.attention\.query_key_value\.(weight|bias)$",
    ],
}


def rules_table(args: Mapping[str, Any]) -> dict[str, Any]:
    """The rules for a model with these arguments, in the words of `rules.py`.

    Queries, keys and values lie together for each group of heads, so that a fused projection is cut between groups like
    any other column-parallel weight. A gated MLP has gate and up in one, each cut on its own.
    """
    table: dict[str, Any] = {kind: list(patterns) for kind, patterns in _TABLE.items()}
    gated = bool(args.get("swiglu") or args.get("gated_linear_unit"))
    table[TWO if gated else COLUMNS] = [*table.get(TWO if gated else COLUMNS, []), _FC1]
    if isinstance(args.get("vocab_size"), int):
        table[VOCABULARY_SIZE] = args["vocab_size"]
        table[VOCABULARY] = [r"(.*\.)?word_embeddings\.weight$", r"(.*\.)?output_layer\.(weight|bias)$"]
    return table


def is_head(name: str) -> bool:
    """Whether a parameter is the output layer's weight, which may be tied to the embedding."""
    return name.endswith(_HEADS)


def layer_of(name: str) -> int | None:
    """The number of the layer that a parameter is of."""
    match = _LAYER.fullmatch(name)
    return int(match[2]) if match else None


def with_layer(name: str, number: int) -> str:
    """The same parameter of another layer."""
    match = _LAYER.fullmatch(name)
    assert match is not None
    return f"{match[1]}{number}{match[3]}"


def expert_of(name: str) -> int | None:
    """The number of the expert that a parameter is of."""
    match = _EXPERT.fullmatch(name) or _GROUPED_EXPERT.fullmatch(name)
    return int(match[2]) if match else None


def with_expert(name: str, number: int) -> str:
    """The same parameter of another expert."""
    match = _EXPERT.fullmatch(name)
    if match:
        return f"{match[1]}{number}{match[3]}"
    match = _GROUPED_EXPERT.fullmatch(name)
    assert match is not None
    return f"{match[1]}{number}"
