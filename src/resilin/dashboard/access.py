"""Who may see the page: this machine's own user as it is, others by a token. Pure.

A page of another site must not read a run through the browser of whoever watches it. Such a page may point its own host
name at the loopback address (DNS rebinding); then its name is in the header Host, and the answer is no.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
import secrets
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie

_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^:\[\]]+))(?::\d+)?")
_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server at this address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class Access:
    """Of one server.

    Attributes:
        host: the address it listens at.
        token: what others have to know; "": nobody is asked.
        cookie: the name of the cookie that keeps it.
    """

    host: str
    token: str = ""
    cookie: str = "resilin-watch"

    @classmethod
    def at(cls, host: str) -> Access:
        """For an address: a new token, unless it is a loopback address."""
        return cls(host, "" if is_loopback(host) else secrets.token_urlsafe(24))

    def knows_host(self, header: str | None) -> bool:
        """Whether a request was meant for this server. With a token any name will do: another site's has no cookie."""
        if self.token:
            return True
        return _name(header or "") in {*_NAMES, self.host.lower()}

    def right(self, token: str) -> bool:
        """Whether this is the token, compared in a time that does not tell how much of it is right."""
        return bool(self.token) and hmac.compare_digest(token.encode(), self.token.encode())

    def admits(self, cookies: str | None) -> bool:
        """Whether a request with these cookies is answered."""
        if not self.token:
            return True
        try:
            found = SimpleCookie(cookies or "").get(self.cookie)
        except CookieError:
            return False
        return found is not None and self.right(found.value)

    def set_cookie(self) -> str:
        """The header that makes a browser remember the token; not `Strict`, or a link to the page would not open it."""
        return f"{self.cookie}={self.token}; Path=/; HttpOnly; SameSite=Lax"


def _name(header: str) -> str:
    """The host of a header Host, without its port: a tunnel may have another one."""
    found = _HOST.fullmatch(header.strip().lower())
    return "" if found is None else found[1] or found[2]
