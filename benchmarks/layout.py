"""Seconds and memory of planning a move from one layout to another, for models and clusters that are not here.

Nothing is moved: a plan is arithmetic on regions, and every rank can make it for itself. Each measurement is a process
of its own on one core, so that its memory is known. The peer is the resharding arithmetic of torch's distributed
checkpoint (`create_read_items_for_chunk_list`), given the chunks of all ranks at once, in turns with ours, on a tenth
of the layers; it names what each rank reads, and does not ask which copy sends or what is already there.

    resilin bench run layout --help
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from resilin.bench.results import Report, Row
from resilin.layout import Cut, Deal, Flat, Layout, Mesh, ParamSpec, Shard, check, flat_group, layout_of, plan

LIMIT_S, LIMIT_BYTES = 10.0, 1 << 30
DCP = "torch DCP"
Specs = dict[str, ParamSpec]


def parameters(
    layers: int, hidden: int = 8192, mlp: int = 28672, words: int = 128256, keys: int = 1024
) -> dict[str, Any]:
    """Shapes of a decoder of Llama-70B's width; 110 layers make 993 parameters."""
    shapes: dict[str, Any] = {"embed": (words, hidden), "head": (words, hidden), "norm": (hidden,)}
    for i in range(layers):
        layer = {"q": (hidden, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, hidden)}
        layer |= {
            "gate": (mlp, hidden),
            "up": (mlp, hidden),
            "down": (hidden, mlp),
            "norm": (hidden,),
            "norm2": (hidden,),
        }
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def tensor_parallel(name: str, shape: tuple[int, ...]) -> tuple[Cut, ...]:
    if len(shape) == 1:
        return ()
    return (Shard("tp", 1 if name.endswith((".o", ".down")) else 0),)


def fsdp(shapes: dict[str, Any], mesh: Mesh) -> Specs:
    return {name: ParamSpec(shape, "F32", (Shard("dp", 0),)) for name, shape in shapes.items()}


def hybrid(shapes: dict[str, Any], mesh: Mesh) -> Specs:
    """Tensor parallel, and each rank's part cut once more along its first dimension."""
    return {name: ParamSpec(s, "F32", (*tensor_parallel(name, s), Shard("dp", 0))) for name, s in shapes.items()}


def zero3(shapes: dict[str, Any], mesh: Mesh) -> Specs:
    return {name: ParamSpec(shape, "F32", (Flat("dp"),)) for name, shape in shapes.items()}


def zero1(shapes: dict[str, Any], mesh: Mesh) -> Specs:
    return flat_group({n: ParamSpec(s, "F32", tensor_parallel(n, s)) for n, s in shapes.items()}, mesh, "dp")


def dealt(shapes: dict[str, Any], mesh: Mesh) -> Specs:
    """Virtual shards owned through a table, as the elastic step keeps them."""
    ways = mesh.axis("dp")
    owners = tuple(shard % ways for shard in range(2048))
    return {name: ParamSpec(shape, "F32", (Deal("dp", owners, 0),)) for name, shape in shapes.items()}


CASES: dict[str, tuple[Callable[[dict[str, Any], Mesh], Specs], str, str]] = {
    "FSDP, 1,024 to 768 ranks": (fsdp, "dp=1024", "dp=768"),
    "FSDP with 8 copies to 4, 1,024 to 768 ranks": (fsdp, "copies=8,dp=128", "copies=4,dp=192"),
    "tensor parallel 8 to 4 with FSDP, 1,024 to 768 ranks": (hybrid, "dp=128,tp=8", "dp=192,tp=4"),
    "ZeRO-3, 1,024 to 768 ranks": (zero3, "dp=1024", "dp=768"),
    "ZeRO-1 with tensor parallel 8, 1,024 to 768 ranks": (zero1, "dp=128,tp=8", "dp=96,tp=8"),
    "2,048 virtual shards, 1,024 to 768 ranks": (dealt, "dp=1024", "dp=768"),
}
CURVE = [32, 64, 128, 256, 512, 1024, 2048]


def layouts(case: str, layers: int) -> tuple[Layout, Layout]:
    make, source, target = CASES[case]
    shapes = parameters(layers)
    here, there = Mesh.parse(source), Mesh.parse(target)
    return layout_of(make(shapes, here), here), layout_of(make(shapes, there), there)


def one_of_ours(case: str, layers: int) -> dict[str, float]:
    """Layouts from specifications, their census, and the plan: all of it counts."""
    began = time.perf_counter()
    source, target = layouts(case, layers)
    check(source)
    check(target)
    made = plan(source, target)
    seconds = time.perf_counter() - began
    sent = [count for count in made.sent().values() if count]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "seconds": seconds,
        "bytes": peak,
        "moves": len(made),
        "uneven": max(sent, default=1) * len(sent) / max(sum(sent), 1),
    }


def one_of_dcp(case: str, layers: int) -> dict[str, float]:
    """Only the peer's arithmetic is timed, not the making of its chunks."""
    import torch
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata
    from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

    source, target = layouts(case, layers)
    seconds, items = 0.0, 0
    for name in target.tensors:
        held, wanted = source.tensors[name], target.tensors[name]
        saved = dict.fromkeys(held.boxes)  # the peer writes each copy once
        chunks, local = (
            [ChunkStorageMetadata(torch.Size(r.offsets), torch.Size(r.sizes)) for r in regions]
            for regions in (saved, wanted.boxes)
        )
        known = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size(held.shape), chunks)
        began = time.perf_counter()
        items += len(create_read_items_for_chunk_list(name, known, local))
        seconds += time.perf_counter() - began
    return {"seconds": seconds, "moves": items}


def child(contender: str, case: str, layers: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", contender, "--case", case, "--layers", str(layers)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_case(case: str, layers: int, rounds: int) -> list[Row]:
    found = [child("ours", case, layers) for _ in range(rounds)]
    name = f"plan of {len(parameters(layers))} parameters, {case}"
    note = f"{found[0]['moves']:,.0f} moves; the busiest sender sends {found[0]['uneven']:.2f} times the mean"
    seconds, memory = ([one[what] for one in found] for what in ("seconds", "bytes"))
    limit = {"peer_name": "the limit set", "better": "lower", "target": 1.0}
    return [
        Row(name=name, unit="s", ours=median(seconds), peer=LIMIT_S, runs={"ours": seconds}, note=note, **limit),
        Row(name=f"memory: {name}", unit="bytes", ours=max(memory), peer=LIMIT_BYTES, runs={"ours": memory}, **limit),
    ]


def measure_peer(case: str, layers: int, rounds: int) -> Row:
    turns = [(child("ours", case, layers), child("dcp", case, layers)) for _ in range(rounds)]
    ours, peer = ([one["seconds"] for one in column] for column in zip(*turns, strict=True))
    note = f"{turns[0][1]['moves']:,.0f} items; ours makes layouts, counts elements and chooses senders besides"
    name = f"plan of {len(parameters(layers))} parameters, {case}"
    return Row.from_turns(name, "s", ours, peer, DCP, better="lower", note=note)


def measure_curve(layers: int, rounds: int) -> list[Row]:
    """Seconds for more and more ranks; the exponent of their growth with the number of moves."""
    points = []
    for ranks in CURVE:
        case = f"curve {ranks}"
        found = [child("ours", case, layers) for _ in range(rounds)]
        points.append((found[0]["moves"], median(one["seconds"] for one in found), found))
    logs = [(math.log(moves), math.log(seconds)) for moves, seconds, _ in points]
    mean_x, mean_y = (sum(column) / len(logs) for column in zip(*logs, strict=True))
    slope = sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)
    rows = [
        Row(name=f"ZeRO-3, {ranks:,} to {ranks * 3 // 4:,} ranks: {moves:,.0f} moves", unit="s", ours=seconds,
            runs={"ours": [one["seconds"] for one in found]})
        for ranks, (moves, seconds, found) in zip(CURVE, points, strict=True)
    ]  # fmt: skip
    rows.append(
        Row(name="growth of seconds with moves, exponent", unit="", ours=slope, peer=1.1, peer_name="nearly linear",
            better="lower", target=1.0, note="fitted to the rows of the curve")
    )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=110)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--child", choices=["ours", "dcp"], help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    CASES.update({f"curve {n}": (zero3, f"dp={n}", f"dp={n * 3 // 4}") for n in CURVE})
    if args.child:
        print(json.dumps((one_of_ours if args.child == "ours" else one_of_dcp)(args.case, args.layers)))
        return
    rows: list[Row] = []
    for case in [case for case in CASES if not case.startswith("curve")]:
        rows += measure_case(case, args.layers, args.rounds)
        rows.append(measure_peer(case, max(args.layers // 10, 1), args.rounds))
    rows += measure_curve(args.layers, args.rounds)
    for row in rows:
        print(f"{row.name}: {row.ours:.4g} {row.unit}" + (f", {row.peer_name} {row.peer:.4g}" if row.peer else ""))
    settings = {"rounds": args.rounds, "parameters": len(parameters(args.layers)), "threads": 1}
    print(f"wrote {Report.of('layout', settings, rows).write(args.output)}")


if __name__ == "__main__":
    main()
