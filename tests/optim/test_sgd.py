from __future__ import annotations

import pytest
import torch
from torch import nn

from resilin.optim.schedule import Constant
from resilin.optim.sgd import SGD


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_without_decay_it_is_torch_s_sgd(momentum: float, nesterov: bool) -> None:
    ours, theirs = nn.Linear(5, 4), nn.Linear(5, 4)
    theirs.load_state_dict(ours.state_dict())
    mine = SGD(lr=0.1, momentum=momentum, nesterov=nesterov, schedule=Constant(warmup=0)).build(ours, 6)
    reference = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=momentum, nesterov=nesterov)
    for step in range(6):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            q.grad = p.grad.clone()
        mine.step(step)
        reference.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize(("decay", "shrink"), [("coupled", 1 - 0.1 * 0.3), ("independent", 0.7)])
def test_decay_does_not_pass_through_the_momentum(decay: str, shrink: float) -> None:
    model = nn.Linear(5, 4, bias=False)
    before = model.weight.detach().clone()
    optimizer = SGD(lr=0.1, weight_decay=0.3, decay=decay, schedule=Constant(warmup=0)).build(model, 3)
    for step in range(3):
        model.weight.grad = torch.zeros_like(model.weight)
        optimizer.step(step)
    torch.testing.assert_close(model.weight.detach(), before * shrink**3)
