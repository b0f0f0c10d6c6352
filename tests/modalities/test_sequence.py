"""Rows of documents of text, pictures and sound, and their positions."""

from __future__ import annotations

import pytest
import torch
from modality_cases import LEVELS, SHAPE, WHOLE, codes

from resilin.data.errors import DataError
from resilin.modalities.positions import picture_positions
from resilin.modalities.sequence import PICTURE, SOUND, TEXT, Frames, Sound, Words, places_of, row_of
from resilin.models.groups import ends_of


def test_a_row_says_what_each_position_is_and_predicts() -> None:
    frames = codes(2)
    row = row_of([[Words([5, 6]), Frames(1, SHAPE), Words([7, 8])], [Sound(frames)]], 48, LEVELS)
    kinds = [TEXT] * 2 + [PICTURE] * 37 + [TEXT] * 2 + [SOUND] * 3 + [TEXT] * 4
    assert row["modality"].tolist() == kinds
    assert row["documents"].tolist() == [0] * 41 + [1] * 3 + [-1] * 4
    assert row["tokens"][row["modality"] == TEXT].tolist() == [5, 6, 7, 8, 0, 0, 0, 0]
    assert [(t, int(label)) for t, label in enumerate(row["labels"]) if label != -100] == [(0, 6), (39, 8)]
    assert row["codes"][41:44].tolist() == [[-1] * LEVELS, *frames.tolist()]
    assert row["next_codes"][41:44].tolist() == [*frames.tolist(), [-1] * LEVELS]
    ends = ends_of(row["groups"][None])[0].tolist()
    assert ends == [0, 1, 2, *[6] * 4, *[22] * 16, *[38] * 16, *range(39, 48)]


def test_text_and_sound_have_one_coordinate_and_scales_one_centre() -> None:
    row = row_of([[Words([5, 6]), Frames(2, WHOLE), Sound(codes(2))]], 200, LEVELS)
    at_T3, kinds = row["positions"], row["modality"]
    for kind in (TEXT, SOUND):
        assert bool((at_T3[kinds == kind] == at_T3[kinds == kind][:, :1]).all())
    assert at_T3[kinds == SOUND][:, 0].tolist() == [6.0, 7.0, 8.0]  # behind a picture of 4 x 4 at 2
    per = WHOLE.places
    for frame in (0, 1):
        own_N3 = at_T3[2 + frame * per : 2 + (frame + 1) * per]
        assert bool((own_N3[:, 0] == 2 + frame).all())
        for number in range(len(WHOLE.grids)):
            scale_N3 = own_N3[WHOLE.group_of_place == number]
            torch.testing.assert_close(scale_N3[:, 1:].mean(0), torch.tensor([2.0, 2.0]))
    # A coarse cell lies at the mean of the four fine ones that it covers.
    at_N2 = picture_positions(SHAPE, 0.0, 0)[:, 1:]
    coarse_22, fine_44 = at_N2[1:5].view(2, 2, 2), at_N2[5:21].view(2, 2, 2, 2, 2)
    torch.testing.assert_close(fine_44.mean((1, 3)), coarse_22)


def test_what_does_not_fit_is_refused() -> None:
    assert places_of([Words([1]), Frames(2, SHAPE), Sound(codes(3))]) == 1 + 74 + 4
    with pytest.raises(DataError, match="raise sequence_length"):
        row_of([[Frames(2, SHAPE)]], 70)
    with pytest.raises(DataError, match="in a row of 2 levels"):
        row_of([[Sound(codes(2))]], 70, 2)
