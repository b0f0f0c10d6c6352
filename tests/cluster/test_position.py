"""Which worker a process is, from the variables that torchrun, srun and our own launcher set."""

from __future__ import annotations

import pytest

from resilin.cluster.position import Position, first_node, position
from resilin.config import UserError

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "node0",
    "MASTER_PORT": "29400",
}  # fmt: skip
SRUN = {
    "SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_NTASKS": "7", "SLURM_LOCALID": "1",
    "SLURM_NNODES": "3", "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "gpu[017-019]",
    "SLURM_STEP_TASKS_PER_NODE": "3(x2),1",
}  # fmt: skip


def test_a_process_that_nobody_placed_is_alone():
    assert position({}) is None


def test_torchrun_places_a_worker():
    assert position(TORCHRUN) == Position(5, 8, 1, 4, "node0", 29400)


def test_srun_places_a_worker():
    assert position(SRUN) == Position(5, 7, 1, 3, "gpu017", 20000 + 123456 % 20000)
    assert position({**SRUN, "SLURM_PROCID": "6", "SLURM_LOCALID": "0", "SLURM_NODEID": "2"}).local_workers == 1
    assert position({**SRUN, "MASTER_ADDR": "head", "MASTER_PORT": "12345"}).port == 12345


def test_two_jobs_of_slurm_on_one_machine_meet_at_different_ports():
    assert position(SRUN).port != position({**SRUN, "SLURM_JOB_ID": "123457"}).port


def test_torchrun_inside_of_slurm_decides():
    assert position({**SRUN, **TORCHRUN}) == position(TORCHRUN)


def test_a_batch_script_is_no_step_and_one_task_is_alone():
    batch = {name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"}
    assert position({**batch, "SLURM_PROCID": "0"}) is None
    assert position({**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None


@pytest.mark.parametrize(
    ("wrong", "match"),
    [({"RANK": "8"}, "number 8 of 8"), ({"RANK": "x"}, "RANK is 'x'"), ({"MASTER_PORT": ""}, "MASTER_PORT")],
)
def test_variables_that_make_no_sense_are_named(wrong: dict[str, str], match: str):
    with pytest.raises(UserError, match=match):
        position({**TORCHRUN, **wrong})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[017-020,031],cpu1", "gpu017"), ("a1,a2", "a1"), ("solo", "solo"), ("r[1,3]-ib", "r1-ib"), ("", "")],
)
def test_the_first_node_of_a_list(nodes: str, first: str):
    assert first_node(nodes) == first
