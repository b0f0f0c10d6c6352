"""A decoder divided among ranks computes what the whole one does: the same loss, and parts of the same gradients."""

from __future__ import annotations

from tensor_cases import Case, check

DENSE = [
    Case(),
    Case(settings={"kv_heads": 2, "qkv_bias": True, "out_bias": True, "mlp_bias": True}, packed=True),
    Case(settings={"kv_heads": 1, "tie_embeddings": True, "gated": False, "mlp_bias": True}),
    Case(settings={"qk_norm": "rms", "qkv_bias": True, "dropout": 0.2}),
    Case(settings={"qk_norm": "rms", "qk_norm_over": "width", "kv_heads": 1, "norm": "layer"}),
    Case(settings={"qk_norm": "layer", "qk_norm_over": "width", "kv_heads": 2}),
    Case(settings={"qk_norm": "transplant", "qk_norm_over": "width", "kv_heads": 2}),
    Case(settings={"logit_softcap": 4.0, "vocab_size": 41}, objective={"label_smoothing": 0.1, "z_loss": 1e-3}),
    Case(settings={"mlp_size": 21, "vocab_size": 41}, vocabulary_multiple=8, weighted=True),
    Case(settings={"tie_embeddings": True, "vocab_size": 43}, objective={"chunk": 5}, weighted=True),
    Case(settings={"vocab_size": 43, "logit_softcap": 4.0}, objective={"chunk": 0}),
    Case(settings={"recompute": "block", "dropout": 0.1, "kv_heads": 2}),
    Case(settings={"recompute": "selective", "attention_backend": "eager", "attention_softcap": 5.0}),
    Case(autocast=True),
    Case(tokens=7, settings={"dropout": 0.1, "max_positions": 4, "rope_scaling": {"kind": "dynamic", "factor": 2.0}}),
]

MOE = {"experts": 4, "experts_per_token": 2, "expert_size": 10}
SPARSE = [
    Case(moe=MOE, tokens=11),
    Case(moe={**MOE, "shared_size": 6, "shared_gate": True, "dense_layers": (0,)}, packed=True),
    Case(moe={**MOE, "routing": "topk_softmax", "shared_size": 5}, settings={"recompute": "block", "dropout": 0.2}),
    Case(moe={**MOE, "normalise_weights": False}, objective={"load_balance_over": "micro_batch"}, weighted=True),
    Case(moe=MOE, settings={"recompute": "selective", "gated": False, "tie_embeddings": True}),
]


def with_sequence(cases: list[Case]) -> list[Case]:
    return [Case(**{**vars(case), "sequence": sequence}) for case in cases for sequence in (False, True)]


def test_two_ranks_compute_what_one_does() -> None:
    check(2, with_sequence(DENSE))


def test_four_ranks_compute_what_one_does() -> None:
    check(4, with_sequence(DENSE))


def test_experts_are_divided_among_ranks_that_route_alike() -> None:
    check(2, with_sequence(SPARSE))


def test_three_ranks_share_heads_columns_and_tokens_unevenly() -> None:
    cases = [
        Case(),
        Case(settings={"heads": 6, "kv_heads": 1, "hidden_size": 24, "tie_embeddings": True, "vocab_size": 41}),
        Case(settings={"heads": 8, "kv_heads": 4, "head_size": 6, "mlp_size": 22, "qkv_bias": True}),
    ]
    check(3, with_sequence(cases))
