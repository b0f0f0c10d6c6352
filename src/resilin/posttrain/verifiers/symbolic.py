r"""Whether two mathematical answers are equal as expressions.

Numbers are compared as fractions. Everything else goes to SymPy, in a process of its own with a limit of time and of
memory: simplifying what a model wrote may take for ever, and a thread cannot be ended. The text is read by
`latex_expression`, never evaluated as code.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import re
import select
import subprocess
import sys
import threading
from fractions import Fraction

_LONGEST = 400  # characters: longer "answers" are texts
_NUMBER = re.compile(r"([-+]?)(\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)")
_FRACTION = re.compile(r"([-+]?)\\frac\{([-+]?\d{1,30})\}\{([-+]?\d{1,30})\}")
_MEMORY = 2 << 30


def as_number(answer: str) -> Fraction | None:
    r"""The value of "1,234.5", "-3" or "\frac{-1}{2}"; None for anything else."""
    found = _NUMBER.fullmatch(answer)
    if found:
        value = Fraction(found[2].replace(",", "")[:400])
        return -value if found[1] == "-" else value
    found = _FRACTION.fullmatch(answer)
    if found and int(found[3]):
        value = Fraction(int(found[2]), int(found[3]))
        return -value if found[1] == "-" else value
    return None


def same_number(one: str, other: str) -> bool:
    """Whether both are numbers of the same value."""
    left = as_number(one)
    return left is not None and left == as_number(other)


class Symbolic:
    """Compares expressions in a process that is started at the first question and again after each time-out.

    Args:
        seconds: for one comparison; its first one also starts SymPy, which has 60 seconds more.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._known: dict[tuple[str, str], bool] = {}
        atexit.register(self.close)

    _shared: dict[float, Symbolic] = {}  # noqa: RUF012 - one process for each limit in use

    @classmethod
    def shared(cls, seconds: float) -> Symbolic:
        """The one with this limit."""
        if seconds not in cls._shared:
            cls._shared[seconds] = cls(seconds)
        return cls._shared[seconds]

    def equal(self, one: str, other: str) -> bool:
        """Whether two answers are equal expressions; False where one is none, or the comparison takes too long."""
        if not one or not other or max(len(one), len(other)) > _LONGEST:
            return False
        with self._lock:
            if (one, other) not in self._known:
                if len(self._known) > 100_000:
                    self._known.clear()
                self._known[one, other] = self._ask(one, other)
            return self._known[one, other]

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "resilin.posttrain.verifiers.symbolic", str(_MEMORY)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._process = process
        if self._line(process, 60.0) != "ready":
            self.close()
            raise ImportError("comparing mathematical expressions needs sympy: pip install 'resilin[math]'")
        return process

    def _line(self, process: subprocess.Popen[bytes], seconds: float) -> str | None:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], seconds)
        return process.stdout.readline().decode().strip() if ready else None

    def _ask(self, one: str, other: str) -> bool:
        process = self._process or self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps([one, other]).encode() + b"\n")
            process.stdin.flush()
            said = self._line(process, self.seconds)
        except OSError:
            said = None
        if said not in ("yes", "no"):  # too long, out of memory, or dead: the next question starts afresh
            self.close()
        return said == "yes"


def _serve(memory: int) -> None:
    """Answer pairs of expressions from stdin, one a line, with yes or no."""
    import resource

    from resilin.posttrain.verifiers.latex_expression import equal_expressions

    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        one, other = json.loads(line)
        try:
            same = equal_expressions(one, other)
        except (Exception, RecursionError):  # whatever SymPy raises, the answer was not shown to be equal
            same = False
        sys.stdout.write("yes\n" if same else "no\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
