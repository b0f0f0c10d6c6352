"""Attention under masks that are rules, and that long rows never meet a whole mask or all their logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from resilin.models import tiled_attention as tiled
from resilin.models.attention_core import AttentionCore
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.mask import LARGEST, Mask, rule_mask, training_mask
from resilin.models.mask_rule import MaskRule

CPU = torch.device("cpu")


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 40),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2), (3, 3)]),
    window=st.one_of(st.none(), st.integers(1, 12)),
    cuts=st.lists(st.integers(1, 39), max_size=4),
    softcap=st.sampled_from([None, 2.0]),
    goes_on=st.booleans(),
    seed=st.integers(0, 9),
)
def test_outputs_and_gradients_are_those_of_a_whole_mask(tokens, heads, window, cuts, softcap, goes_on, seed):
    generator = torch.Generator().manual_seed(seed)
    documents = (torch.arange(tokens)[:, None] >= torch.tensor([0, *cuts])).sum(1).repeat(2, 1)
    documents[1] = 1  # rows differ
    continues = (documents - 1).where((documents > 1) & goes_on, -1) if cuts else None
    positions = torch.arange(tokens).repeat(2, 1)
    q, k, v, pull = (
        torch.randn(2, n, tokens, 4, dtype=torch.float64, generator=generator)
        for n in (heads[0], heads[1], heads[1], heads[0])
    )
    whole, rule = (
        make(documents, tokens, window, *more, continues, positions)
        for make, more in ((training_mask, (CPU,)), (rule_mask, ()))
    )
    core = AttentionCore(
        DecoderSettings(
            heads=heads[0], kv_heads=heads[1], head_size=4, attention_softcap=softcap, attention_backend="eager"
        )
    )
    inputs = [x.requires_grad_() for x in (q, k, v)]
    wanted = core(*inputs, whole)
    before = tiled.STEPS
    tiled.STEPS = {"cpu": (8, 5)}
    try:
        found = core(*inputs, rule)
        gradients = torch.autograd.grad(found, inputs, pull)
    finally:
        tiled.STEPS = before
    torch.testing.assert_close(found, wanted)
    for mine, theirs in zip(gradients, torch.autograd.grad(wanted, inputs, pull), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_mask_of_a_rule_is_the_whole_mask():
    documents = torch.tensor([[0, 0, 1, 1, -1], [0, 0, 0, 0, 0]])
    mask, rule = training_mask(documents, 5, 2, CPU), rule_mask(documents, 5, 2)
    assert mask.seen_BQS is not None
    assert torch.equal(rule.dense(2, 5), mask.seen_BQS)
    assert rule.rule is not None
    first = mask.seen_BQS.any(0).int().argmax(-1)
    assert torch.equal(rule.rule.first_keys, first)


def test_hidden_tiles_are_not_made():
    rule = MaskRule(4096, window=300)
    tiles = sum(
        (b - a) * (d - c) for _, group in rule.tiles((0, 4096), (0, 4096), 256, 1024) for (a, b), (c, d), _ in group
    )
    assert tiles < 4096 * (300 + 256)


def test_bfloat16_sums_in_float32():
    q, k, v = (torch.randn(1, 2, 600, 8, dtype=torch.bfloat16) for _ in range(3))
    found = tiled.tiled_attention(q, k, v, 0.3, MaskRule(600))
    exact = tiled.tiled_attention(q.double(), k.double(), v.double(), 0.3, MaskRule(600))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=1e-2, atol=1e-2)


def test_a_second_derivative_is_refused():
    x = torch.randn(1, 1, 8, 4, requires_grad=True)
    out = tiled.tiled_attention(x, x, x, 1.0, MaskRule(8))
    with pytest.raises(RuntimeError, match="no gradient of its gradient"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


class _Largest(TorchDispatchMode):
    """The most elements of a tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return out


T = 6000


@pytest.mark.parametrize(
    ("changes", "packed"),
    [
        ({}, None),
        ({}, "documents"),
        ({}, "interrupted"),
        ({"sliding_window": 500}, None),
        ({"sliding_window": 500}, "documents"),
        ({"attention_backend": "eager", "attention_softcap": 20.0}, None),
        ({"attention_backend": "flex"}, "documents"),
        ({"attention_backend": "flex", "sliding_window": 500}, "documents"),
        ({"attention_backend": "eager"}, "documents"),
        ({}, "continued"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_no_tensor_of_a_long_row_is_a_square(changes: dict[str, Any], packed: str | None, training: bool):
    settings = DecoderSettings(vocab_size=20, hidden_size=16, layers=1, heads=2, kv_heads=1, **changes)
    model, tokens = Decoder(settings, seed=1), torch.zeros(1, T, dtype=torch.int64)
    documents = continues = None
    if packed is not None:
        documents = (torch.arange(T) // (T // 3))[None]
        if packed == "interrupted":
            documents = documents % 2
        if packed == "continued":
            continues = documents - 1
    with _Largest() as largest, torch.set_grad_enabled(training):
        hidden = model(tokens, None, documents, continues_BT=continues).hidden_BTD
        if training:
            hidden.sum().backward()
    assert largest.elements <= LARGEST < T * T / 2


def test_a_short_row_has_a_whole_mask_and_a_long_one_a_rule():
    assert training_mask(None, 4096, 100, CPU).rule is None
    assert training_mask(None, 4097, 100, CPU).rule is not None
    assert training_mask(None, 4097, None, CPU) == Mask(causal=True)
