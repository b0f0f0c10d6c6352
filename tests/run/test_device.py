"""Which GPU a process takes, by its number on its machine."""

from __future__ import annotations

import pytest
import torch

from resilin.run.device import choose_device

STEP = {"SLURM_STEP_ID": "0", "SLURM_LOCALID": "3"}


@pytest.mark.parametrize(
    ("variables", "visible", "taken"),
    [
        ({}, 8, 0),
        ({"LOCAL_RANK": "2"}, 8, 2),
        (STEP, 8, 3),  # all tasks see all GPUs of the node
        (STEP, 1, 0),  # each sees its own
        (STEP, 2, 1),  # each has two
        ({**STEP, "LOCAL_RANK": "2"}, 8, 2),
        ({"SLURM_LOCALID": "3"}, 8, 0),  # a batch script, whatever it has inherited
    ],
)
def test_workers_of_one_machine_take_different_gpus(
    variables: dict[str, str], visible: int, taken: int, monkeypatch: pytest.MonkeyPatch
):
    for name in ("LOCAL_RANK", *STEP):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    assert choose_device("auto") == torch.device("cuda", taken)
    assert choose_device("cpu") == torch.device("cpu")
