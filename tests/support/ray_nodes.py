"""A Ray cluster of logical nodes on this machine, kept by a process of its own: nodes can come and go at any time.

Its standard input is told what to do, a word a line, and it answers each when it is done. (Ray starts nodes in the main
thread of a process only, where a job of ours has its signals.)
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any


class Nodes:
    """A cluster; every node has one CPU, so it takes one worker. There are two at first.

    Args:
        autoscaled: there is one at first, and Ray's own autoscaler starts up to two more when somebody waits for one.
        folder: for its settings.
    """

    def __init__(self, autoscaled: bool = False, folder: Path | None = None) -> None:
        scaling = [str(_scaling(folder))] if autoscaled and folder is not None else []
        self._process = subprocess.Popen(
            [sys.executable, __file__, *scaling], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.address, self._session = self._answer()

    def _answer(self) -> list[str]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("answer "):
                return line.split()[1:]
        raise RuntimeError("Ray's cluster has ended")

    def _ask(self, word: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()
        self._answer()

    def add(self) -> None:
        """One more node."""
        self._ask("add")

    def remove(self) -> None:
        """The oldest one beside the first is lost, with all its processes."""
        self._ask("remove")

    def close(self) -> None:
        """The end of all; nodes that the autoscaler has started would outlive it, or a part of them."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
        for each in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if self._session.encode() in (each / "cmdline").read_bytes():
                    os.kill(int(each.name), signal.SIGKILL)


PORT = 6379
"""Where the nodes that the autoscaler starts look for the first one; Ray does not let one choose."""


def _scaling(folder: Path) -> Path:
    """Settings of Ray's autoscaler, whose "machines" are logical nodes of this one."""
    one = {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2}
    lists = (
        "cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands", "setup_commands",
        "head_setup_commands", "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands",
    )  # fmt: skip
    told = {
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        **{name: [] for name in lists},
        "cluster_name": "logical", "max_workers": 2, "upscaling_speed": 1.0, "idle_timeout_minutes": 5,
        "file_mounts_sync_continuously": False, "head_node_type": "ray.head.default",
        "available_node_types": {"ray.head.default": {**one, "max_workers": 0}, "one": one},
        "provider": {
            "type": "fake_multinode", "use_node_id_as_ip": True, "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
    }  # fmt: skip
    path = folder / "autoscaler.json"
    path.write_text(json.dumps(told))
    return path


def main(scaling: str = "") -> None:
    """Keep a cluster."""
    first: dict[str, Any] = {"include_dashboard": False}
    if scaling:
        from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

        first |= {"autoscaling_config": scaling, "gcs_server_port": PORT}
        os.environ.update(AUTOSCALER_UPDATE_INTERVAL_S="1", RAY_OVERRIDE_NODE_ID_FOR_TESTING=FAKE_HEAD_NODE_ID)
        os.environ.update(RAY_FAKE_CLUSTER="1", RAY_enable_autoscaler_v2="0")
    from ray.cluster_utils import Cluster

    size: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**size, **first})
    others = [] if scaling else [cluster.add_node(**size)]
    print("answer", cluster.address, cluster.head_node.get_session_dir_path(), flush=True)  # noqa: T201
    for line in sys.stdin:
        if line.strip() == "add":
            others.append(cluster.add_node(**size))
        else:
            cluster.remove_node(others.pop(0), allow_graceful=False)
        print("answer done", flush=True)  # noqa: T201
    cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
