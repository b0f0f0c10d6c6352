"""Steps divided over workers: our data and tensor parallelism and pipelines against torch, in turns in one job.

What is measured:
- a step of ZeRO-1 with canonical sums (`parallel.reduction = fast` and `exact`) against torch's
  DistributedDataParallel (default buckets) and FSDP2, all with the same model, objective, clipping and fused AdamW;
- forward and backward passes under tensor parallelism against transformers' Llama, the same weights, cut by torch's
  parallelize_module;
- forward and backward passes of a pipeline against torch.distributed.pipelining: the same stages, schedule and
  micro-batches;
- the bubble of a pipeline of two against (p - 1) / m, and against a simulation with the stages' mean costs: from the
  records of every action, the idle time of the busiest rank over its busy time, in steps that no other program on the
  machine disturbed;
- how many micro-batches' activations the fullest rank holds, against m (GPipe) and p (1F1B).

    resilin bench run parallel
    resilin bench run parallel --only data --scale 0.1
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from parallel_rows import data, pipeline, tensor
from resilin.bench.results import Report, Row, results_name
from resilin.cluster.join import joined
from resilin.cluster.local import run_workers
from resilin.cluster.position import position
from resilin.models.decoder_settings import DecoderSettings
from resilin.run.allocator import keep_freed_memory
from resilin.run.device import set_threads

LARGE = DecoderSettings(vocab_size=8192, hidden_size=384, layers=8, heads=6, mlp_size=1024)
SMALL = DecoderSettings(vocab_size=256, hidden_size=128, layers=4, heads=4, mlp_size=344)
GPU = DecoderSettings(vocab_size=32768, hidden_size=1024, layers=12, heads=16, mlp_size=2816)
STAGES = DecoderSettings(vocab_size=256, hidden_size=256, layers=8, heads=4, mlp_size=688)
GPU_STAGES = DecoderSettings(vocab_size=1024, hidden_size=2048, layers=16, heads=16, mlp_size=5632)
KINDS = ("data", "tensor", "pipeline", "bubbles", "held")


def data_cases(workers: int, device: str, scale: float) -> list[data.Case]:
    def rounds(count: int) -> int:
        return max(2, round(count * scale))

    if device == "cuda":
        return [data.Case(GPU, 8, 1024, micros, rounds(20)) for micros in (1, 4)]
    rows = 4 // workers
    return [
        data.Case(LARGE, rows, 128, 1, rounds(12)),
        data.Case(LARGE, rows, 64, 4, rounds(8)),
        data.Case(SMALL, 4 * rows, 64, 2, rounds(40)),
    ]


def tensor_cases(device: str, scale: float) -> list[tensor.Case]:
    rounds = max(2, round(12 * scale))
    if device == "cuda":
        return [tensor.Case(2048, 8, 16, 5632, 32768, 4, 2048, rounds)]
    return [tensor.Case(384, 6, 8, 1024, 4096, 4, 128, rounds), tensor.Case(128, 4, 4, 344, 256, 4, 64, 2 * rounds)]


def pipeline_rows(options: argparse.Namespace, device: torch.device) -> list[Row]:
    case = pipeline.Case(GPU_STAGES, 1, 2048) if options.device == "cuda" else pipeline.Case(STAGES, 1, 128)
    if options.kind == "held":
        return pipeline.held(case, ("gpipe", "1f1b"), 8, device)
    if options.kind == "bubbles":
        # Passes of some tenths of a second: of a sixteenth, a message and the system's own work are a hundredth part.
        longer = case if options.device == "cuda" else replace(case, rows=2, tokens=512)
        return pipeline.bubbles(longer, ("gpipe", "1f1b"), (4, 8, 16), max(2, round(8 * options.scale)), device)
    return pipeline.against_torch(case, 8, max(2, round(40 * options.scale)), device)  # a round is a third of a second


def worker(options: argparse.Namespace) -> None:
    """As one of several: the first one writes the rows."""
    place = position()
    assert place is not None
    set_threads(options.threads)
    keep_freed_memory()  # as in a run; it is all contenders' gain
    device = torch.device("cuda", place.local_rank) if options.device == "cuda" else torch.device("cpu")
    rows: list[Row] = []
    with joined(place, device, 300.0):
        if options.kind == "data":
            for case in data_cases(place.workers, options.device, options.scale):
                rows += data.rows_of(case, device)
        elif options.kind == "tensor":
            for shape in tensor_cases(options.device, options.scale):
                rows += tensor.rows_of(shape, device)
        else:
            rows = pipeline_rows(options, device)
    if place.rank == 0:
        told = [row.model_dump(mode="json", exclude={"ratio", "met"}) for row in rows]
        options.rows_to.write_text(json.dumps(told), encoding="utf-8")


def measured(kind: str, workers: int, options: argparse.Namespace) -> list[Row]:
    """The rows of a job of its own."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        rows_file = Path(folder) / "rows.json"
        command = [sys.executable, __file__, "--kind", kind, "--rows-to", str(rows_file)]
        command += ["--device", options.device, "--scale", str(options.scale), "--threads", str(options.threads)]
        ended = run_workers(command, [kind] * workers, Path(folder))
        if ended.code:
            logs = [path.read_text(encoding="utf-8", errors="replace") for path in Path(folder).glob("*.log")]
            raise SystemExit("\n".join([f"{kind} with {workers} workers failed: {ended.message}", *logs]))
        found = [Row.model_validate(row) for row in json.loads(rows_file.read_text(encoding="utf-8"))]
    print(f"{kind}, {workers} workers: {len(found)} rows in {time.perf_counter() - began:.0f} s", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--workers", type=int, nargs="+", help="default: 2 and 4; on GPUs, one for each")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of rounds")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--name", help="the results file; default: parallel, parallel-cuda on GPUs")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    parser.add_argument("--rows-to", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kind:
        worker(options)
        return
    gpus = torch.cuda.device_count()
    counts = options.workers or ([gpus] if options.device == "cuda" else [2, 4])
    rows = []
    for kind in ("data", "tensor"):
        for workers in counts if kind in options.only else ():
            rows += measured(kind, workers, options)
    for kind in ("pipeline", "bubbles"):
        if kind in options.only and (options.device == "cpu" or gpus > 1):
            rows += measured(kind, 2, options)
    if "held" in options.only and (options.device == "cpu" or gpus > 3):
        rows += measured("held", 4, options)
    for row in rows:
        ratio = "" if row.ratio is None else f" ({row.ratio:.2f}x)"
        print(f"{row.name}: {row.ours:.3g} {row.unit}, {row.peer_name} {row.peer:.3g} {row.unit}{ratio}")
    settings = {"workers": counts, "threads": options.threads, "scale": options.scale, "device": options.device}
    name = options.name or results_name("parallel", options.device)
    print(f"wrote {Report.of(name, settings, rows).write(options.output)}")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
