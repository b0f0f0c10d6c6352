"""A nested run whose workers are killed, that goes on in another layout, and of which a size is then cut out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from elastic_checks import changes, check_same
from elastic_runs import STEPS, alone, go, settings_of, text_at
from forked import run_ranks
from nested_cases import TOKENS
from ports import free_port

from resilin.cluster.elastic_job import JobEnded
from resilin.cluster.faults import Fault
from resilin.cluster.position import Position
from resilin.nested import Budget, budget, extract
from resilin.run.open_model import open_model
from resilin.run.start import start_run

MORE = STEPS + 4
# Stages read held-out data by the whole model alone: so does the run that theirs is compared with.
NESTED: dict[str, Any] = {
    "objective": {"use": "resilin.nested.objective:Nested", "granularities": [0.25, 0.5, 1], "evaluate_all": False},
}


def go_on(rank: int, text: Path, folder: Path, parallel: dict[str, Any], port: int) -> str:
    torch.set_num_threads(1)
    settings = settings_of(
        text,
        **{**NESTED, "train": {"steps": MORE}, "parallel": {"workers": 2, **parallel}, "cluster": {"elastic": False}},
    )
    place = Position(rank, 2, rank, 2, "127.0.0.1", port)
    return start_run(settings, folder, resume=True, accept_changes=True, place=place)[1].reason


@pytest.mark.parametrize(
    ("stages", "resumed"),
    [
        ({}, {"pipeline": 2}),
        pytest.param({"pipeline": 2, "workers": 4}, {"tensor": 2}, marks=pytest.mark.slow),
    ],
    ids=["data, then stages", "stages, then tensor"],
)
def test_killed_in_the_midst_resumed_elsewhere_and_cut(
    stages: dict[str, Any], resumed: dict[str, Any], tmp_path: Path
) -> None:
    text = text_at(tmp_path)
    quiet = alone(text, tmp_path / "quiet", **NESTED)
    faults = [Fault(1, 2, "adding gradients up"), Fault(0, 5, "updating weights")]
    settings = settings_of(text, **NESTED, parallel={"workers": 3, **stages})
    assert go(settings, tmp_path / "run", faults) == JobEnded(0, "")
    assert len(changes(tmp_path / "run")) >= 2
    check_same(tmp_path / "run", quiet)  # losses of the sizes that were drawn, weights and moments, to the bit
    for folder, layout in ((tmp_path / "run", resumed), (quiet, {"data": 2})):
        assert run_ranks(2, go_on, text, folder, layout, free_port(), connect=False) == ["completed"] * 2
    model, other = (open_model(folder, device="cpu").model for folder in (tmp_path / "run", quiet))
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5, msg=lambda told, name=name: f"{name}: {told}")
        assert torch.equal(one, two) or "tensor" in resumed, name
    small = extract(model, Budget(ffn=12))
    with torch.no_grad(), budget(model, Budget(ffn=12)):
        expected = model.logits(model(TOKENS).hidden_BTD)
    with torch.no_grad():
        torch.testing.assert_close(small.logits(small(TOKENS).hidden_BTD), expected, rtol=1e-6, atol=1e-6)
