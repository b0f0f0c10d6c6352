"""A process is cut off from others on purpose, at its real sockets, as if its cable were pulled: for tests and chaos.

A packet filter that lets nothing through (a classic BPF program of one instruction, `SO_ATTACH_FILTER` of socket(7)) is
attached to sockets: the kernel then drops whatever arrives for them, data and acknowledgements, and whoever wants to
connect is not answered. Nothing is refused, closed or told, and the process itself goes on. No right is needed for it,
and none of the code that is tested knows of it. Linux only.
"""

from __future__ import annotations

import ctypes
import socket
import struct
import sys
import threading
import time
from collections.abc import Collection
from contextlib import suppress
from typing import Literal

from resilin.cluster.sockets import At, Socket, internet_sockets, opened

Side = Literal["members", "coordinator", "all"]
"""Whom a member is cut off from: the other members, the coordinator, or both."""
SIDES: tuple[Side, ...] = ("members", "coordinator", "all")
_ATTACH, _DETACH = 26, 27  # SO_ATTACH_FILTER, SO_DETACH_FILTER of Linux
_RETURN = 0x06  # BPF_RET | BPF_K: keep so many bytes of the packet: none
_NOTHING = ctypes.create_string_buffer(struct.pack("HBBI", _RETURN, 0, 0, 0), 8)
_PROGRAM = struct.pack("HL", 1, ctypes.addressof(_NOTHING))
_LOOK = 0.005  # seconds between two looks at which sockets there are


def can_isolate() -> bool:
    """Whether this system can do it."""
    return sys.platform == "linux"


def hold(connection: socket.socket) -> None:
    """Let nothing arrive at a socket.

    Raises:
        OSError: the system cannot.
    """
    connection.setsockopt(socket.SOL_SOCKET, _ATTACH, _PROGRAM)


def release(connection: socket.socket) -> None:
    """Let everything arrive again; what was sent meanwhile comes, as its sender has not heard of its arrival."""
    connection.setsockopt(socket.SOL_SOCKET, _DETACH, 0)


class Isolation:
    """Cuts this process off.

    Args:
        coordinator: where connections to the coordinator have their other ends; all others are to members.
    """

    def __init__(self, coordinator: Collection[At]) -> None:
        self._coordinator = frozenset(coordinator)

    def begin(self, side: Side, ends: bool, seconds: float) -> threading.Thread:
        """Cut off, and back again later; returns at once, with the thread that does so.

        Args:
            side: whom from.
            ends: whether connections are ended first, as by a router that goes down in order: then both sides notice
                at once. New ones are held in any case.
            seconds: for how long.
        """
        thread = threading.Thread(target=self._go, args=(side, ends, seconds), name="resilin-isolation", daemon=True)
        thread.start()
        return thread

    def _go(self, side: Side, ends: bool, seconds: float) -> None:
        held: dict[int, Socket] = {}
        until, first = time.monotonic() + seconds, True
        while time.monotonic() < until:
            for one in internet_sockets():
                if one.inode not in held and self._is_cut(one, side):
                    with suppress(OSError), opened(one.number, one.inode) as same:
                        if ends and first and not one.listens:
                            same.shutdown(socket.SHUT_RDWR)
                        hold(same)
                        held[one.inode] = one
            first = False
            time.sleep(_LOOK)
        for one in held.values():
            with suppress(OSError), opened(one.number, one.inode) as same:
                release(same)

    def _is_cut(self, one: Socket, side: Side) -> bool:
        return side == "all" or ({one.own, one.other} & self._coordinator != set()) == (side == "coordinator")
