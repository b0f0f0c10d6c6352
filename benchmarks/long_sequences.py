"""The longest row that can be trained on within a memory limit, by what is switched on, against `transformers`.

Every contender trains the same Llama (same shape, float32 on a CPU, bfloat16 by autocast on a GPU, AdamW of torch) on
one row a step, in a process of its own that may hold so much memory and no more. Lengths are searched until the longest
that fits and the shortest that does not are a few per cent apart; memory at every length that was tried is kept. On a
CPU memory is the largest resident set of the process, on a GPU what the allocator held. Rows divided over ranks have
the limit for each rank.

    resilin bench run long_sequences --help
"""

from __future__ import annotations

import argparse
import ctypes
import math
import multiprocessing
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from resilin.bench.results import Report, Row, results_name
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.settings import ModelContext
from resilin.nouns import Batch
from resilin.objective.next_token import NextToken
from resilin.parallel.group import Group
from resilin.parallel.sequence.shard import shard_sequence
from resilin.parallel.sequence.ulysses import ulysses

SHAPES: dict[str, dict[str, int]] = {
    "cpu": {"vocab_size": 32768, "hidden_size": 256, "layers": 4, "heads": 4, "kv_heads": 2, "mlp_size": 1024},
    "cuda": {"vocab_size": 128256, "hidden_size": 2048, "layers": 16, "heads": 32, "kv_heads": 8, "mlp_size": 8192},
}
LIMITS = {"cpu": 640, "cuda": 40960}  # MiB
SHORT = 64  # tokens of the step before the measured one, which makes the optimizer's moments
MMAP_THRESHOLD = -3  # malloc.h
PLAIN = "Resilin, everything off"
ALL = "all of these"


@dataclass(frozen=True)
class Contender:
    """What trains.

    Attributes:
        library: "resilin", or the attention of `transformers`.
        changes: of the decoder's settings.
        chunk: of the loss; 0: whole logits.
        ranks: that share each row.
    """

    library: str = "resilin"
    changes: dict[str, Any] = field(default_factory=dict)
    chunk: int | None = 0
    ranks: int = 1


def contenders(device: str) -> dict[str, Contender]:
    away = {"recompute": "block", "offload": "host" if device == "cuda" else "disk"}
    found = {
        "transformers, eager attention": Contender("eager"),
        "transformers, sdpa": Contender("sdpa"),
        PLAIN: Contender(),
        "loss in chunks": Contender(chunk=None),
        "feed-forward in tiles": Contender(changes={"mlp_tiles": "auto"}),
        "recomputed blocks": Contender(changes={"recompute": "block"}),
        "loss in chunks, recomputed blocks": Contender(changes={"recompute": "block"}, chunk=None),
        "loss in chunks, recomputed blocks, tiles": Contender(
            changes={"recompute": "block", "mlp_tiles": "auto"}, chunk=None
        ),
        "loss in chunks, recomputed blocks, inputs away": Contender(changes=away, chunk=None),
        ALL: Contender(changes=away | {"mlp_tiles": "auto"}, chunk=None),
    }
    if device == "cpu":
        found["Ulysses, 2 ranks"] = Contender(ranks=2)
    return found


def transformers_model(shape: dict[str, int], attention: str) -> nn.Module:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=shape["vocab_size"], hidden_size=shape["hidden_size"], intermediate_size=shape["mlp_size"],
        num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"], num_key_value_heads=shape["kv_heads"],
        tie_word_embeddings=True, max_position_embeddings=2**22, attn_implementation=attention, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


class Loop:
    """One contender, ready to step."""

    def __init__(self, who: Contender, shape: dict[str, int], device: str, group: Group) -> None:
        self.who, self.device, self.group, self.vocabulary = who, device, group, shape["vocab_size"]
        if who.library == "resilin":
            self.model = DecoderSettings(**shape, tie_embeddings=True, **who.changes).build(ModelContext(0))
            self.objective = NextToken(chunk=who.chunk).build()
            ulysses(self.model, group)
        else:
            self.model = transformers_model(shape, who.library)
        self.model.to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters())

    def loss(self, tokens: Tensor) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            if self.who.library != "resilin":
                return self.model(input_ids=tokens, labels=tokens).loss
            labels = torch.cat((tokens[:, 1:], torch.full_like(tokens[:, :1], -100)), dim=1)
            batch = shard_sequence(Batch(torch.arange(1), {"tokens": tokens, "labels": labels}), self.group)
            return self.objective(self.model, batch, None).sum / (tokens.shape[1] - 1)

    def step(self, length: int) -> None:
        tokens = torch.arange(length, device=self.device)[None] * 31 % self.vocabulary
        self.loss(tokens).backward()
        if self.group.size > 1:
            for parameter in self.model.parameters():
                dist.all_reduce(parameter.grad)
        self.optimizer.step()
        self.optimizer.zero_grad()


def resident(process: int | str = "self", name: str = "VmHWM") -> int:
    """MiB."""
    for line in Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) // 1024
    raise RuntimeError(f"/proc/{process}/status does not tell {name}")


def child(rank: int, meeting: str, who: Contender, length: int, device: str, limit: int, pipe: Connection) -> None:
    """Trains two steps; sends the peak in MiB, or infinity."""
    torch.set_num_threads(1)
    group = Group.alone()
    if who.ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=who.ranks)
        group = Group.of()
    if device == "cuda":
        torch.cuda.set_per_process_memory_fraction(limit * 2**20 / torch.cuda.mem_get_info()[1])
    else:
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 2**20)  # what is freed is gone, for everyone
    loop = Loop(who, SHAPES[device], device, group)
    try:
        loop.step(SHORT)
        loop.step(length)
        peak = float(torch.cuda.max_memory_reserved() // 2**20 if device == "cuda" else resident())
    except torch.cuda.OutOfMemoryError:
        peak = math.inf
    pipe.send(peak)
    os._exit(0)


def peak_of(context: Any, who: Contender, length: int, device: str, limit: int) -> float:
    """MiB of the rank that held most; infinity where one went beyond the limit and was ended."""
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(who.ranks):
            mine, theirs = context.Pipe(duplex=False)
            arguments = (rank, f"{folder}/meeting", who, length, device, limit, theirs)
            processes.append(context.Process(target=child, args=arguments, daemon=True))
            processes[-1].start()
            theirs.close()
            pipes.append(mine)
        peaks: list[float] = []
        while len(peaks) < who.ranks:
            try:
                ready = wait(pipes, 0.05)
                peaks += [pipes.pop(pipes.index(pipe)).recv() for pipe in ready]  # type: ignore[arg-type,union-attr]
                if device == "cpu" and any(resident(p.pid, "VmRSS") > limit for p in processes if p.is_alive()):
                    peaks = [math.inf] * who.ranks
            except EOFError:
                raise RuntimeError(f"{who}: a process ended at {length} tokens without an answer") from None
            except (RuntimeError, FileNotFoundError, ProcessLookupError):
                continue  # it ended while it was looked at
        for process in processes:
            process.kill()
            process.join()
        return max(peaks)


def longest(context: Any, who: Contender, device: str, limit: int, fineness: float) -> tuple[int, dict[int, float]]:
    """The longest row that fits, to `fineness`, and the peak at each length that was tried."""
    tried: dict[int, float] = {}
    low, high = 0, math.inf

    def try_(length: int) -> None:
        nonlocal low, high
        tried[length] = peak_of(context, who, length, device, limit)
        if tried[length] <= limit:
            low = max(low, length)
        else:
            high = min(high, length)

    for length in (128, 256) if device == "cpu" else (4096, 8192):
        try_(length)
    while low and high > (1 + fineness) * low:
        known = sorted(length for length, peak in tried.items() if peak < math.inf)[-2:]
        slope = (tried[known[-1]] - tried[known[0]]) / max(1, known[-1] - known[0])
        guess = known[-1] + (limit - tried[known[-1]]) / slope if slope > 0 else 2 * low
        # Not far beyond what is known, and between what fits and what does not.
        guess = min(guess * (0.99 if high == math.inf else 1.0), 8 * low)
        below, above = low * (1 + fineness / 2), min(high * (1 - fineness / 4), 8 * low)
        try_(int(min(max(guess, below), above)) // 2 * 2)
    return low, tried


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--limit", type=int, help="MiB for each process; default: 640, 40960 on a GPU")
    parser.add_argument("--fineness", type=float, default=0.1, help="how far apart what fits and what does not may be")
    parser.add_argument("--processes", type=int, default=2, help="contenders that are tried at the same time")
    parser.add_argument("--only", nargs="*", help="names of contenders; default: all")
    parser.add_argument("--name", help="the results file; default: long_sequences, long_sequences-cuda on a GPU")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    limit = args.limit or LIMITS[args.device]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["transformers.models.llama.modeling_llama", "long_sequences"])
    lengths, runs = {}, {}
    everyone = contenders(args.device)
    unknown = set(args.only or ()) - everyone.keys()
    if unknown:
        parser.error(f"no contender is called {min(unknown)!r}; there are: {'; '.join(everyone)}")
    chosen = {name: who for name, who in everyone.items() if not args.only or name in args.only}
    # Memory is each process's own, so contenders may be tried at the same time; those with the longest rows first.
    with ThreadPoolExecutor(args.processes) as pool:
        futures = {
            name: pool.submit(longest, context, who, args.device, limit, args.fineness)
            for name, who in reversed(chosen.items())
        }
        for name in chosen:
            lengths[name], tried = futures[name].result()
            runs[name] = {str(length): peak for length, peak in sorted(tried.items()) if peak < math.inf}
            print(f"{name}: {lengths[name]:,} tokens (MiB {runs[name]})", flush=True)
    prefix, rows = f"longest row within {limit} MiB", []
    for name, length in lengths.items():
        peer = name == PLAIN or name.startswith("transformers")
        if peer and ALL in lengths:
            found = Row(name=f"{prefix}, {ALL}", unit="tokens", ours=lengths[ALL], peer=length, peer_name=name)
            rows.append(found.model_copy(update={"target": None if name == PLAIN else 8.0}))
    for name, length in lengths.items():
        if name not in (ALL, PLAIN) and not name.startswith("transformers") and PLAIN in lengths:
            row = Row(name=f"{prefix}, {name}", unit="tokens", ours=length, peer=lengths[PLAIN], peer_name=PLAIN)
            rows.append(row)
    settings = {"device": args.device, "limit_mib": limit, "fineness": args.fineness, **SHAPES[args.device]}
    name = args.name or results_name("long_sequences", args.device)
    report = Report.of(name, settings | {"peak_mib_by_length": runs}, rows)
    print(f"wrote {report.write(args.output)}")


if __name__ == "__main__":
    main()
