"""The next group: what each kind costs, what nobody may see, and how kinds are balanced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from modality_cases import CODES, LEVELS, SHAPE, VOCABULARY, WHOLE, batch_of, codes, mixed, model_of, tokenizer
from torch import Tensor

from resilin.keys import Keys
from resilin.modalities.balance import BalanceSettings, LossBalance
from resilin.modalities.objective import NextGroup, NextGroupLoss
from resilin.modalities.picture_batch import PictureNoise, read_pictures
from resilin.modalities.sequence import PICTURE, SOUND, Frames, Sound, Words
from resilin.modalities.shape import PictureShape
from resilin.nouns import Batch, StepView


def loss_of(shape: PictureShape = SHAPE, **options: Any) -> NextGroupLoss:
    return NextGroupLoss(NextGroup(**options), tokenizer(shape))


def keys_of(batch: Batch) -> Keys:
    return Keys(3, 5, batch.slots_B)


def test_every_position_that_predicts_is_one_unit_and_each_kind_costs_what_it_should() -> None:
    batch, model = mixed(WHOLE), model_of(depth=0)
    loss = loss_of(WHOLE)
    found = loss(model, batch, None)
    kinds = loss._kinds(model, batch, loss._pictures(model, batch, None), None)
    output = model(batch["tokens"], batch["positions"], batch["documents"], kinds=kinds)
    text = F.cross_entropy(
        (output.hidden_BTD @ model.head_weight.t()).flatten(0, 1), batch["labels"].flatten(), reduction="sum"
    )
    encoded = read_pictures(batch, tokenizer(WHOLE))
    hidden = output.hidden_BTD[batch["modality"] == PICTURE].view(3, WHOLE.places, -1)[:, : WHOLE.predicted]
    bits = F.binary_cross_entropy_with_logits(
        model.pictures.leave(hidden), encoded.bits_PMd.double(), reduction="none"
    ).mean(-1)
    sound = sum(F.cross_entropy(output.sound[q], codes(5)[:, q], reduction="sum") for q in range(LEVELS)) / LEVELS
    torch.testing.assert_close(found.sum, text + bits.sum() + sound, rtol=1e-9, atol=0)
    labelled = int((batch["labels"] != -100).sum())
    assert labelled == 2 + 2 + 3 + 3
    assert float(found.units) == labelled + 3 * WHOLE.predicted + 5
    assert found.logs["pictures"].value() == pytest.approx(float(bits.mean()))
    assert found.logs["sound"].value() == pytest.approx(float(sound) / 5)


def test_early_scales_count_more_and_the_mean_weight_stays_one() -> None:
    batch, model = batch_of([[[Frames(1, SHAPE)]]], 37), model_of(depth=0)
    plain, even = loss_of()(model, batch, None), loss_of(early=1.0)(model, batch, None)
    encoded = read_pictures(batch, tokenizer())
    loss = loss_of()
    kinds = loss._kinds(model, batch, encoded, None)
    hidden = model(batch["tokens"], batch["positions"], batch["documents"], kinds=kinds).hidden_BTD[0]
    bits = F.binary_cross_entropy_with_logits(
        model.pictures.leave(hidden), encoded.bits_PMd[0].double(), reduction="none"
    ).mean(-1)
    means = [float(part.mean()) for part in bits.split([1, 4, 16, 16])]
    assert float(even.sum) == pytest.approx(37 * sum(means) / 4)
    assert float(plain.sum) == pytest.approx(float(bits.sum()))
    assert float(plain.units) == float(even.units) == 37


def sum_of_row(model: Any, loss: NextGroupLoss, batch: Batch, features: Tensor | None = None) -> Tensor:
    pictures = loss._pictures(model, batch, None)
    kinds = loss._kinds(model, batch, pictures, None)
    assert kinds is not None
    if features is not None:
        kinds = type(kinds)(kinds.modality_BT, kinds.groups, features, kinds.codes_BTQ, kinds.steps)
    hidden: Tensor = model(batch["tokens"], batch["positions"], batch["documents"], kinds=kinds).hidden_BTD
    return hidden


def test_a_scale_is_predicted_from_earlier_groups_and_its_own_inputs_alone() -> None:
    batch = batch_of([[[Words([1, 2]), Frames(2, SHAPE), Words([3, 4])]]], 90)
    model, loss = model_of(), loss_of()
    encoded = loss._pictures(model, batch, None)
    assert encoded is not None
    before = sum_of_row(model, loss, batch)[0]
    for picture, scale in ((0, 0), (0, 2), (1, 1), (1, 3)):
        features = encoded.features_PNF.clone()
        features[picture, SHAPE.group_of_place == scale] += 0.1
        after = sum_of_row(model, loss, batch, features)[0]
        moved = (after - before).abs().amax(1) > 0
        start = 2 + 37 * picture + int((SHAPE.group_of_place < scale).sum())
        assert not bool(moved[:start].any())
        assert bool(moved[start:78].all())  # its own group on: both ways inside, and all that comes later


def test_levels_are_predicted_from_the_levels_before_and_never_from_themselves() -> None:
    model, loss = model_of(), loss_of()

    def logits(frames: Tensor) -> tuple[Tensor, ...]:
        batch = batch_of([[[Words([1, 2]), Sound(frames), Words([3])]]], 12)
        kinds = loss._kinds(model, batch, None, None)
        found: tuple[Tensor, ...] = model(batch["tokens"], batch["positions"], batch["documents"], kinds=kinds).sound
        return found

    frames = codes(5)
    before = logits(frames)
    for level in range(LEVELS):
        changed = frames.clone()
        changed[2, level] = (changed[2, level] + 1) % CODES
        after = logits(changed)
        for other in range(LEVELS):
            moved = (after[other] != before[other]).any(1).tolist()
            assert moved == [False, False, other > level, True, True], (level, other)


def test_micro_batches_change_nothing_whatever_the_rows_hold() -> None:
    whole = mixed()
    options = {"flips": 0.3, "hidden_frames": 0.5, "frame_window": 1, "early": 0.5, "balance": {"level": 2.0}}
    found = []
    for size in (2, 1):
        model, loss = model_of(moe={"experts": 4, "expert_size": 8}), loss_of(**options)
        assert loss.balance is not None
        loss.balance.averages = {"text": 1.7, "sound": 3.0}
        total = units = 0.0
        for at in range(0, 2, size):
            part = whole.rows(at, at + size)
            one = loss(model, part, keys_of(part))
            one.sum.backward()
            total, units = total + float(one.sum), units + float(one.units)
        found.append((total, units, {name: p.grad for name, p in model.named_parameters()}))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-9)
    assert found[0][1] == found[1][1]
    for name, gradient in found[0][2].items():
        torch.testing.assert_close(found[1][2][name], gradient, rtol=1e-8, atol=1e-10)


def test_flips_are_keyed_by_slot_and_rare_enough() -> None:
    batch = batch_of([[[Frames(2, SHAPE)]]] * 40, 74)
    noise = PictureNoise(keys_of(batch), 0.3)
    there = batch["frame_numbers"] >= 0
    flips = noise.flips(tokenizer(), there)
    assert flips is not None
    share_P = torch.cat([f.flatten(1) for f in flips], 1).double().mean(1)
    assert 0.1 < float(share_P.mean()) < 0.2
    assert float(share_P.max()) < 0.45
    part = batch.rows(7, 9)
    alone = PictureNoise(keys_of(part), 0.3).flips(tokenizer(), part["frame_numbers"] >= 0)
    assert alone is not None
    for scale, of_scale in enumerate(alone):
        assert torch.equal(of_scale, flips[scale][14:18])
    assert PictureNoise(keys_of(batch), 0.0).flips(tokenizer(), there) is None


def test_hidden_frames_and_windows_leave_text_and_the_own_frame_in_sight() -> None:
    batch = batch_of([[[Words([1, 2]), Frames(3, SHAPE), Words([3])]]], 114)
    keys = keys_of(batch)
    loss = loss_of(hidden_frames=0.999, frame_window=2)
    place = torch.arange(114)
    seen = loss.groups(batch, keys).seen(place, place)[0]
    frame = batch["frames"][0]
    for f in range(3):
        of_frame = (frame == f).nonzero()[:, 0]
        others = (frame >= 0) & (frame != f)
        assert not bool(seen[of_frame][:, others].any())
        assert bool(seen[of_frame][:, :2].all())
        last = of_frame[-16:]
        assert bool(seen[last][:, of_frame].all())
    assert bool(seen[113].all())  # text behind the video sees all of it
    evaluated = loss_of(hidden_frames=0.999, frame_window=2).groups(batch, None).seen(place, place)[0]
    last = (frame == 2).nonzero()[-1]
    assert bool(evaluated[last][:, frame == 1].all())
    assert not bool(evaluated[last][:, frame == 0].any())


def test_bits_grow_with_the_steps_and_others_get_no_gradient() -> None:
    batch = batch_of([[[Frames(1, SHAPE)]]], 37)
    loss, model = loss_of(growing_bits=((0, 1), (10, 3))), model_of(depth=0)

    def view(step: int) -> StepView:
        return StepView(step, None, model, loss, None, Keys.of_step(0, step))  # type: ignore[arg-type]

    for step, bits in ((0, 1), (9, 1), (10, 3), (30, 3)):
        loss.before_step(view(step))
        model.zero_grad()
        loss(model, batch, keys_of(batch)).sum.backward()
        used = model.pictures.leave.weight.grad.abs().sum(1) > 0
        assert used.tolist() == [bit < bits for bit in range(4)]
    with pytest.raises(ValueError, match="goes up to 5 bits"):
        loss_of(growing_bits=((0, 5),))
    with pytest.raises(ValueError, match="begin at 0"):
        NextGroup(growing_bits=((2, 1),))


def test_weights_bring_each_kind_to_the_level_and_are_saved() -> None:
    balance = LossBalance(BalanceSettings(level=2.0, decay=0.5))
    assert balance.weight("text") == 1.0
    balance.observe({"text": 4.0, "pictures": float("nan")})
    assert balance.weight("text") * 4.0 == 2.0
    balance.observe({"text": 2.0, "pictures": 0.5})
    assert balance.weight("text") == 2.0 / 3.0
    assert balance.weight("pictures") * 0.5 == 2.0
    loss = loss_of(balance={"decay": 0.9})
    model, batch = model_of(), mixed()
    plain = loss_of()(model, batch, keys_of(batch))
    first = loss(model, batch, keys_of(batch))
    torch.testing.assert_close(first.sum, plain.sum)
    logs = {name: log.value() for name, log in first.logs.items()}
    view = StepView(1, None, model, loss, None, Keys.of_step(0, 1), logs)  # type: ignore[arg-type]
    loss.after_step(view)
    again = loss_of(balance={"decay": 0.9})
    again.load_state_dict(loss.state_dict())
    assert again.balance is not None
    assert loss.balance is not None
    assert again.balance.averages == loss.balance.averages == {k: logs[k] for k in ("text", "pictures", "sound")}
    weighed = loss_of(balance={}, mtp_weight=0.0)
    weighed.load_state_dict(loss.state_dict())
    found = weighed(model, batch, keys_of(batch))
    assert float(found.sum) == pytest.approx(10 + 3 * 37 + 5)  # each unit of every kind now costs 1
    assert float(weighed(model, batch, None).sum) == pytest.approx(float(loss_of()(model, batch, None).sum))
    assert view.notes["weight_text"] == pytest.approx(1 / logs["text"])


def test_parts_that_do_not_belong_together_are_named() -> None:
    batch, model = mixed(), model_of()
    with pytest.raises(ValueError, match="no tokenizer of them"):
        NextGroupLoss(NextGroup())(model, batch, None)
    with pytest.raises(ValueError, match="make them equal"):
        loss_of()(model_of(bits=3), batch, None)
    with pytest.raises(TypeError, match="GroupDecoder"):
        loss_of()(model.decoder, batch, None)
    with pytest.raises(ValueError, match="laid out for another"):
        loss_of(WHOLE)(model, batch, None)
    assert model.settings.vocab_size == VOCABULARY
    assert SOUND != PICTURE


def test_a_budget_of_depth_runs_in_place_and_one_of_width_is_refused() -> None:
    from resilin.models.given import GivenError
    from resilin.nested import Budget, budget

    batch, model, loss = mixed(), model_of(depth=0), loss_of()
    with budget(model.decoder, Budget(skip=(1,))):
        loss(model, batch, None).sum.backward()
    assert all(p.grad is None for p in model.decoder.blocks[1].parameters())
    assert all(p.grad is not None for p in model.decoder.blocks[2].parameters())
    assert all(head.weight.grad.abs().max() > 0 for head in model.sound.heads)  # each level is still predicted
    with budget(model.decoder, Budget(hidden=12)), pytest.raises(GivenError, match="a budget narrows its stream"):
        loss(model, batch, None)
