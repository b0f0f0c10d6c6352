"""Which worker of a job this process is: said by whoever started it, in the environment.

torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and so does our own launcher;
`srun` sets SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID and the names of the nodes.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from resilin.cluster.addresses import LOOPBACK
from resilin.config import UserError

MEMBER = "RESILIN_MEMBER"
"""The variable with the number of a worker of an elastic run."""
LISTENING = "RESILIN_LISTENING"
"""The variable by which our launcher gives the first worker a socket."""
_STEPS_APART = 1009  # jobs whose numbers are neighbours, and have several steps, seldom share a machine's ports


@dataclass(frozen=True, slots=True)
class Position:
    """A process's place among all workers.

    Attributes:
        rank: its number in the job.
        workers: how many there are.
        local_rank: its number on its machine.
        local_workers: how many there are on its machine.
        address: of the first worker's machine.
        port: where the first worker's store listens.
        listening: the file descriptor of a socket that listens there already; None: there is none.
    """

    rank: int
    workers: int
    local_rank: int
    local_workers: int
    address: str
    port: int
    listening: int | None = None


def position(environment: Mapping[str, str] | None = None) -> Position | None:
    """This process's place, or None where nobody started it as one of several.

    Args:
        environment: variables; None: this process's.

    Raises:
        UserError: variables that contradict each other, or of which some are missing.
    """
    found = os.environ if environment is None else environment
    if "RANK" in found and "WORLD_SIZE" in found:
        return _checked(_of_torchrun(found))
    # A batch script has SLURM_PROCID too, but is no step of srun's: what it starts is a job of its own.
    if "SLURM_PROCID" in found and "SLURM_STEP_ID" in found and _slurm_tasks(found) > 1:
        return _checked(_of_slurm(found))
    return None


def check_known(place: Position, environment: Mapping[str, str] | None = None) -> None:
    """Slurm's name of the first node has to be known here; one that is not would only be waited for.

    Raises:
        UserError: it is not.
    """
    found = os.environ if environment is None else environment
    if "MASTER_ADDR" in found:  # whoever has chosen an address may know that it will be there
        return
    try:
        socket.getaddrinfo(place.address, place.port)
    except socket.gaierror as error:
        if error.errno == socket.EAI_AGAIN:  # a name server that is busy
            return
        raise UserError(
            f"the first worker's node is called {place.address!r}, and {socket.gethostname()} does not know this name "
            f"({error.strerror}): set MASTER_ADDR to a name or an address by which all nodes reach it"
        ) from None


def local_number(environment: Mapping[str, str] | None = None) -> int:
    """This process's number on its machine, from 0, where it is known; else 0."""
    found = os.environ if environment is None else environment
    if "LOCAL_RANK" in found or "SLURM_STEP_ID" not in found:
        return _number(found, "LOCAL_RANK", 0)
    return _number(found, "SLURM_LOCALID", 0)


def share_of_cores(cores: int, environment: Mapping[str, str] | None = None) -> int:
    """How many cores this process should compute on, where others compute on this machine too; at least 1.

    Without binding, every task of Slurm's may use all cores of its node, those of other jobs included.

    Args:
        cores: that this process may use.
        environment: variables; None: this process's.
    """
    found = os.environ if environment is None else environment
    if "SLURM_CPUS_ON_NODE" in found:
        cores = min(cores, _slurm_cores(found))
    return max(1, cores // max(1, _number(found, "LOCAL_WORLD_SIZE", 1)))


def _slurm_cores(found: Mapping[str, str]) -> int:
    """Of a task of srun's; or of a batch script, which has all of the job's on its node."""
    on_node = _number(found, "SLURM_CPUS_ON_NODE")
    if "SLURM_STEP_ID" not in found:
        return on_node
    return _number(found, "SLURM_CPUS_PER_TASK", on_node // max(1, _local_tasks(found, _slurm_tasks(found))))


def _slurm_tasks(found: Mapping[str, str]) -> int:
    return _number(found, "SLURM_STEP_NUM_TASKS", _number(found, "SLURM_NTASKS", 1))


def _number(found: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = found.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdigit():
        raise UserError(f"the environment variable {name} is {text!r}; whoever starts workers sets it to a number")
    return int(text)


def _of_torchrun(found: Mapping[str, str]) -> Position:
    rank, workers = _number(found, "RANK"), _number(found, "WORLD_SIZE")
    return Position(
        rank,
        workers,
        _number(found, "LOCAL_RANK", rank),
        _number(found, "LOCAL_WORLD_SIZE", workers),
        found.get("MASTER_ADDR", "127.0.0.1"),
        _number(found, "MASTER_PORT", 29500),
        _number(found, LISTENING) if LISTENING in found else None,
    )


def _of_slurm(found: Mapping[str, str]) -> Position:
    rank, workers = _number(found, "SLURM_PROCID"), _slurm_tasks(found)
    nodes = _slurm_nodes(found)
    # Their numbers spread jobs, and steps of a job, that share a machine over ports that users may listen on.
    started = _number(found, "SLURM_JOB_ID", 0) + _STEPS_APART * _number(found, "SLURM_STEP_ID", 0)
    port = _number(found, "MASTER_PORT", 20000 + started % 20000)
    names = found.get("SLURM_STEP_NODELIST") or found.get("SLURM_NODELIST", "")
    # Nodes have names of Slurm's own, which need not be those of the network; one node needs none.
    address = found.get("MASTER_ADDR") or (first_node(names) if nodes > 1 else "")
    local = _number(found, "SLURM_LOCALID", rank % max(1, workers // nodes))
    return Position(rank, workers, local, _local_tasks(found, workers), address or LOOPBACK, port)


def _slurm_nodes(found: Mapping[str, str]) -> int:
    return max(1, _number(found, "SLURM_STEP_NUM_NODES", _number(found, "SLURM_NNODES", 1)))


def _local_tasks(found: Mapping[str, str], workers: int) -> int:
    """From `SLURM_STEP_TASKS_PER_NODE`, which is like `2(x3),1`."""
    text = found.get("SLURM_STEP_TASKS_PER_NODE") or found.get("SLURM_TASKS_PER_NODE") or ""
    counts: list[int] = []
    for count, _, times in re.findall(r"(\d+)(\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    node = _number(found, "SLURM_NODEID", 0)
    return counts[node] if node < len(counts) else -(-workers // _slurm_nodes(found))


def first_node(nodes: str) -> str:
    """The first name of a Slurm list of nodes: `gpu[017-020,031],cpu1` begins with `gpu017`."""
    match = re.match(r"([^,\[]*)(?:\[([^,\-\]]+)[^\]]*\]([^,\[]*))?", nodes)
    return "" if match is None else f"{match[1]}{match[2] or ''}{match[3] or ''}"


def _checked(found: Position) -> Position:
    if not 0 <= found.rank < found.workers:
        raise UserError(f"this worker is number {found.rank} of {found.workers}; the last is {found.workers - 1}")
    return found
