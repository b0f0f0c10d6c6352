"""A Slurm of a test's own, of two nodes that are this machine: it is started here, and leaves nothing behind."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

NODES = ("no-host-1", "no-host-2")
CORES = 8
"""Of each node; more than there are, so that no test waits for another's."""
_PATIENCE = 30.0
_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"  # daemons are there, and not on everybody's path


def why_not() -> str:
    """Why there can be no Slurm here; "" if there can."""
    missing = [name for name in ("munged", "slurmctld", "slurmd", "srun") if shutil.which(name, path=_PATH) is None]
    if missing:
        return f"needs Slurm and munge: {', '.join(missing)} not installed"
    return "" if os.geteuid() == 0 else "needs root: slurmd starts processes as their users"


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        taken = [stack.enter_context(closing(socket.create_server(("127.0.0.1", 0)))) for _ in range(count)]
        return [each.getsockname()[1] for each in taken]


def _configuration(folder: Path) -> str:
    control, *nodes = _free_ports(1 + len(NODES))
    host = socket.gethostname().split(".")[0]
    return f"""
ClusterName=throwaway
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
NodeName={",".join(NODES)} NodeHostname={host} NodeAddr=127.0.0.1 Port={",".join(map(str, nodes))} CPUs={CORES}
PartitionName=all Nodes=ALL Default=YES State=UP
"""


@contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """While entered, there is one; gives the variables by which its commands find it.

    Args:
        folder: an empty one, for all that it writes; with a short name, since there is a socket in it.
    """
    (folder / "state").mkdir()
    (folder / "key").touch(mode=0o600)
    (folder / "key").write_bytes(secrets.token_bytes(1024))
    (folder / "slurm.conf").write_text(_configuration(folder))
    variables = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _PATH}
    files = [f"--{name}-file={folder}/munge-{name}" for name in ("pid", "log", "seed")]
    munged = ["munged", "--foreground", "--force", f"--socket={folder}/munge", f"--key-file={folder}/key", *files]
    daemons = [munged, ["slurmctld", "-D", "-c"], *(["slurmd", "-D", "-N", node] for node in NODES)]
    started: list[subprocess.Popen[bytes]] = []
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}

    def ask(*command: str) -> str:
        told = subprocess.run(command, env={**clean, **variables}, capture_output=True, text=True, timeout=60)
        return told.stdout.strip()

    def wait_for(*command: str, told: str) -> bool:
        until = time.monotonic() + _PATIENCE
        while (said := ask(*command)) != told and time.monotonic() < until:
            time.sleep(0.2)
        return said == told

    try:
        for number, command in enumerate(daemons):
            with (folder / f"{number}-{command[0]}.log").open("wb") as log:
                started.append(subprocess.Popen(command, env={**clean, **variables}, stdout=log, stderr=log))
            if number == 0:
                wait_for("munge", f"--socket={folder}/munge", "--no-input", "--output=/dev/null", told="")
        if not wait_for("sinfo", "--noheader", "--states=idle", "--format=%D", told=str(len(NODES))):
            last = [f"{log.name}: {log.read_text()[-300:].strip()}" for log in sorted(folder.glob("*.log"))]
            pytest.skip("Slurm does not start here: " + "; ".join(last))
        yield variables
    finally:
        ask("scancel", "--signal=KILL", "--user=root")
        wait_for("squeue", "--noheader", told="")
        for daemon in reversed(started):
            daemon.terminate()
        for daemon in reversed(started):
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
