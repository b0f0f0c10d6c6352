"""Notice that a machine will be taken away, as clouds give it before they reclaim a spot machine.

Every worker asks for itself, so all of a machine hear of it, whoever has started them; each then leaves as by SIGTERM.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, Request, build_opener

from resilin.config import UserError

_LOCAL, _GOOGLE = "http://169.254.169.254", "http://metadata.google.internal"
_TIMEOUT = 2.0  # seconds
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def notice_of(text: str) -> Callable[[], object] | None:
    """What to ask, again and again, until its answer is true.

    Args:
        text: "" (None), `aws`, `gcp`, `azure`; a URL, which answers 200 once there is a notice, and 404 before; the
            path of a file that appears; or `package.module:function`, without arguments.

    Raises:
        UserError: there is no such function.
    """
    if not text:
        return None
    if text in _CLOUDS:
        return _CLOUDS[text]
    if text.startswith(("http://", "https://")):
        return partial(_answers, text)
    if not _FUNCTION.fullmatch(text):
        return Path(text).exists
    module, _, name = text.partition(":")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"cluster.notice = {text!r}: {error}") from None
    if not callable(found):
        raise UserError(f"cluster.notice = {text!r}: that is no function, but {type(found).__name__}")
    answer: Callable[[], object] = found
    return answer


def await_notice(asked: Callable[[], object], every: float, then: Callable[[], object]) -> None:
    """Ask from a thread of its own until the answer is true, then call something once.

    Args:
        asked: whether there is a notice. An error is told once, and counts as none.
        every: seconds between two questions.
        then: called at a notice.
    """

    def ask() -> None:
        told, wait = "", threading.Event()
        while True:
            try:
                if asked():
                    os.write(2, b"notice that this machine will be taken away\n")
                    then()
                    return
            except Exception as error:
                if (said := f"{type(error).__name__}: {error}") != told:
                    sys.stderr.write(f"cluster.notice cannot be asked, and is again in {every:g} s: {said}\n")
                told = said
            wait.wait(every)

    threading.Thread(target=ask, name="resilin-notice", daemon=True).start()


def aws(base: str = _LOCAL) -> bool:
    """Whether EC2 has marked this spot instance for interruption (instance metadata, version 2)."""
    token = _get(f"{base}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "300"}, "PUT")
    if token is None:
        raise URLError("EC2's metadata service gives no token")
    return _get(f"{base}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token}) is not None


def gcp(base: str = _GOOGLE) -> bool:
    """Whether Compute Engine preempts this machine."""
    told = _get(f"{base}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    return (told or "").strip() == "TRUE"


def azure(base: str = _LOCAL) -> bool:
    """Whether Azure has scheduled the eviction, or end, of this machine."""
    headers = {"Metadata": "true"}
    name = _get(f"{base}/metadata/instance/compute/name?api-version=2021-02-01&format=text", headers)
    told = json.loads(_get(f"{base}/metadata/scheduledevents?api-version=2020-07-01", headers) or "{}")
    return any(
        event.get("EventType") in ("Preempt", "Terminate") and (name or "").strip() in event.get("Resources", [])
        for event in told.get("Events", [])
    )


def _answers(url: str) -> bool:
    return _get(url, {}) is not None


def _get(url: str, headers: Mapping[str, str], method: str = "GET") -> str | None:
    """What a server says; None: there is no such thing (404)."""
    try:  # what is asked is this machine's own: never through a proxy
        with build_opener(ProxyHandler({})).open(
            Request(url, headers=dict(headers), method=method), timeout=_TIMEOUT
        ) as a:
            return str(a.read(1 << 20).decode(errors="replace"))
    except HTTPError as error:
        if error.code == 404:
            return None
        raise


_CLOUDS: Mapping[str, Callable[[], object]] = {"aws": aws, "gcp": gcp, "azure": azure}
