"""Whether a process is being killed: it may take seconds to give up its memory, and keeps its locks until then."""

from __future__ import annotations

from pathlib import Path

_EXIT_CODE = 49  # of what stands behind the name in /proc/<pid>/stat


def killed_by(process: int) -> int:
    """The signal that a process is dying of; 0: of none, or that cannot be seen."""
    try:
        told = Path(f"/proc/{process}/stat").read_text(encoding="ascii", errors="replace")
        return int(told[told.rindex(")") + 2 :].split()[_EXIT_CODE]) & 0x7F
    except (OSError, ValueError, IndexError):
        return 0
