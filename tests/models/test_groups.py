"""Groups of tokens that see each other: the rule against its definition, all ways of attention against the rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from resilin.models import mask
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.given import Given, GivenError
from resilin.models.groups import Groups, ends_of, frame_gaps
from resilin.models.mask import training_mask
from resilin.models.rope import rotation
from resilin.models.settings import ModelContext


def decoder_of(**changes: Any) -> Decoder:
    tree = {"vocab_size": 13, "hidden_size": 16, "layers": 2, "heads": 2, "kv_heads": 1, "init_std": 0.3, **changes}
    return DecoderSettings(**tree).build(ModelContext(0, None)).double()


def numbered(sizes: list[int]) -> list[int]:
    return [number for number, size in enumerate(sizes) for _ in range(size)]


@given(st.lists(st.lists(st.integers(1, 4), min_size=3, max_size=6), min_size=1, max_size=3), st.integers(0, 2))
@settings(max_examples=60, deadline=None)
def test_a_token_sees_its_group_and_all_before_it_in_its_document(rows: list[list[int]], window: int) -> None:
    width = min(sum(sizes) for sizes in rows)
    groups_BT = torch.tensor([numbered(sizes)[:width] for sizes in rows])
    documents_BT = groups_BT // 3
    # The first group of every document is text, the others are frames of one video of that document.
    frames_BT = torch.where(groups_BT % 3 == 0, -1, groups_BT)
    videos_BT = torch.where(groups_BT % 3 == 0, -1, documents_BT * 3 + 1)
    gap = frame_gaps(frames_BT, videos_BT, window) if window else None
    hidden_BT = (groups_BT % 2 == 0) & (frames_BT >= 0)
    found = training_mask(
        documents_BT, width, None, torch.device("cpu"),
        groups=Groups(ends_of(groups_BT), gap, hidden_BT, frames_BT),
    ).seen_BQS  # fmt: skip
    assert found is not None
    for b in range(len(rows)):
        group, document, frame = groups_BT[b].tolist(), documents_BT[b].tolist(), frames_BT[b].tolist()
        for q in range(width):
            for k in range(width):
                sees = document[q] == document[k] and group[k] <= group[q]
                if frame[q] >= 0 and frame[k] >= 0 and frame[q] != frame[k]:
                    sees = sees and not hidden_BT[b, k] and (not window or frame[q] - frame[k] < window)
                assert bool(found[b, q, k]) == sees, (q, k)


def grouped_rows() -> tuple[Tensor, Tensor, Tensor]:
    tokens_BT = torch.randint(13, (2, 14), generator=torch.Generator().manual_seed(1))
    groups_BT = torch.tensor([[0, 1, 1, 1, 2, 2, 3, 4, 4, 4, 4, 5, 6, 7], [0, 0, 1, 2, 2, 2, 2, 3, 3, 4, 5, 5, 5, 6]])
    documents_BT = torch.tensor([[0] * 7 + [1] * 6 + [-1], [0] * 14])
    return tokens_BT, groups_BT, documents_BT


def gradients(model: Decoder, documents_BT: Tensor, groups: Groups, tokens_BT: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    hidden = model(tokens_BT, None, documents_BT, given=Given(groups=groups)).hidden_BTD
    weigh = torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view(hidden.shape)
    (hidden * weigh * (documents_BT >= 0)[..., None]).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_tiles_and_whole_masks_give_the_same_gradients(monkeypatch: Any, softcap: float | None) -> None:
    tokens_BT, groups_BT, documents_BT = grouped_rows()
    frames_BT = torch.where(groups_BT > 1, groups_BT, -1)
    gap = frame_gaps(frames_BT, torch.full_like(frames_BT, 2), 3)
    groups = Groups(ends_of(groups_BT), gap, groups_BT == 3, frames_BT)
    model = decoder_of(attention_backend="eager", attention_softcap=softcap)
    whole = gradients(model, documents_BT, groups, tokens_BT)
    monkeypatch.setattr(mask, "LARGEST", 0)
    monkeypatch.setattr("resilin.models.tiled_attention.STEPS", {"cpu": (3, 4)})
    tiles = gradients(model, documents_BT, groups, tokens_BT)
    for name, gradient in whole.items():
        torch.testing.assert_close(tiles[name], gradient, rtol=1e-9, atol=1e-11)


def test_flex_attention_sees_the_same() -> None:
    tokens_BT, groups_BT, documents_BT = grouped_rows()
    frames_BT = torch.where(groups_BT > 1, groups_BT, -1)
    gap = frame_gaps(frames_BT, torch.full_like(frames_BT, 2), 2)
    given_ = Given(groups=Groups(ends_of(groups_BT), gap, groups_BT == 3, frames_BT))
    with torch.no_grad():
        plain = decoder_of()(tokens_BT, None, documents_BT, given=given_).hidden_BTD
        flex = decoder_of(attention_backend="flex")(tokens_BT, None, documents_BT, given=given_).hidden_BTD
    torch.testing.assert_close(flex, plain, rtol=1e-9, atol=1e-11)


def test_groups_of_single_tokens_are_text() -> None:
    tokens_BT, _, documents_BT = grouped_rows()
    model = decoder_of()
    alone = Groups(ends_of(torch.arange(14).expand(2, 14)))
    for documents in (None, documents_BT):
        expected = model(tokens_BT, None, documents).hidden_BTD
        found = model(tokens_BT, None, documents, given=Given(groups=alone)).hidden_BTD
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_a_packed_document_is_what_it_is_alone() -> None:
    tokens_BT, groups_BT, documents_BT = grouped_rows()
    model, positions = decoder_of(), torch.tensor([[*range(7), *range(7)], [*range(14)]])
    whole = model(tokens_BT, positions, documents_BT, given=Given(groups=Groups(ends_of(groups_BT)))).hidden_BTD
    part = slice(7, 13)
    alone = Groups(ends_of(groups_BT[:1, part]))
    found = model(tokens_BT[:1, part], positions[:1, part], None, given=Given(groups=alone)).hidden_BTD
    torch.testing.assert_close(found, whole[:1, part], rtol=1e-9, atol=1e-11)


def test_a_later_group_changes_nothing_and_a_neighbour_of_the_group_does() -> None:
    tokens_BT, groups_BT, _ = grouped_rows()
    model, given_ = decoder_of(), Given(groups=Groups(ends_of(groups_BT)))
    before = model(tokens_BT, given=given_).hidden_BTD
    changed_BT = tokens_BT.clone()
    changed_BT[0, 9] = (changed_BT[0, 9] + 1) % 13  # the third of the group at 7 to 10
    after = model(changed_BT, given=given_).hidden_BTD
    assert torch.equal(after[0, :7], before[0, :7])
    assert bool((after[0, 7:] != before[0, 7:]).any(1).all())


def test_equal_coordinates_are_ordinary_positions_bit_for_bit() -> None:
    own = DecoderSettings(vocab_size=5, hidden_size=40, heads=2)
    place_BT = torch.randint(4000, (2, 9))
    plain, three = rotation(own, place_BT, 1), rotation(own, place_BT[..., None].expand(2, 9, 3).float(), 1)
    assert torch.equal(plain.cos, three.cos)
    assert torch.equal(plain.sin, three.sin)
    moved = place_BT[..., None].expand(2, 9, 3).float().clone()
    moved[..., 1] += 0.5
    turned = rotation(own, moved, 1)
    differs = (turned.cos != plain.cos).any(0).any(0)[0, :10]
    assert differs.tolist() == [pair % 3 == 1 for pair in range(10)]


def test_what_nobody_has_defined_is_refused_by_name() -> None:
    from resilin.models.loop_settings import LoopSettings

    tokens_BT, groups_BT, _ = grouped_rows()
    given_ = Given(groups=Groups(ends_of(groups_BT)))
    looped = decoder_of(loop=LoopSettings())
    with pytest.raises(GivenError, match=r"model\.loop"):
        looped(tokens_BT, given=given_)
