"""The multi-scale bit tokenizer, on real digits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from modality_cases import SHAPE, WHOLE, digits, tokenizer

from resilin.data.errors import DataError
from resilin.modalities.scale_tokens import ScaleTokenizer, fit
from resilin.modalities.shape import PictureShape

FINE = PictureShape(((1, 1), (2, 2), (3, 3), (4, 4), (4, 4)))


def test_held_out_digits_come_back_better_with_every_scale_and_every_bit() -> None:
    tokens, held_out = tokenizer(FINE), digits()[1400:]
    spread = held_out.var()

    def error(active: int, scales: int | None = None) -> float:
        bits = tokens.encode(held_out, active=active).bits_PMd
        return float((tokens.decode(bits, active, scales) - held_out).square().mean() / spread)

    by_scale = [error(4, scales) for scales in range(6)]
    assert by_scale == sorted(by_scale, reverse=True)
    by_bits = [error(active) for active in (1, 2, 3, 4)]
    assert by_bits == sorted(by_bits, reverse=True)
    assert by_scale[-1] < 0.1  # of the variance, with 46 tokens of 4 bits
    assert by_bits[0] < 0.5


def test_features_hold_only_coarser_scales_and_targets_add_up_to_the_picture() -> None:
    tokens, pictures = tokenizer(WHOLE), digits()[1400:1410]
    plain = tokens.encode(pictures)
    torch.testing.assert_close(tokens.pixels(plain.made_Pdhw), tokens.decode(plain.bits_PMd))
    group_N = WHOLE.group_of_place
    for scale, grid in enumerate(WHOLE.scales):
        flips = [torch.zeros(10, 4, *g, dtype=torch.bool) for g in WHOLE.scales]
        flips[scale] = torch.rand(10, 4, *grid, generator=torch.Generator().manual_seed(scale)) < 0.5
        other = tokens.encode(pictures, flips=flips)
        differs_N = (other.features_PNF != plain.features_PNF).any(2).any(0)
        assert not bool(differs_N[group_N <= scale].any())  # nothing of its own group, or of later ones
        assert bool(differs_N[group_N == scale + 1].all())
        predicted = group_N[: WHOLE.predicted]
        asked_M = (other.bits_PMd != plain.bits_PMd).any(2).any(0)
        assert not bool(asked_M[predicted <= scale].any())  # what was flipped is still asked as it should be
        assert scale == len(WHOLE.scales) - 1 or bool(asked_M[predicted > scale].any())  # and corrected later on


def test_finer_scales_correct_flipped_bits() -> None:
    tokens, pictures = tokenizer(FINE), digits()[1400:1500]
    flips = [torch.zeros(100, 4, *grid, dtype=torch.bool) for grid in FINE.scales]
    flips[1] = torch.ones_like(flips[1])
    flipped = tokens.encode(pictures, flips=flips)
    naive = tokens.encode(pictures).bits_PMd.clone()
    naive[:, 1:5] = ~naive[:, 1:5]
    corrected = (tokens.pixels(flipped.made_Pdhw) - pictures).square().mean()
    assert float(corrected) < 0.9 * float((tokens.decode(naive) - pictures).square().mean())


def test_fewer_bits_are_a_smaller_tokenizer() -> None:
    pictures = digits()[1400:1420]
    large, small = tokenizer(FINE), fit(digits()[:1400], FINE, 2, 2)
    part = large.encode(pictures, active=2)
    assert torch.equal(part.bits_PMd[..., :2], small.encode(pictures).bits_PMd)
    assert not bool(part.made_Pdhw[:, 2:].any())


def test_the_frame_before_is_a_feature_where_there_is_one() -> None:
    tokens, frames = tokenizer(), digits()[:3]
    found = tokens.encode(frames, torch.tensor([True, False, True]))
    alone = tokens.encode(frames)
    assert torch.equal(found.features_PNF[[0, 2]], alone.features_PNF[[0, 2]])
    old = found.features_PNF[1, 5:21, 4:8].t().unflatten(1, (4, 4))
    torch.testing.assert_close(old, found.made_Pdhw[0])
    assert bool((found.features_PNF[1, :, -1] == 1).all())


def test_no_pictures_are_none() -> None:
    tokens = tokenizer(WHOLE)
    found = tokens.encode(torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.bool))
    assert found.features_PNF.shape == (0, WHOLE.places, tokens.features)
    assert found.bits_PMd.shape == (0, WHOLE.predicted, 4)
    assert tokens.decode(found.bits_PMd).shape == (0, 1, 8, 8)


def test_a_file_brings_it_back(tmp_path: Path) -> None:
    before = tokenizer(WHOLE)
    before.save(tmp_path / "pictures.safetensors")
    after = ScaleTokenizer.load(tmp_path / "pictures.safetensors")
    assert after.shape == before.shape
    for name in ("mean_E", "basis_Ed", "step_Sd"):
        assert torch.equal(getattr(after, name), getattr(before, name))
    (tmp_path / "other.safetensors").write_bytes(b"no")
    with pytest.raises(DataError, match="holds no tokenizer"):
        ScaleTokenizer.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("shape", "patch", "bits", "what"),
    [
        (PictureShape(((1, 1), (3, 3))), 2, 4, "the last of the scales"),
        (PictureShape(((1, 1), (4, 4))), 2, 5, "use as many bits at most"),
        (PictureShape(((5, 4), (4, 4))), 2, 4, "coarse to fine"),
    ],
)
def test_what_cannot_be_is_refused(shape: PictureShape, patch: int, bits: int, what: str) -> None:
    with pytest.raises((DataError, ValueError), match=what):
        fit(digits()[:10], shape, patch, bits)
    with pytest.raises(DataError, match="pictures of"):
        tokenizer(SHAPE).encode(torch.zeros(1, 1, 6, 6))
