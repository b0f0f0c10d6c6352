"""Attention document by document gives what a dense mask gives, and so do its gradients, of first and second order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from resilin.keys import Keys
from resilin.models import mask as masks
from resilin.models.block_attention import BLOCK, LONGEST
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings, MoESettings
from resilin.models.span_attention import span_attention
from resilin.models.spans import Span, asked_places, spans_of

Documents = list[tuple[int, int]]  # (tokens, the document it goes on from or -1) in order


def fields(rows: list[Documents]) -> tuple[Tensor, Tensor]:
    """Document numbers and what they go on from, of rows of equal length."""
    numbers = [[n for n, (size, _) in enumerate(row) for _ in range(size)] for row in rows]
    parents = [[parent for size, parent in row for _ in range(size)] for row in rows]
    return torch.tensor(numbers), torch.tensor(parents)


def seen_one_by_one(documents: Tensor, continues: Tensor) -> Tensor:
    """The definition: own document up to itself, and the one it goes on from."""
    B, T = documents.shape
    seen = torch.zeros(B, T, T, dtype=torch.bool)
    for b in range(B):
        for q in range(T):
            for s in range(q + 1):
                parent = int(continues[b, q])
                seen[b, q, s] = documents[b, s] == documents[b, q] or (parent >= 0 and documents[b, s] == parent)
    return seen


@st.composite
def packed_rows(draw: Any) -> list[Documents]:
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        documents: Documents = []
        for size in draw(st.lists(st.integers(1, 5), min_size=1, max_size=5)):
            heads = [n for n, (_, parent) in enumerate(documents) if parent < 0]
            documents.append((size, draw(st.sampled_from([-1, *heads]))))
        rows.append(documents)
    width = max(sum(size for size, _ in row) for row in rows)
    for row in rows:
        if (rest := width - sum(size for size, _ in row)) > 0:
            row.append((rest, -1))
    return rows


@given(packed_rows())
@settings(max_examples=40, deadline=None)
def test_spans_and_the_dense_mask_are_what_the_definition_says(rows: list[Documents]) -> None:
    documents, continues = fields(rows)
    expected = seen_one_by_one(documents, continues)
    dense = masks.training_mask(documents, documents.shape[1], None, torch.device("cpu"), continues)
    assert dense.seen_BQS is not None
    assert torch.equal(dense.seen_BQS, expected)
    spans = spans_of(documents, continues)
    assert spans is not None
    by_spans = masks.Mask(causal=False, spans=spans).dense(*documents.shape)
    assert by_spans is not None
    assert torch.equal(by_spans, expected)
    covered = [place for span in spans for place in range(span.start, span.stop)]
    assert covered == list(range(documents.numel()))


def test_an_interrupted_document_has_no_spans_and_a_missing_beginning_is_an_error() -> None:
    assert spans_of(torch.tensor([[0, 0, 1, 0]])) is None
    with pytest.raises(ValueError, match="row 0: document 1 goes on from document 3"):
        spans_of(torch.tensor([[0, 1, 3]]), torch.tensor([[-1, 3, -1]]))


@given(packed_rows(), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_no_place_behind_the_last_one_asked_for_is_computed(rows: list[Documents], random: Any) -> None:
    documents, _ = fields(rows)
    asked = torch.tensor([[random.random() < 0.2 for _ in row] for row in documents.tolist()])
    T = documents.shape[1]
    expected = [
        b * T + t
        for b in range(len(documents))
        for t in range(T)
        if bool((asked[b, t:] & (documents[b, t:] == documents[b, t])).any())
    ]
    assert asked_places(documents, asked).tolist() == expected


def inputs(B: int, H: int, K: int, T: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(B + H + K + T)
    shapes = ((B, T, H, D), (B, T, K, D), (B, T, K, D))
    q, k, v = (torch.randn(s, generator=draw, dtype=torch.float64).transpose(1, 2).requires_grad_() for s in shapes)
    return q, k, v


LAYOUTS: list[list[Documents]] = [
    [[(3, -1), (2 * BLOCK + 5, -1), (1, -1)]],
    [[(BLOCK + 9, -1), (7, 0), (BLOCK + 1, 0)], [(5, -1), (2 * BLOCK + 12, -1)]],
    [[(LONGEST + 3, -1), (4, 0), (9, -1)]],  # too long to keep its weights
    [[(5, -1), (7, 0), (1, 0), (40, -1), (9, -1)], [(30, -1), (2, 0), (20, -1), (10, 2)]],  # tiny ones go together
]


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("rows", LAYOUTS)
def test_values_and_gradients_are_those_of_a_dense_mask(rows: list[Documents], key_heads: int) -> None:
    documents, continues = fields(rows)
    B, T = documents.shape
    q, k, v = inputs(B, 4, key_heads, T, 8)
    spans = spans_of(documents, continues)
    assert spans is not None
    dense = masks.training_mask(documents, T, None, torch.device("cpu"), continues).seen_BQS
    assert dense is not None
    ours = span_attention(q, k, v, 0.3, spans)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=dense[:, None], scale=0.3, enable_gqa=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(9))
    for mine, other in zip(
        torch.autograd.grad(ours, (q, k, v), upstream), torch.autograd.grad(theirs, (q, k, v), upstream), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(span_attention(q, k, v, 0.3, spans), theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("count", [3, 4])  # as blocks, and together
def test_gradient_of_the_gradient(count: int) -> None:
    q, k, v = inputs(1, 2, 1, 6, 3)
    spans = (Span(0, 2), Span(2, 4, (0, 2)), Span(4, 5, (0, 2)), Span(5, 6))[:count]
    assert torch.autograd.gradcheck(lambda *x: span_attention(*x, 0.5, spans), (q, k, v))
    assert torch.autograd.gradgradcheck(lambda *x: span_attention(*x, 0.5, spans), (q, k, v))


# -- in the decoder ---------------------------------------------------------------------------------------------------

SMALL = {"vocab_size": 61, "hidden_size": 32, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_size": 40, "init": "fan_in"}


def decoder(**more: Any) -> Decoder:
    return Decoder(DecoderSettings(**{**SMALL, **more}), seed=1).double()


def text(B: int, T: int) -> Tensor:
    return torch.randint(61, (B, T), generator=torch.Generator().manual_seed(T))


def gradients(model: Decoder, *args: Any, **more: Any) -> list[Tensor]:
    hidden = model(*args, **more).hidden_BTD
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3), dtype=hidden.dtype)
    inside = [p for name, p in model.named_parameters() if not name.startswith("head.")]
    return [hidden.detach(), *torch.autograd.grad((hidden * weights).sum(), inside)]


def plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Decoder, "attends_by_document", False)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"recompute": "block"},
        {"recompute": "selective"},
        {"sliding_window": 9, "window_layers": (1,)},
        {"moe": MoESettings(experts=4, expert_size=16)},
    ],
)
def test_a_decoder_computes_packed_rows_the_same_both_ways(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = decoder(**changes)
    documents, continues = fields([[(6, -1), (9, 0), (4, 0)], [(14, -1), (3, -1), (2, -1)]])
    positions = torch.tensor([[*range(6), *range(6, 15), *range(6, 10)], [*range(14), *range(3), *range(2)]])
    args = (text(2, 19), positions, documents)
    assert model.attends_by_document
    ours = gradients(model, *args, continues_BT=continues)
    plainly(monkeypatch)
    for mine, other in zip(ours, gradients(model, *args, continues_BT=continues), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-11)


def test_an_answer_behind_a_shared_prompt_is_what_it_is_in_a_row_of_its_own() -> None:
    model = decoder(sliding_window=5, window_layers=(0,))
    prompt, one, other = text(1, 7), text(1, 6), text(1, 9)
    documents, continues = fields([[(7, -1), (6, 0), (9, 0)]])
    positions = torch.tensor([[*range(7), *range(7, 13), *range(7, 16)]])
    with torch.no_grad():
        both = model(torch.cat((prompt, one, other), 1), positions, documents, continues_BT=continues).hidden_BTD[0]
        alone = [model(torch.cat((prompt, answer), 1)).hidden_BTD[0] for answer in (one, other)]
    torch.testing.assert_close(both[:13], alone[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(both[13:], alone[1][7:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("packed", [False, True])
def test_places_nobody_asks_for_are_left_out_and_the_others_stay_what_they_are(packed: bool) -> None:
    model = decoder()
    documents = fields([[(6, -1), (9, -1), (4, -1)], [(14, -1), (3, -1), (2, -1)]])[0] if packed else None
    asked = torch.zeros(2, 19, dtype=torch.bool)
    asked[0, [3, 8, 12]] = True
    asked[1, [2, 11, 15]] = True
    sizes: list[int] = []
    model.embed.register_forward_hook(lambda module, args, output: sizes.append(output.shape[:2].numel()))
    with torch.no_grad():
        some = model(text(2, 19), None, documents, asked_BT=asked).hidden_BTD
        whole = model(text(2, 19), None, documents).hidden_BTD
    torch.testing.assert_close(some[asked], whole[asked], rtol=1e-12, atol=1e-12)
    computed = 4 + 7 + 12 + 2 if packed else 13 + 16
    assert sizes == [computed, 38]
    assert int((some != 0).any(-1).sum()) == computed


def test_random_numbers_stay_with_their_rows() -> None:
    asked = torch.zeros(2, 19, dtype=torch.bool)
    asked[:, 3] = True
    keys = Keys(0, 0, torch.arange(2))
    model = decoder(dropout=0.5)
    assert model.draws
    with torch.no_grad():
        whole = model(text(2, 19), keys=keys).hidden_BTD
        torch.testing.assert_close(model(text(2, 19), keys=keys, asked_BT=asked).hidden_BTD, whole)
    assert not decoder().draws


def test_compiled_blocks_and_lower_precision_take_a_dense_mask() -> None:
    model = decoder()
    assert model.attends_by_document
    with torch.autocast("cpu", torch.bfloat16):
        assert not model.attends_by_document
    model.blocks[0].compile()
    assert not model.attends_by_document
    assert not decoder().to(torch.bfloat16).attends_by_document
    assert not decoder(attention_backend="eager").attends_by_document
