"""The model of docs/add-a-model.md: foreign to the package, divided by its plan alone."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from forked import run_ranks

from resilin.keys import Keys
from resilin.models.settings import ModelContext
from resilin.nouns import Batch
from resilin.objective.next_token import NextToken
from resilin.parallel.group import Group
from resilin.parallel.tensor import parallelise

ROOT = Path(__file__).parents[3]


def compare(rank: int) -> list[str]:
    sys.path.insert(0, str(ROOT / "examples"))
    settings = importlib.import_module("my_models.running_mean").RunningMean
    group, wrong = Group.of(), []
    for sequence, tokens, chunk in ((False, 8, None), (True, 8, None), (True, 7, None), (True, 8, 0)):
        whole, model = (
            settings(hidden_size=12, inner_size=10, dropout=0.2).build(ModelContext(1, 23)) for _ in range(2)
        )
        local = parallelise(model, model.tensor_plan(), group, sequence=sequence)
        g = torch.Generator().manual_seed(0)
        ids, labels = (torch.randint(23, (2, tokens), generator=g) for _ in range(2))
        batch, keys = Batch(torch.arange(2), {"tokens": ids, "labels": labels}), Keys(0, 1, torch.arange(2))
        objective = NextToken(chunk=chunk).build()
        wanted, found = (objective(one, batch, keys).sum for one in (whole, local.module))
        wanted.backward()
        found.backward()
        local.sum_gradients()
        if abs(float(found.detach() - wanted.detach())) > 1e-5 * float(wanted.detach()):
            wrong.append(f"{sequence} {tokens}: loss {float(found.detach())} for {float(wanted.detach())}")
        for (name, ours), theirs in zip(local.module.named_parameters(), whole.parameters(), strict=True):
            assert ours.grad is not None
            assert theirs.grad is not None
            if (ours.grad - local.part(name, theirs.grad)).norm() > 1e-5 * theirs.grad.norm():
                wrong.append(f"{sequence} {tokens}: {name}")
    return wrong


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_model_of_ones_own_is_divided_by_its_plan(ranks: int) -> None:
    for wrong in run_ranks(ranks, compare):
        assert not wrong, "\n".join(wrong)


def test_the_page_shows_the_file() -> None:
    """Every block of Python on the page is in the example, line by line."""
    source = (ROOT / "examples/my_models/running_mean.py").read_text()
    page = (ROOT / "docs/add-a-model.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert blocks
    known = {line.strip() for line in source.splitlines()}
    missing = [
        line for block in blocks for line in block.splitlines() if line.strip() not in known and "..." not in line
    ]
    assert not missing
