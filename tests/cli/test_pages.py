"""Large tensors of a command's process may lie in large pages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import resilin.cli.main, torch
from pathlib import Path
large = torch.empty(16 << 20)
there = large.data_ptr()
for line in Path("/proc/self/smaps").read_text().splitlines():
    head = line.split()[0]
    if "-" in head:
        low, high = (int(part, 16) for part in head.split("-"))
    elif head == "VmFlags:" and low <= there < high:
        print("hg" in line.split())
"""


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the system has no large pages")
@pytest.mark.parametrize(("said", "asked"), [(None, "True"), ("0", "False")])
def test_large_pages_are_asked_for_unless_the_environment_says_otherwise(said: str | None, asked: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    if said is not None:
        environment["THP_MEM_ALLOC_ENABLE"] = said
    command = [sys.executable, "-c", SCRIPT]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert ended.stdout.split() == [asked]
