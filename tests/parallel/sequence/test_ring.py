from __future__ import annotations

import pytest
import torch
from forked import run_ranks

from resilin.models import tiled_attention
from resilin.models.attention_core import AttentionCore
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.mask import Mask, rule_mask, training_mask
from resilin.parallel.group import Group
from resilin.parallel.sequence.part import RankPart
from resilin.parallel.sequence.ring import RingCore

B, T, D = 2, 24, 8  # T divides by 2P for P of 2, 3 and 4
DOCUMENTS = torch.tensor([[0] * 9 + [1] * 8 + [2] * 7, [0] * 21 + [-1] * 3])
CONTINUES = torch.tensor([[-1] * 9 + [0] * 15, [-1] * 24])


def _attend(rank: int, ranks: int) -> float:
    """The largest difference from one process of outputs and gradients, relative to their size."""
    worst, group, cpu = 0.0, Group.of(), torch.device("cpu")
    tiled_attention.STEPS = {"cpu": (2, 3)}  # several tiles to a piece
    place = RankPart("ring", group).places(T // ranks, cpu)
    rules = [
        (None, None, None),
        (None, 5, None),
        (DOCUMENTS, None, None),
        (DOCUMENTS, 4, None),
        (DOCUMENTS, None, CONTINUES),
    ]
    for heads, keys, softcap in ((4, 2, None), (1, 1, None), (3, 3, 2.0), (7, 1, None)):
        backend = "eager" if softcap else "sdpa"
        core = AttentionCore(
            DecoderSettings(
                heads=heads, kv_heads=keys, head_size=D, attention_softcap=softcap, attention_backend=backend
            )
        )
        for documents, window, continues in rules:
            generator = torch.Generator().manual_seed(3)
            q, k, v, pull = (torch.randn(B, n, T, D, generator=generator) for n in (heads, keys, keys, heads))
            whole = [x.clone().requires_grad_() for x in (q, k, v)]
            mask = training_mask(documents, T, window, cpu, continues)
            out = core(*whole, mask)
            wanted = [out.detach(), *torch.autograd.grad(out, whole, pull)]
            local = [x[:, :, place].clone().requires_grad_() for x in (q, k, v)]
            mine = RingCore(core, group)(*local, rule_mask(documents, T, window, continues))
            found = [mine.detach(), *torch.autograd.grad(mine, local, pull[:, :, place])]
            for a, b in zip(found, wanted, strict=True):
                worst = max(worst, float((a - b[:, :, place]).abs().max() / b.abs().max()))
    return worst


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_attention_and_its_gradients_are_those_of_one_process(ranks: int) -> None:
    assert max(run_ranks(ranks, _attend, ranks)) < 1e-6


def test_a_rank_without_two_equal_pieces_is_refused() -> None:
    core = RingCore(AttentionCore(DecoderSettings(heads=1, head_size=D)), Group.alone())
    x = torch.zeros(1, 1, 5, D)
    with pytest.raises(ValueError, match="two equal pieces"):
        core(x, x, x, rule_mask(None, 5, None))
    assert Mask(causal=True).rule is None
