"""Answers that are programs: run against assertions, which is off unless asked for."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

from pydantic import Field

from resilin.posttrain.verifiers.verifier import Answer, Verifier, VerifierError

_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n?(.*?)```", re.DOTALL)
_RUNNER = """
import json, resource, sys
job = json.loads(sys.stdin.read())
sys.stdin.close()
for name, limit in job.pop("limits").items():
    resource.setrlimit(getattr(resource, name), (limit, limit))
mark = job.pop("mark")
space = {"__name__": "__answer__"}
passed = []
real = sys.stdout
sys.stdout = sys.stderr
try:
    exec(compile(job["program"], "<answer>", "exec"), space)
    runs = True
except BaseException:
    runs = False
for test in job["tests"] if runs else []:
    try:
        exec(compile(test, "<test>", "exec"), dict(space))
        passed.append(True)
    except BaseException:
        passed.append(False)
real.write(mark + json.dumps(passed))
real.flush()
"""


def last_code_block(text: str) -> str:
    """The last block between triple back-quotes; the whole text where there is none."""
    found = _BLOCK.findall(text)
    return str(found[-1]) if found else text


def _tests(label: Any) -> list[str]:
    if isinstance(label, str):
        try:
            label = json.loads(label)
        except json.JSONDecodeError:
            label = [label]
    if not isinstance(label, list) or not label or not all(isinstance(test, str) for test in label):
        raise VerifierError(f"code is checked against a list of assertions in Python, not {label!r:.60}")
    return label


class Code(Verifier):
    """The share of the label's assertions that hold after the last code block of the answer has run.

    Programs run in a process of their own, in an empty folder, with limits of time, memory, file size and open files,
    and without this process's environment. That stops accidents, not attacks: nothing keeps a program from reading
    files or using the network. Run it inside a container or a virtual machine that may be lost.
    """

    execute: bool = False
    """Allow running what the model wrote. Without it rows that need this verifier are refused."""
    seconds: Annotated[float, Field(gt=0)] = 5.0
    """Time of one program with all its tests, on the clock and on the processor."""
    megabytes: Annotated[int, Field(ge=64)] = 512
    """Memory of one program."""
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Shares below this score 0."""

    def check_label(self, label: Any) -> None:
        """The label is a list of assertions, and running them is allowed."""
        if not self.execute:
            raise VerifierError(
                "checking code means running what the model wrote: set execute = true for this verifier, in a "
                "container or virtual machine that may be lost, or leave such rows out"
            )
        _tests(label)

    def score(self, answer: Answer) -> float:
        """The share, in [0, 1]."""
        self.check_label(answer.label)
        tests = _tests(answer.label)
        share = sum(self._run(last_code_block(answer.text), tests)) / len(tests)
        return share if share >= self.threshold else 0.0

    def scores(self, answers: Sequence[Answer]) -> list[float]:
        """The scores of several answers; as many programs run side by side as there are processors."""
        if len(answers) < 2:
            return [self.score(answer) for answer in answers]
        with ThreadPoolExecutor(min(len(answers), len(os.sched_getaffinity(0)))) as pool:
            return list(pool.map(self.score, answers))

    def _run(self, program: str, tests: list[str]) -> list[bool]:
        import secrets

        mark = secrets.token_hex(16)  # what the program itself prints is no verdict
        limits = {
            "RLIMIT_AS": self.megabytes << 20,
            "RLIMIT_CPU": int(self.seconds) + 1,
            "RLIMIT_FSIZE": 1 << 20,
            "RLIMIT_NOFILE": 32,
            "RLIMIT_CORE": 0,
        }
        job = json.dumps({"program": program, "tests": tests, "mark": mark, "limits": limits})
        with tempfile.TemporaryDirectory() as folder:
            child = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _RUNNER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={},
                start_new_session=True,
            )
            try:
                out, _ = child.communicate(job.encode(errors="surrogatepass"), timeout=self.seconds)
            except subprocess.TimeoutExpired:
                return []
            finally:
                _end_group(child)
        _, _, verdict = out.decode(errors="replace").rpartition(mark)
        try:
            passed = json.loads(verdict)
        except json.JSONDecodeError:
            return []
        return [item is True for item in passed] if isinstance(passed, list) and len(passed) == len(tests) else []


def _end_group(child: subprocess.Popen[bytes]) -> None:
    """End a program and whatever it started in its session."""
    import contextlib
    import signal

    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            pipe.close()
