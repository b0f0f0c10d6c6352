"""Machines with a network of their own each, joined by a switch: Linux network namespaces, which need root."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest


class Networks:
    """A switch with a coordinator's machine, 10.77.0.1, and others behind it, 10.77.0.2 and so on.

    Args:
        others: how many.
    """

    def __init__(self, others: int) -> None:
        self._holders: list[subprocess.Popen[bytes]] = []
        try:
            for _ in range(others + 1):
                self._holders.append(subprocess.Popen(["unshare", "-n", "sleep", "900"], stderr=subprocess.DEVNULL))
            self._await()
            self._ip(
                0, "link add br0 type bridge", "addr add 10.77.0.1/24 dev br0", "link set br0 up", "link set lo up"
            )
            for number in range(1, others + 1):
                holder = self._holders[number].pid
                self._ip(0, f"link add v{number} type veth peer name eth0 netns {holder}")
                self._ip(0, f"link set v{number} master br0", f"link set v{number} up")
                self._ip(
                    number, f"addr add 10.77.0.{number + 1}/24 dev eth0", "link set eth0 up", "link set lo up",
                )  # fmt: skip
        except (OSError, subprocess.CalledProcessError) as error:
            self.close()
            pytest.skip(f"networks of one's own are not to be had here: {error}")

    def _await(self) -> None:
        mine = os.readlink("/proc/self/ns/net")  # noqa: PTH115
        end = time.monotonic() + 60
        while any(os.readlink(f"/proc/{one.pid}/ns/net") == mine for one in self._holders):  # noqa: PTH115
            if time.monotonic() > end or any(one.poll() is not None for one in self._holders):
                raise OSError("unshare -n is not permitted")
            time.sleep(0.02)

    def inside(self, number: int) -> list[str]:
        """What goes before a command to run it on a machine; 0: the coordinator's."""
        return ["nsenter", "-t", str(self._holders[number].pid), "-n"]

    def _ip(self, number: int, *commands: str) -> None:
        for command in commands:
            subprocess.run([*self.inside(number), "ip", *command.split()], check=True, capture_output=True)

    def unplug(self, number: int) -> None:
        """A machine's cable is pulled: nothing it says arrives, and nobody is told; 0: the switch has no power."""
        self._ip(0, f"link set {f'v{number}' if number else 'br0'} down")

    def plug(self, number: int) -> None:
        """It is there again."""
        self._ip(0, f"link set {f'v{number}' if number else 'br0'} up")

    def close(self) -> None:
        """The end of all machines."""
        for one in self._holders:
            one.kill()
            one.wait()


def permitted() -> bool:
    """Whether it is worth trying."""
    return os.geteuid() == 0 and Path("/proc/self/ns/net").exists()
