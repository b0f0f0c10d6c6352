"""Weights in another order in memory are the same weights."""

from __future__ import annotations

import copy

import torch

from resilin.inference.arrange import arrange_for_decoding
from resilin.inference.generate import StopRule, generate
from resilin.models.decoder import Decoder


def test_rearranged_weights_give_the_same_text_and_the_same_values(tiny: Decoder) -> None:
    arranged = copy.deepcopy(tiny)
    assert arrange_for_decoding(arranged) == 2 * tiny.settings.layers  # gate and up
    assert arrange_for_decoding(arranged) == 0
    for name, value in arranged.state_dict().items():
        assert torch.equal(value, tiny.state_dict()[name])
    prompts = [[1, 2, 3], [9], [4, 5, 6, 7, 8, 9, 10, 11]]
    assert [row.tokens for row in generate(arranged, prompts, StopRule(8))] == [
        row.tokens for row in generate(tiny, prompts, StopRule(8))
    ]
