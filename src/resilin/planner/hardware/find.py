"""Descriptions of machines: files of one's own, and those that come along by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from resilin.config import UserError, load_settings
from resilin.config.settings import closest
from resilin.planner.hardware.cluster import Cluster

MACHINES = Path(__file__).parent / "machines"


def known_machines() -> dict[str, Path]:
    """The files that come along, by the name that `--cluster` takes."""
    return {path.stem: path for path in sorted(MACHINES.glob("*.toml"))}


def load_cluster(where: str | Path, overrides: Sequence[str] = ()) -> Cluster:
    """A description.

    Args:
        where: the path of a .toml file, or the name of one that comes along.
        overrides: `price.device_hour=1.5`, laid over the file.

    Raises:
        UserError: no such file or name, or a file with unknown keys or values that cannot be.
    """
    path = Path(where)
    if path.suffix != ".toml":
        known = known_machines()
        if str(where) not in known:
            near = closest(str(where), known)
            hint = f"; did you mean {near!r}?" if near else ""
            raise UserError(
                f"no machine is called {str(where)!r}{hint}. Known are {', '.join(known)}; or give a .toml file such "
                "as `resilin plan calibrate` writes"
            )
        path = known[str(where)]
    return load_settings(Cluster, path, overrides)
