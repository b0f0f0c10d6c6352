"""Which worker a process is, from the variables that torchrun, srun and our own launcher set."""

from __future__ import annotations

from dataclasses import replace

import pytest

from resilin.cluster.position import Position, check_known, first_node, local_number, position, share_of_cores
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


def test_two_jobs_of_slurm_or_two_steps_of_one_on_one_machine_meet_at_different_ports():
    others = [{"SLURM_JOB_ID": "123457"}, {"SLURM_STEP_ID": "1"}, {"SLURM_STEP_ID": "2"}]
    assert len({position({**SRUN, **other}).port for other in [{}, *others]}) == 4


def test_tasks_on_one_node_need_no_name_of_it():
    """Slurm's names of nodes need not be those of the network."""
    one = {**SRUN, "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_STEP_TASKS_PER_NODE": "7"}
    assert position(one).address == "127.0.0.1"
    assert position({**one, "MASTER_ADDR": "head"}).address == "head"
    assert position({**SRUN, "SLURM_NNODES": "4", "SLURM_STEP_NUM_NODES": "1"}).address == "127.0.0.1"


def test_a_node_whose_name_is_not_known_is_told_before_anybody_waits_for_it():
    nowhere = replace(position(SRUN), address="a-node.invalid")
    with pytest.raises(UserError, match=r"called 'a-node\.invalid'.* does not know this name.* set MASTER_ADDR"):
        check_known(nowhere, SRUN)
    check_known(nowhere, {**SRUN, "MASTER_ADDR": "a-node.invalid"})  # it may come to be known
    check_known(replace(nowhere, address="localhost"), SRUN)


@pytest.mark.parametrize(
    ("variables", "share"),
    [
        ({}, 12),
        ({"LOCAL_WORLD_SIZE": "5"}, 2),
        ({"LOCAL_WORLD_SIZE": "50"}, 1),
        ({"SLURM_STEP_ID": "0", "SLURM_CPUS_ON_NODE": "8", "SLURM_STEP_TASKS_PER_NODE": "4"}, 2),
        ({"SLURM_STEP_ID": "0", "SLURM_CPUS_ON_NODE": "3", "SLURM_STEP_TASKS_PER_NODE": "4"}, 1),
        ({"SLURM_STEP_ID": "0", "SLURM_CPUS_ON_NODE": "6", "SLURM_STEP_TASKS_PER_NODE": "1,2", "SLURM_NODEID": "1"}, 3),
        ({"SLURM_STEP_ID": "0", "SLURM_CPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "3"}, 3),
        ({"SLURM_STEP_ID": "0", "SLURM_CPUS_ON_NODE": "96", "SLURM_CPUS_PER_TASK": "48"}, 12),  # bound to its cores
        # A batch script has all that its job has on the node, and may start workers of its own.
        ({"SLURM_CPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "2", "SLURM_TASKS_PER_NODE": "4"}, 8),
        ({"SLURM_CPUS_ON_NODE": "8", "SLURM_TASKS_PER_NODE": "4", "LOCAL_WORLD_SIZE": "4"}, 2),
        (
            {
                "SLURM_STEP_ID": "0",
                "SLURM_CPUS_ON_NODE": "8",
                "SLURM_STEP_TASKS_PER_NODE": "1",
                "LOCAL_WORLD_SIZE": "4",
            },
            2,
        ),
    ],
)
def test_workers_share_the_cores_that_they_have_on_their_machine(variables: dict[str, str], share: int):
    assert share_of_cores(12, variables) == share


def test_a_process_knows_its_number_on_its_machine():
    assert [local_number(each) for each in ({}, SRUN, TORCHRUN, {**SRUN, "LOCAL_RANK": "3"})] == [0, 1, 1, 3]
    assert local_number({"SLURM_LOCALID": "1"}) == 0  # no step


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
