"""Saving and loading a training state, against torch's distributed checkpoint and a plain write of the same bytes.

The state is that of a model under AdamW: float32 weights and two moments of the same shapes. All contenders take turns
on the same tensors, disk and process group of one process. Loads read from the page cache, unless --cold drops it
(which needs the right to). A blocking save ends when its bytes are on disk (fsync) for everyone: torch's writer is
asked to.

What is measured:
- what a save in the background costs a training loop (forward, backward and AdamW on that state), against a blocking
  save and against torch's `async_save`, as it is by default and with staging in a thread of its own: how much longer
  the step takes that a save was begun before, how long of that the loop is blocked (in the call, and before the
  update), and how much longer the steps take after it until all is written;
- save and load in GB/s, against torch and against a plain sequential write (with fsync) or read of the same bytes;
- loading half of every matrix's columns, as a rank of another layout does;
- peak memory beside the state, of a load of one rank's half.

    resilin bench run checkpoint --gib 2
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from resilin.bench.results import Report, Row, results_name
from resilin.checkpoint.background import BackgroundSaves
from resilin.checkpoint.folder import CheckpointFolder
from resilin.checkpoint.load import load_part
from resilin.layout import Layout, Region, rank

GIB, GB = 1 << 30, 1e9
OURS, DCP = "Resilin", "torch distributed checkpoint"
PLAIN = "plain sequential file"
HIDDEN = 1024
PEAK_SLACK = 64 << 20


def state_of(gib: float, device: str) -> dict[str, Any]:
    """Layers of matrices (4096, 1024) and (1024, 4096), and vectors, until there are so many bytes."""
    layers = max(1, round(gib * GIB / (3 * 4 * (8 * HIDDEN * HIDDEN + HIDDEN))))
    draw = torch.Generator(device).manual_seed(0)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, device=device)

    weights = {}
    for layer in range(layers):
        weights[f"{layer}.up"] = made(4 * HIDDEN, HIDDEN)
        weights[f"{layer}.down"] = made(HIDDEN, 4 * HIDDEN)
        weights[f"{layer}.norm"] = made(HIDDEN)
    moments = {
        name: {"exp_avg": made(*w.shape), "exp_avg_sq": made(*w.shape), "step": torch.ones(())}
        for name, w in weights.items()
    }
    return {"model": weights, "optimizer": moments, "run": {"step": 1}}


def tensors_of(node: Any) -> list[torch.Tensor]:
    if isinstance(node, torch.Tensor):
        return [node]
    return [tensor for value in node.values() for tensor in tensors_of(value)] if isinstance(node, dict) else []


def bytes_of(state: dict[str, Any]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(state))


def timed(work: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


class Turn:
    """Everyone's folders, made anew for each turn."""

    def __init__(self, at: Path, state: dict[str, Any], cold: bool) -> None:
        self.at, self.state, self.cold = at, state, cold

    def fresh(self, name: str) -> Path:
        path = self.at / name
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        os.sync()
        return path

    def uncached(self) -> None:
        os.sync()
        if self.cold:
            Path("/proc/sys/vm/drop_caches").write_text("3")

    # -- saving

    def save_ours(self) -> float:
        folder = CheckpointFolder(self.fresh("ours"))
        taken = timed(lambda: folder.save(1, self.state))
        folder.close()
        return taken

    def save_dcp(self) -> float:
        import torch.distributed.checkpoint as dcp

        path = self.fresh("dcp")
        writer = dcp.FileSystemWriter(path, sync_files=True, thread_count=2)
        return timed(lambda: dcp.save(self.state, storage_writer=writer, no_dist=True))

    def save_plain(self) -> float:
        path = self.fresh("plain")

        def work() -> None:
            with path.open("wb", buffering=0) as file:
                for tensor in tensors_of(self.state):
                    data = tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data
                    for start in range(0, len(data), 8 << 20):
                        file.write(data[start : start + (8 << 20)])
                os.fsync(file.fileno())

        return timed(work)

    # -- loading

    def load_ours(self) -> float:
        self.uncached()
        folder = CheckpointFolder(self.at / "ours")
        return timed(lambda: folder.load(1))

    def load_dcp(self) -> float:
        import torch.distributed.checkpoint as dcp

        self.uncached()
        target = torch.utils._pytree.tree_map(
            lambda x: torch.empty_like(x, device="cpu") if isinstance(x, torch.Tensor) else x, self.state
        )
        return timed(lambda: dcp.load(target, storage_reader=dcp.FileSystemReader(self.at / "dcp"), no_dist=True))

    def load_plain(self) -> float:
        self.uncached()

        def work() -> None:
            held = []  # a load ends with all tensors in memory of their own, not in one buffer used again
            with (self.at / "plain").open("rb", buffering=0) as file:
                for tensor in tensors_of(self.state):
                    target = torch.empty(tensor.shape, dtype=tensor.dtype)
                    held.append(target)
                    view = memoryview(target.reshape(-1).view(torch.uint8).numpy())
                    while len(view):
                        view = view[file.readinto(view) :]

        return timed(work)

    def half(self) -> Layout:
        return half_columns(self.state)

    def part_ours(self) -> float:
        self.uncached()
        return timed(lambda: load_part(self.at / "ours" / "step-00000001", self.half(), rank(1)))


@dataclass(frozen=True)
class Costs:
    """What one save cost the loop, in seconds.

    Attributes:
        step: by how much the step took longer that it was begun before; after a blocking save, the save.
        blocked: of that, how long the loop was blocked in the call and before the update.
        after: by how much the steps after it took longer, until all was written.
    """

    step: float
    blocked: float
    after: float


class Loop:
    """Steps of a residual network that has the state's matrices: x <- x + down(relu(up(norm(x))))."""

    def __init__(self, state: dict[str, Any], tokens: int, device: str) -> None:
        self.state, self.device = state, device
        self.weights = {name: torch.nn.Parameter(weight) for name, weight in state["model"].items()}
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=1e-6, fused=device == "cpu")
        for name, weight in self.weights.items():
            self.optimizer.state[weight].update(state["optimizer"][name])
        draw = torch.Generator(device).manual_seed(1)
        self.input_TD = torch.randn(tokens, HIDDEN, generator=draw, device=device)

    @property
    def steady(self) -> list[torch.Tensor]:
        """What the update changes."""
        return [*self.weights.values(), *tensors_of(self.state["optimizer"])]

    def take(self, save: Callable[[], Any] = lambda: None, staged: Callable[[], Any] = lambda: None) -> Costs:
        """A step, with what is called before it and before its update; gives seconds of all of it and of the two."""

        def step() -> None:
            nonlocal blocked
            began = time.perf_counter()
            save()
            blocked = time.perf_counter() - began
            x_TD = self.input_TD
            for layer in range(len(self.weights) // 3):
                h_TD = torch.nn.functional.rms_norm(x_TD, (HIDDEN,), self.weights[f"{layer}.norm"])
                h_TF = torch.relu(h_TD @ self.weights[f"{layer}.up"].T)
                x_TD = x_TD + h_TF @ self.weights[f"{layer}.down"].T
            x_TD.square().mean().backward()
            began = time.perf_counter()
            staged()
            blocked += time.perf_counter() - began
            self.optimizer.step()
            self.optimizer.zero_grad()

        blocked = 0.0
        return Costs(timed(step), blocked, 0.0)

    def cost(
        self, save: Callable[[], Any], staged: Callable[[], Any], written: Callable[[], bool], plain: int
    ) -> Costs:
        """What one save costs, beside the median of some steps before it."""
        usual = statistics.median(self.take().step for _ in range(plain))
        first = self.take(save, staged)
        after = 0.0
        while not written():
            after += self.take().step - usual
        return Costs(first.step - usual, first.blocked, after)


class InALoop:
    """Everyone's saves in the same loop."""

    def __init__(self, turn: Turn, loop: Loop, plain: int) -> None:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        self.turn, self.loop, self.plain, self.steps = turn, loop, plain, 0
        # Both keep their memory from save to save, as in a run.
        self.folder = CheckpointFolder(turn.at / "ours-async", keep_last=1)
        self.saves = BackgroundSaves(self.folder)
        gpu = loop.device != "cpu"
        self.stager = DefaultStager(StagingOptions(gpu, False, True, gpu))

    def close(self) -> None:
        self.saves.close()
        self.folder.close()
        self.stager.close()

    def ours(self) -> Costs:
        self.steps += 1
        os.sync()
        cost = self.loop.cost(
            lambda: self.saves.save(self.steps, self.loop.state, steady=self.loop.steady),
            self.saves.staged,
            lambda: self.saves.poll() is not None,
            self.plain,
        )
        self.saves.wait()
        return cost

    def blocking(self) -> Costs:
        folder = CheckpointFolder(self.turn.fresh("ours-blocking"))
        cost = self.loop.cost(lambda: folder.save(1, self.loop.state), lambda: None, lambda: True, self.plain)
        folder.close()
        return cost

    def dcp(self) -> Costs:
        return self._dcp(None)

    def dcp_late(self) -> Costs:
        return self._dcp(self.stager)

    def _dcp(self, stager: Any) -> Costs:
        import torch.distributed.checkpoint as dcp

        writer = dcp.FileSystemWriter(self.turn.fresh("dcp-async"), sync_files=True, thread_count=2)
        made: list[Any] = []

        def save() -> None:
            made.append(dcp.async_save(self.loop.state, storage_writer=writer, async_stager=stager))

        def staged() -> None:
            if stager is not None:
                made[0].staging_completion.result()

        def uploaded() -> Any:
            return made[0].upload_completion if hasattr(made[0], "upload_completion") else made[0]

        cost = self.loop.cost(save, staged, lambda: uploaded().done(), self.plain)
        uploaded().result()
        return cost


def named(node: Any, path: str = "") -> dict[str, torch.Tensor]:
    if isinstance(node, torch.Tensor):
        return {path: node}
    found: dict[str, torch.Tensor] = {}
    for key, value in node.items() if isinstance(node, dict) else ():
        found |= named(value, f"{path}/{key}" if path else key)
    return found


def half_columns(state: dict[str, Any]) -> Layout:
    """Two ranks, each with half the columns of every matrix and all of the rest."""
    tensors, held = {}, []
    for name, tensor in named(state).items():
        shape = tuple(tensor.shape)
        tensors[name] = shape, "F32"
        for number in (0, 1):
            region = Region.whole(shape)
            if len(shape) == 2:
                region = Region((0, number * (shape[1] // 2)), (shape[0], shape[1] // 2))
            held.append((name, rank(number), region))
    return Layout.of(tensors, held)


def peak_child(path: str) -> None:
    """Bytes of memory beyond the tensors that a rank's load of its half takes; printed."""
    from resilin.checkpoint.reader import CheckpointReader

    with CheckpointReader(path) as saved:
        shapes = {name: torch.empty(record.shape, device="meta") for name, record in saved.index.tensors.items()}
    layout = half_columns(shapes)
    own = layout.bytes_at()[rank(1)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    part = load_part(path, layout, rank(1))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before - own)
    del part


def in_a_loop(args: argparse.Namespace, turn: Turn, label: str) -> list[Row]:
    contenders = InALoop(turn, Loop(turn.state, args.tokens, args.device), args.plain_steps)
    found: dict[str, list[Costs]] = {"ours": [], "blocking": [], "dcp": [], "dcp_late": []}
    given_up: set[str] = set()
    for index in range(args.rounds + 1):
        for kind, costs in found.items():
            if kind in given_up:
                continue
            try:
                cost = getattr(contenders, kind)()
            except Exception as error:  # torch 2.11 cannot use a stager twice
                if kind != "dcp_late":
                    raise
                print(f"round {index}: in a loop, {kind} failed: {error!r}", file=sys.stderr)
                given_up.add(kind)
                continue
            print(f"round {index}: in a loop, {kind} {cost}", file=sys.stderr)
            if index:
                costs.append(cost)
    contenders.close()
    peers = {
        "blocking": "Resilin, blocking",
        "dcp": f"{DCP}, async_save",
        "dcp_late": f"{DCP}, async_save with staging in a thread",
    }

    def row(what: str, part: str, peer: str, **more: Any) -> Row:
        mine, other = ([getattr(cost, part) for cost in found[kind]] for kind in ("ours", peer))
        made = Row.from_turns(what, "s", mine, other, peers[peer], better="lower", **more)
        # Differences of step times: less than a millisecond is none, and nothing can be so many times none.
        ours, peer = (value if value >= 1e-3 else 0.0 for value in (made.ours, made.peer or 0.0))
        return made.model_copy(update={"ours": max(ours, 1e-3) if made.target is not None else ours, "peer": peer})

    aimed = {"target": 20.0, "note": "at most 5% of a blocking save"}
    longer = f"{label}: by how much a step takes longer before which a save in the background is begun"
    blocked = f"{label}: of that, how long the loop is blocked"
    after = f"{label}: by how much the steps after it take longer, until all is written"
    rows = [
        row(longer, "step", "blocking", **aimed),
        row(longer, "step", "dcp"),
        row(blocked, "blocked", "blocking", **aimed),
        row(blocked, "blocked", "dcp"),
        row(after, "after", "dcp"),
    ]
    if not given_up:
        rows += [
            row(what, part, "dcp_late") for what, part in ((longer, "step"), (blocked, "blocked"), (after, "after"))
        ]
    return rows


def measure(args: argparse.Namespace, at: Path) -> list[Row]:
    state = state_of(args.gib, args.device)
    size, turn = bytes_of(state), Turn(at, state, args.cold)
    largest = max(tensor.numel() * tensor.element_size() for tensor in tensors_of(state))
    kinds = ["save_ours", "save_dcp", "save_plain", "load_ours", "load_dcp", "load_plain", "part_ours"]
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for index in range(args.rounds + 1):
        for kind in kinds:
            taken = getattr(turn, kind)()
            print(f"round {index}: {kind} {taken:.2f} s", file=sys.stderr)
            if index:  # the first round warms up, and fills memory that is kept
                times[kind].append(taken)
    speed = {kind: [size / GB / taken for taken in taken_all] for kind, taken_all in times.items()}
    label = f"{size / GIB:.2g} GiB on {args.device}"
    rows = in_a_loop(args, turn, label)
    for what in ("save", "load"):
        mine = speed[f"{what}_ours"]
        rows += [
            Row.from_turns(f"{label}: {what}", "GB/s", mine, speed[f"{what}_dcp"], DCP, target=1.5),
            Row.from_turns(f"{label}: {what}", "GB/s", mine, speed[f"{what}_plain"], PLAIN, target=0.7),
        ]
    rows.append(
        Row.from_turns(
            f"{label}: a rank's half of the columns, loaded from one process's files", "s", times["part_ours"],
            times["load_ours"], "Resilin, all of it", better="lower",
        )
    )  # fmt: skip
    child = [sys.executable, __file__, "--peak", str(at / "ours" / "step-00000001")]
    extra = float(subprocess.run(child, check=True, capture_output=True, text=True).stdout)
    allowed = largest + PEAK_SLACK
    rows.append(
        Row(
            name=f"{label}: memory of that load beside its result",
            unit="MiB",
            ours=max(extra / 2**20, 1.0),
            peer=allowed / 2**20,
            peer_name="one largest tensor and 64 MiB",
            better="lower",
            target=1.0,
        )
    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0, help="of the state, as float32 weights and two moments")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, help="of a step of the loop; default: 256, 16384 on a GPU")
    parser.add_argument("--plain-steps", type=int, default=3, help="steps without a save, before each with one")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the system's temporary folder")
    parser.add_argument("--cold", action="store_true", help="drop the page cache before each load")
    parser.add_argument("--name", help="the results file; default: checkpoint, checkpoint-cuda on a GPU")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.tokens = args.tokens or (256 if args.device == "cpu" else 16384)
    if args.peak:
        peak_child(args.peak)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        # torch's async_save wants a process group, of which ours is a single gloo process.
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
        try:
            rows = measure(args, Path(folder))
        finally:
            dist.destroy_process_group()
    for row in rows:
        ratio = "" if row.ratio is None else f" ({row.ratio:.2f}x)"
        print(f"{row.name}: {row.ours:.3g} {row.unit}, {row.peer_name} {row.peer:.3g} {row.unit}{ratio}")
    settings = {"gib": args.gib, "rounds": args.rounds, "device": args.device, "threads": args.threads} | {
        "tokens": args.tokens,
        "plain_steps": args.plain_steps,
        "page_cache": "dropped before each load" if args.cold else "warm",
    }
    name = args.name or results_name("checkpoint-cold" if args.cold else "checkpoint", args.device)
    print(f"wrote {Report.of(name, settings, rows).write(args.output)}")


if __name__ == "__main__":
    main()
