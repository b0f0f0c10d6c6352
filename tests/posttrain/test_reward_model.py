from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from resilin.config import parse_settings
from resilin.keys import Keys
from resilin.models.settings import ModelContext
from resilin.models.weight_files import ModelFolderError
from resilin.nouns import Batch
from resilin.posttrain.reward_loss import PairwiseReward
from resilin.posttrain.reward_model import (
    PretrainedReward,
    Reward,
    RewardModel,
    load_reward_model,
    save_reward_model,
    with_end,
)

LENGTHS = [(4, 2), (3, 6), (1, 5), (6, 6)]


def model_of(tiny: Any, seed: int = 0, dtype: torch.dtype = torch.float64) -> RewardModel:
    model = RewardModel(tiny(seed, dtype))
    torch.manual_seed(seed)
    torch.nn.init.normal_(model.score.weight)
    return model.to(dtype)


def test_a_reward_is_read_at_the_token_that_ends_the_answer(tiny: Any, pairs: Any) -> None:
    model, batch = model_of(tiny), pairs([(3, 2)])
    rewards = []
    for side in ("chosen", "rejected"):
        labels = batch[f"{side}_labels"][0]
        last = int((labels != -100).nonzero().max())
        text = torch.cat([batch[f"{side}_tokens"][0, : last + 1], labels[last : last + 1]])
        rewards.append(float(model(text[None])[0, -1].detach()))
    loss = PairwiseReward().build()(model, batch, None)
    assert float(loss.sum.detach()) == pytest.approx(math.log1p(math.exp(rewards[1] - rewards[0])), rel=1e-12)
    assert loss.logs["rewards/chosen"].value() == pytest.approx(rewards[0], rel=1e-12)


def test_margin_and_centring(tiny: Any, pairs: Any) -> None:
    model, batch = model_of(tiny), pairs(LENGTHS)
    plain = PairwiseReward().build()(model, batch, None)
    c, r = plain.logs["rewards/chosen"].value(), plain.logs["rewards/rejected"].value()
    one = pairs(LENGTHS[:1])
    base = PairwiseReward().build()(model, one, None)
    c, r = base.logs["rewards/chosen"].value(), base.logs["rewards/rejected"].value()
    centred = PairwiseReward(centre=0.1).build()(model, one, None)
    assert float(centred.sum.detach()) == pytest.approx(float(base.sum.detach()) + 0.1 * (c + r) ** 2, rel=1e-12)
    shifted = Batch(one.slots_B, {**one.fields, "margin": torch.tensor([0.7])})
    found = PairwiseReward().build()(model, shifted, None)
    margin = float(torch.tensor(0.7))
    assert float(found.sum.detach()) == pytest.approx(math.log1p(math.exp(r - c + margin)), rel=1e-9)


def test_a_new_head_prefers_nobody_and_padding_and_splitting_change_nothing(tiny: Any, pairs: Any) -> None:
    objective = PairwiseReward(centre=0.01).build()
    fresh = RewardModel(tiny(0)).double()
    assert float(objective(fresh, pairs(LENGTHS), None).sum.detach()) == pytest.approx(4 * math.log(2), rel=1e-12)
    model = model_of(tiny)
    objective(model, pairs(LENGTHS), None).sum.backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert model.decoder.head.weight.grad is None
    model.zero_grad()
    wide = pairs(LENGTHS, width=19)
    for start, stop in ((0, 1), (1, 4)):
        objective(model, wide.rows(start, stop), None).sum.backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_a_pair_without_an_answer_does_not_count(tiny: Any, pairs: Any) -> None:
    model, batch = model_of(tiny), pairs(LENGTHS)
    batch.fields["chosen_labels"][2] = -100
    loss = PairwiseReward().build()(model, batch, Keys(0, 0, batch.slots_B))
    assert float(loss.units) == 3
    rest = [PairwiseReward().build()(model, batch.rows(a, b), None) for a, b in ((0, 2), (3, 4))]
    assert float(loss.sum.detach()) == pytest.approx(sum(float(part.sum.detach()) for part in rest), rel=1e-12)


def test_the_end_of_an_answer_stands_after_its_last_token() -> None:
    tokens = torch.tensor([[5, 6, 7, 0], [5, 6, 7, 8]])
    labels = torch.tensor([[-100, 7, 9, -100], [-100, -100, 8, 3]])
    rows, last = with_end(tokens, labels)
    assert rows.tolist() == [[5, 6, 7, 9, 0], [5, 6, 7, 8, 3]]
    assert last.tolist() == [3, 4]


def test_saved_and_opened(tiny: Any, tmp_path: Path) -> None:
    model = model_of(tiny, dtype=torch.float32)
    save_reward_model(model, tmp_path / "rm")
    again = PretrainedReward(path=tmp_path / "rm").build(ModelContext(0, None))
    tokens = torch.arange(12)[None] % 17
    assert torch.equal(model(tokens), again(tokens))
    with pytest.raises(ModelFolderError, match="no reward model"):
        load_reward_model(tmp_path)
    (tmp_path / "rm" / "reward_head.safetensors").unlink()
    with pytest.raises(ModelFolderError, match="no reward model"):
        load_reward_model(tmp_path / "rm")


def test_settings_build_it_over_a_decoder() -> None:
    inner = {"use": "resilin.models.decoder_settings:DecoderSettings", "hidden_size": 16, "layers": 1, "heads": 2}
    settings = parse_settings(Reward, {"model": inner, "freeze_embeddings": True}, "test")
    model = settings.build(ModelContext(0, 11))
    assert model(torch.zeros(2, 3, dtype=torch.int64)).shape == (2, 3)
    assert not model.decoder.embed.weight.requires_grad
    nested = parse_settings(Reward, {"model": {"use": "resilin.posttrain.reward_model:Reward", "model": inner}}, "test")
    with pytest.raises(ValueError, match="RewardModel"):
        nested.build(ModelContext(0, 11))


def test_it_learns_who_is_preferred(tiny: Any, pairs: Any) -> None:
    model, batch = RewardModel(tiny(0)).double(), pairs([(3, 3)] * 8)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(30):
        loss = PairwiseReward().build()(model, batch, None)
        optimizer.zero_grad()
        loss.sum.backward()
        optimizer.step()
    assert loss.logs["accuracy"].value() == 1.0
