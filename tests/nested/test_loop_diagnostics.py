"""What is told of how hidden states move from loop to loop, against its definitions."""

from __future__ import annotations

import math

import pytest
import torch
from nested_cases import decoder

from resilin.models.decoder_settings import DecoderSettings
from resilin.models.loop_settings import LoopSettings
from resilin.nested import Budget, budget
from resilin.nested.loop_diagnostics import anisotropy, curvature, diagnose, gram_entropy, linear_cka, loop_states

TOKENS = torch.tensor([[1, 5, 9, 2, 30, 4, 11], [3, 3, 36, 7, 0, 12, 8]])


def model_of(times=4, **more):
    loop = LoopSettings(times=times, start="small", **more)
    return decoder(DecoderSettings(vocab_size=37, hidden_size=16, layers=2, heads=4, init_std=0.3, loop=loop))


@pytest.mark.parametrize("wanted", [None, Budget(loops=2), Budget(loops=(2, 1, 1), skip=(1,))])
def test_states_are_those_between_loops(wanted):
    model = model_of()
    states = loop_states(model, TOKENS, wanted)
    with torch.no_grad(), budget(model, wanted or Budget()):
        last = model(TOKENS).hidden_BTD
        assert len(states) == len(model.trajectory) + 1
        assert torch.equal(states[0], model.embed(TOKENS))
        assert torch.equal(model.norm(states[-1]), last)
    assert not model.blocks[0]._forward_pre_hooks
    assert not model.blocks[1]._forward_hooks


def test_loops_of_a_plain_loop_have_the_states_of_fewer_loops():
    model = model_of(condition="none")
    few, all_of_them = loop_states(model, TOKENS, Budget(loops=2)), loop_states(model, TOKENS)
    assert all(torch.equal(a, b) for a, b in zip(few, all_of_them, strict=False))


def test_a_loop_that_changes_nothing_stagnates():
    model = model_of()
    with torch.no_grad():
        for block in model.blocks:
            block.modulation.weight[:32].zero_()
            block.modulation.bias[:32].zero_()
    told = diagnose(model, TOKENS)
    assert told.cosine == pytest.approx((1.0,) * 4)
    assert told.cka[0] == pytest.approx((1.0,) * 4)
    assert len(set(told.entropy)) == 1
    moving = diagnose(model_of(), TOKENS)
    assert moving.cosine[0] < 0.99
    assert moving.cka[0][1] == pytest.approx(moving.cka[1][0])
    assert moving.cka[0][3] < 0.999


def test_measures_are_their_definitions():
    torch.manual_seed(0)
    x, turn = torch.randn(40, 6, dtype=torch.float64), torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    assert linear_cka(x, 3 * x @ turn + 1) == pytest.approx(1.0)
    assert linear_cka(x, torch.randn(40, 6, dtype=torch.float64)) < 0.5
    straight = torch.arange(5.0)[None, :, None] * torch.ones(1, 1, 3)
    assert curvature(straight) == pytest.approx(0.0, abs=1e-6)
    corner = torch.tensor([[[0.0, 0], [1, 0], [1, 1], [0, 1]]])
    assert curvature(corner) == pytest.approx(math.pi / 2)
    assert anisotropy(torch.ones(2, 4, 3)) == pytest.approx(1.0)
    assert anisotropy(torch.eye(3)[None]) == pytest.approx(0.0)
    assert gram_entropy(torch.eye(4)[None]) == pytest.approx(math.log(4))
    assert gram_entropy(torch.ones(1, 4, 3)) == pytest.approx(0.0, abs=1e-9)
