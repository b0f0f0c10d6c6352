"""Sampling goes through what training goes through."""

from __future__ import annotations

import pytest
import torch
from modality_cases import LEVELS, SHAPE, WHOLE, batch_of, codes, digits, model_of, tokenizer
from torch import Tensor

from resilin.modalities.model import Kinds
from resilin.modalities.objective import NextGroup, NextGroupLoss
from resilin.modalities.sample import sample_pictures, sample_sound
from resilin.modalities.sequence import PICTURE, Frames, Sound, Words
from resilin.modalities.shape import PictureShape


@pytest.mark.parametrize("shape", [SHAPE, WHOLE])
@pytest.mark.parametrize("window", [None, 1])
def test_a_video_drawn_as_it_is_has_the_probabilities_of_training(shape: PictureShape, window: int | None) -> None:
    model, tokens = model_of(), tokenizer(shape)
    batch = batch_of([[[Words([1, 2]), Frames(3, shape)]]], 2 + 3 * shape.places)
    loss = NextGroupLoss(NextGroup(frame_window=window), tokens)
    pictures = loss._pictures(model, batch, None)
    kinds = loss._kinds(model, batch, pictures, None)
    hidden = model(batch["tokens"], batch["positions"], batch["documents"], kinds=kinds).hidden_BTD
    known = hidden[batch["modality"] == PICTURE].view(3, shape.places, -1)[:, : shape.predicted]
    expected = model.pictures.logits(known).sigmoid()
    assert pictures is not None
    found = torch.zeros_like(expected)

    def true(frame: int, scale: int, chance: Tensor) -> Tensor:
        mine = shape.group_of_place[: shape.predicted] == scale
        found[frame, mine] = chance[0]
        return pictures.bits_PMd[frame, mine][None]

    video = sample_pictures(model, tokens, [[1, 2]], frames=3, frame_window=window, draw=true)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(video[0], tokens.pixels(tokens.encode(digits()[:3]).made_Pdhw))


def test_sound_drawn_as_it_is_has_the_logits_of_training() -> None:
    model, frames = model_of(), codes(5)
    batch = batch_of([[[Words([1, 2]), Sound(frames)]]], 8)
    loss = NextGroupLoss(NextGroup())
    kinds = loss._kinds(model, batch, None, None)
    assert isinstance(kinds, Kinds)
    expected = model(batch["tokens"], batch["positions"], batch["documents"], kinds=kinds).sound
    found = [torch.zeros_like(logits) for logits in expected]

    def true(frame: int, level: int, logits: Tensor) -> Tensor:
        found[level][frame] = logits[0]
        return frames[frame : frame + 1, level]

    assert torch.equal(sample_sound(model, [[1, 2]], 5, draw=true)[0], frames)
    for level in range(LEVELS):
        torch.testing.assert_close(found[level], expected[level])


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    model, tokens = model_of(), tokenizer()
    both = sample_pictures(model, tokens, [[1, 2], [3]], seed=4)
    assert torch.equal(both[:1], sample_pictures(model, tokens, [[1, 2]], seed=4))
    assert not torch.equal(both[:1], sample_pictures(model, tokens, [[1, 2]], seed=5))
    sounds = sample_sound(model, [[1, 2], [], [3]], 4, seed=1)
    assert torch.equal(sounds[:1], sample_sound(model, [[1, 2]], 4, seed=1))
    greedy = sample_sound(model, [[1, 2]], 4, temperature=0.0)
    assert torch.equal(greedy, sample_sound(model, [[1, 2]], 4, seed=9, temperature=0.0))


def test_parts_that_are_missing_are_named() -> None:
    model = model_of()
    model.pictures = model.sound = None
    with pytest.raises(ValueError, match=r"model\.pictures"):
        sample_pictures(model, tokenizer(), [[1]])
    with pytest.raises(ValueError, match=r"model\.sound"):
        sample_sound(model, [[1]], 2)
    with pytest.raises(ValueError, match="3 bits a token"):
        sample_pictures(model_of(bits=3), tokenizer(), [[1]])
