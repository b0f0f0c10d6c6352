"""A headless Chromium, driven by its own driver over the W3C WebDriver protocol: a few requests of JSON."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_ARGUMENTS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--force-color-profile=srgb",
)  # fmt: skip


def missing() -> str:
    """What is not there, in words; empty where a browser can be driven."""
    if not any(map(shutil.which, BROWSERS)):
        return "no Chromium is installed (Debian: apt-get install chromium chromium-driver)"
    return (
        "" if shutil.which("chromedriver") else "no chromedriver is installed (Debian: apt-get install chromium-driver)"
    )


class Browser:
    """One window.

    Args:
        driver: the address of the driver.
        dark: what the system prefers.
        size: width and height of the window.
    """

    def __init__(self, driver: str, *, dark: bool = False, size: tuple[int, int] = (1300, 900)) -> None:
        self._driver = driver
        self._folder = tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True)
        binary = next(path for name in BROWSERS if (path := shutil.which(name)))
        arguments = [*_ARGUMENTS, f"--window-size={size[0]},{size[1]}", f"--user-data-dir={self._folder.name}"]
        options = {"binary": binary, "args": arguments}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        made = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._session = f"/session/{made['sessionId']}"
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", features=[theme])
        # A window is never narrower than some 500 pixels; a phone's page is.
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
        self.devtools("Emulation.setDeviceMetricsOverride", **metrics)

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        raw = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._driver + path, raw, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.load(error)["value"]["message"]) from None

    def devtools(self, command: str, **parameters: Any) -> Any:
        """A command of the DevTools protocol."""
        return self._call("POST", f"{self._session}/goog/cdp/execute", {"cmd": command, "params": parameters})

    def open(self, url: str) -> None:
        """Go to a page."""
        self._call("POST", f"{self._session}/url", {"url": url})

    @property
    def url(self) -> str:
        """Where it is."""
        return str(self._call("GET", f"{self._session}/url"))

    def run(self, script: str, *arguments: Any) -> Any:
        """What the body of a JavaScript function returns."""
        return self._call("POST", f"{self._session}/execute/sync", {"script": script, "args": list(arguments)})

    def until(self, script: str, *arguments: Any, seconds: float = 200) -> Any:
        """What an expression is, once it is true."""
        end = time.monotonic() + seconds
        while not (found := self.run(f"return {script}", *arguments)):
            assert time.monotonic() < end, f"{script} is still {found!r}\n{self.text('body')}"
            time.sleep(0.05)
        return found

    def text(self, selector: str) -> str:
        """What is written in an element, and can be seen."""
        return str(self.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector))

    def texts(self, selector: str) -> list[str]:
        """The same of all elements."""
        return list(self.run("return [...document.querySelectorAll(arguments[0])].map((e) => e.innerText)", selector))

    def keys(self, *keys: str) -> None:
        """Press keys, one after the other; U+E004 is the Tab key."""
        steps = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        actions = [{"type": "key", "id": "keys", "actions": steps}]
        self._call("POST", f"{self._session}/actions", {"actions": actions})

    def pointer(self, *moves: tuple[str, int, int]) -> None:
        """Move the pointer to places in the window: ("move" | "down" | "up", x, y)."""
        steps: list[dict[str, Any]] = []
        for what, x, y in moves:
            steps.append({"type": "pointerMove", "duration": 30, "x": x, "y": y})
            if what != "move":
                steps.append({"type": f"pointer{what.capitalize()}", "button": 0})
        actions = [{"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": steps}]
        self._call("POST", f"{self._session}/actions", {"actions": actions})

    def complaints(self) -> list[str]:
        """What the browser has logged: errors of scripts, what the Content-Security-Policy refused."""
        return [one["message"] for one in self._call("POST", f"{self._session}/se/log", {"type": "browser"})]

    def picture(self, path: Path, *, whole: bool = True) -> None:
        """Write what is seen, or the whole page, to a PNG."""
        if whole:
            size = self.devtools("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
            raw = self.devtools("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"]
        else:
            raw = self._call("GET", f"{self._session}/screenshot")
        path.write_bytes(base64.b64decode(raw))

    def close(self) -> None:
        """End it."""
        self._call("DELETE", self._session)
        self._folder.cleanup()


Open = Callable[..., Browser]


@contextmanager
def browsers() -> Iterator[Open]:
    """Gives a function that opens a `Browser`; all are closed at the end."""
    driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    opened: list[Browser] = []
    try:
        assert driver.stdout is not None
        port = next(line.rstrip(".\n").rpartition(" ")[2] for line in driver.stdout if "successfully on port" in line)

        def open_one(**options: Any) -> Browser:
            opened.append(Browser(f"http://127.0.0.1:{port}", **options))
            return opened[-1]

        yield open_one
    finally:
        for browser in opened:
            browser.close()
        driver.terminate()
        driver.communicate()
