"""Saving on some ranks and going on with others, in another layout: against DeepSpeed's save, convert and load.

Both save the state of one model under AdamW with ZeRO-1 from real processes (gloo), and open it on another number of
processes. DeepSpeed's way is `save_checkpoint`, `ds_to_universal`, `load_checkpoint` with load_universal; ours is a
save and a load: every rank reads the byte ranges that are its own. What is timed is the work and not the start of
processes, imports or engines: inside DeepSpeed's functions, and the slowest rank counts. DeepSpeed trains in float32,
so that both hold weights and two moments of four bytes; it writes the weights once more, as the module's state.

    resilin bench run resuming --help
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from resilin.bench.results import Report, Row

HIDDEN, TAG = 1024, "step1"
DEEPSPEED = "DeepSpeed, ds_to_universal and load"
KINDS = ("model", "exp_avg", "exp_avg_sq")
HERE = Path(__file__)


def shapes_of(layers: int) -> dict[str, tuple[int, ...]]:
    """Feed-forward layers, weights and biases."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        shapes |= {f"{layer}.up.weight": (4 * HIDDEN, HIDDEN), f"{layer}.up.bias": (4 * HIDDEN,)}
        shapes |= {f"{layer}.down.weight": (HIDDEN, 4 * HIDDEN), f"{layer}.down.bias": (HIDDEN,)}
    return shapes


def slowest(seconds: float) -> float:
    """Over all ranks."""
    import torch
    import torch.distributed as dist

    longest = torch.tensor([seconds], dtype=torch.float64)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    return float(longest)


def timed(work: Callable[[], Any]) -> float:
    """Of all ranks together, from a common start."""
    import torch.distributed as dist

    dist.barrier()
    began = time.perf_counter()
    work()
    return slowest(time.perf_counter() - began)


# ---- DeepSpeed -----------------------------------------------------------------------------------------------------


def without_compiling() -> None:
    """No extension for faster messages: a compiler is not part of the comparison."""
    import deepspeed  # noqa: F401

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]


def engine_of(layers: int, universal: bool) -> Any:
    import deepspeed
    import torch
    from torch import nn

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            pairs = [(nn.Linear(HIDDEN, 4 * HIDDEN), nn.Linear(4 * HIDDEN, HIDDEN)) for _ in range(layers)]
            self.layers = nn.ModuleList(nn.ModuleDict({"up": up, "down": down}) for up, down in pairs)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = x + layer["down"](torch.relu(layer["up"](x)))  # type: ignore[index]
            return x.square().mean()

    torch.manual_seed(0)
    model = Model()
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": 1},
        **({"checkpoint": {"load_universal": True}} if universal else {}),
    }
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)[0]


def deepspeed_save(folder: Path, layers: int) -> dict[str, float]:
    import torch

    engine = engine_of(layers, universal=False)
    engine.backward(engine(torch.randn(1, HIDDEN)))
    engine.step()
    return {"save": timed(lambda: engine.save_checkpoint(str(folder / "deepspeed"), tag=TAG))}


def deepspeed_convert(folder: Path, layers: int) -> dict[str, float]:
    from deepspeed.checkpoint import ds_to_universal as convert

    target = folder / "deepspeed" / f"{TAG}-universal"
    sys.argv = ["ds_to_universal", "--input_folder", str(folder / "deepspeed" / TAG), "--output_folder", str(target)]
    sys.argv.append("--inject_missing_state")
    arguments = convert.parse_arguments()
    began = time.perf_counter()
    convert.main(arguments)
    return {"convert": time.perf_counter() - began}


def deepspeed_load(folder: Path, layers: int) -> dict[str, float]:
    engine = engine_of(layers, universal=True)
    found: list[Any] = []
    seconds = timed(lambda: found.append(engine.load_checkpoint(str(folder / "deepspeed"), tag=f"{TAG}-universal")))
    assert found[0][0] is not None
    return {"load": seconds}


# ---- Resilin -------------------------------------------------------------------------------------------------------


def layout_on(layers: int, ranks: int) -> Any:
    """ZeRO-1: weights and both moments, each a flat buffer in equal ranges."""
    from resilin.layout import Layout, Mesh, ParamSpec, flat_group, layout_of

    mesh = Mesh.of(dp=ranks)
    shapes = shapes_of(layers)
    tensors: dict[str, Any] = {}
    buffers: list[str] = []
    for kind in KINDS:
        specs = flat_group({f"{kind}/{n}": ParamSpec(s) for n, s in shapes.items()}, mesh, "dp", buffer=kind)
        made = layout_of(specs, mesh, buffers=[*buffers, kind])
        tensors, buffers = tensors | dict(made.tensors), [*buffers, kind]
    return Layout(made.places, tensors, tuple(buffers))


def coordinator() -> Any:
    import torch.distributed as dist

    from resilin.checkpoint.process_group import ProcessGroup

    return ProcessGroup(dist.new_group(backend="gloo"))


def resilin_save(folder: Path, layers: int) -> dict[str, float]:
    import torch
    import torch.distributed as dist

    from resilin.checkpoint.folder import CheckpointFolder
    from resilin.layout import rank

    layout, me = layout_on(layers, dist.get_world_size()), rank(dist.get_rank())
    lengths = {holding.buffer: 0 for holding in layout.at(me)}
    tree: dict[str, Any] = {kind: {} for kind in KINDS}
    for holding in layout.at(me):
        lengths[holding.buffer] = max(lengths[holding.buffer], holding.start + holding.region.numel)
    memory = {name: torch.randn(length) for name, length in lengths.items()}
    spans: dict[str, tuple[str, int, int]] = {}
    for holding in layout.at(me):
        end = holding.start + holding.region.numel
        _, low, high = spans.get(holding.tensor, ("", holding.start, end))
        spans[holding.tensor] = holding.buffer, min(low, holding.start), max(high, end)
    for tensor, (buffer, low, high) in spans.items():
        kind, _, name = tensor.partition("/")
        tree[kind][name] = memory[buffer][low:high]
    saver = CheckpointFolder(folder / "resilin", coordinator=coordinator())
    # A run saves again and again in one layout: who writes what is planned at the first save, and that is counted too.
    first = timed(lambda: saver.save(1, tree, layout, buffers=memory))
    return {"save": first, "again": timed(lambda: saver.save(2, tree, layout, buffers=memory))}


def resilin_load(folder: Path, layers: int) -> dict[str, float]:
    import torch.distributed as dist

    from resilin.checkpoint.folder import CheckpointFolder
    from resilin.checkpoint.load import load_part
    from resilin.layout import rank

    place = rank(dist.get_rank())
    at = CheckpointFolder(folder / "resilin").step_path(2)
    return {"load": timed(lambda: load_part(at, layout_on(layers, dist.get_world_size()), place))}


WORK: dict[str, Callable[[Path, int], dict[str, float]]] = {
    "deepspeed_save": deepspeed_save,
    "deepspeed_convert": deepspeed_convert,
    "deepspeed_load": deepspeed_load,
    "resilin_save": resilin_save,
    "resilin_load": resilin_load,
}


def child(role: str, folder: Path, layers: int) -> None:
    """One process of a contender; rank 0 prints its seconds."""
    import torch.distributed as dist

    if role == "deepspeed_convert":
        print(json.dumps(WORK[role](folder, layers)))
        return
    if role.startswith("deepspeed"):
        import deepspeed

        without_compiling()
        deepspeed.init_distributed("gloo")
    else:
        dist.init_process_group("gloo")
    found = WORK[role](folder, layers)
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def run(role: str, folder: Path, layers: int, ranks: int) -> dict[str, float]:
    """The seconds of a contender's work in processes of its own."""
    command = [sys.executable]
    if role != "deepspeed_convert":
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [str(HERE), "--child", role, "--folder", str(folder), "--layers", str(layers)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise SystemExit(f"{role} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    seconds: dict[str, float] = json.loads(lines[-1])
    print(f"{role} on {ranks}: {seconds}", file=sys.stderr)
    return seconds


def measure(args: argparse.Namespace, folder: Path) -> list[Row]:
    times: dict[str, list[float]] = {}
    for _ in range(args.rounds):
        for role, ranks in (
            ("resilin_save", args.ranks), ("resilin_load", args.to_ranks), ("deepspeed_save", args.ranks),
            ("deepspeed_convert", 1), ("deepspeed_load", args.to_ranks),
        ):  # fmt: skip
            for what, seconds in run(role, folder, args.layers, ranks).items():
                times.setdefault(f"{role.partition('_')[0]} {what}", []).append(seconds)
        shutil.rmtree(folder / "deepspeed")
        shutil.rmtree(folder / "resilin")
    numbers = sum(4 * HIDDEN * HIDDEN * 2 + 5 * HIDDEN for _ in range(args.layers))
    label = f"{numbers / 1e6:.0f}M parameters, ZeRO-1, {args.ranks} ranks to {args.to_ranks}"
    both = [sum(pair) for pair in zip(times["deepspeed convert"], times["deepspeed load"], strict=True)]
    return [
        Row.from_turns(f"{label}: resuming", "s", times["resilin load"], both, DEEPSPEED, better="lower", target=5.0),
        Row.from_turns(
            f"{label}: loading alone, converted before", "s", times["resilin load"], times["deepspeed load"],
            "DeepSpeed, load_checkpoint", better="lower",
        ),
        Row.from_turns(
            f"{label}: the first save", "s", times["resilin save"], times["deepspeed save"],
            "DeepSpeed, save_checkpoint", better="lower", note="ours brings every byte to disk (fsync), DeepSpeed not",
        ),
        Row.from_turns(
            f"{label}: a later save", "s", times["resilin again"], times["deepspeed save"],
            "DeepSpeed, save_checkpoint", better="lower", note="ours brings every byte to disk (fsync), DeepSpeed not",
        ),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=12, help="of 8.4 million parameters each")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--to-ranks", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the system's temporary folder")
    parser.add_argument("--output", type=Path, default=HERE.parent / "results")
    parser.add_argument("--child", choices=list(WORK), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.folder, args.layers)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        rows = measure(args, Path(folder))
    for row in rows:
        print(f"{row.name}: {row.ours:.3g} {row.unit}, {row.peer_name} {row.peer:.3g} {row.unit} ({row.ratio:.2f}x)")
    settings = {"rounds": args.rounds, "layers": args.layers, "ranks": args.ranks, "to_ranks": args.to_ranks}
    print(f"wrote {Report.of('resuming', settings, rows).write(args.output)}")


if __name__ == "__main__":
    main()
