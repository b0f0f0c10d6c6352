"""Where processes listen and how they reach each other: addresses of machines, as users and the system give them."""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import struct
from contextlib import suppress

from resilin.config import UserError

LOOPBACK = "127.0.0.1"
_IFADDR = 0x8915  # SIOCGIFADDR
_NOWHERE = "192.0.2.1"  # of a range that is nobody's (RFC 5737): only the way there is looked up, nothing is sent


def parse(text: str) -> tuple[str, int]:
    """`HOST:PORT`, or `[IPV6]:PORT`.

    Raises:
        UserError: it is none.
    """
    host, _, port = text.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"{text!r} is no address: expected HOST:PORT, as in 10.0.0.1:29400 or [fd00::1]:29400")
    return host, int(port)


def joined(host: str, port: int) -> str:
    """What `parse` reads."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def listen(host: str, port: int = 0) -> socket.socket:
    """A socket that listens.

    Args:
        host: address or name of this machine; 0.0.0.0 or :: for all it has.
        port: 0: one that is free.

    Raises:
        UserError: it cannot.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise UserError(f"cannot listen at {joined(host, port)}: {error.strerror or error}") from None


def guard(connection: socket.socket, seconds: float) -> None:
    """Give a connection up whose other end, or the way there, has been gone for so long while something was said to it.

    Without that a machine that loses its power looks, from here, like one that has nothing to say.
    """
    with suppress(OSError, AttributeError):  # not everywhere
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * seconds))
    with suppress(OSError):
        whole = int(seconds)
        connection.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", whole, int(1e6 * (seconds - whole)))
        )


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(address.split("%")[0]).is_loopback
    except ValueError:
        return address == "localhost"


def own_address(connection: socket.socket, elsewhere: bool = False) -> str:
    """The address of this machine at which others reach it.

    Args:
        connection: to the coordinator: its near end is an address that has a way there.
        elsewhere: others are on other machines for sure: then none of the loopback will do.

    `GLOO_SOCKET_IFNAME`, where it is set, names the interface instead, as for torch's own groups.

    Raises:
        UserError: there is no such interface.
    """
    if name := os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]:
        return of_interface(name)
    found = str(connection.getsockname()[0]).removeprefix("::ffff:")
    if not (elsewhere and is_loopback(found)):
        return found
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((_NOWHERE, 9))
        except OSError:
            return found
        return str(probe.getsockname()[0])


def of_interface(name: str) -> str:
    """The IPv4 address of a network interface of this machine.

    Raises:
        UserError: it has none.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            told = fcntl.ioctl(probe.fileno(), _IFADDR, struct.pack("256s", name.encode()[:15]))
        except OSError as error:
            have = ", ".join(each for _, each in socket.if_nameindex())
            raise UserError(f"the interface {name!r} has no address ({error.strerror}); there are {have}") from None
    return socket.inet_ntoa(told[20:24])
