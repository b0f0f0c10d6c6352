"""Tokens/s and peak memory of training, against the transformers Trainer and a plain loop, same model and data.

Each contender lives in a process of its own and takes the same few steps when it is told to, one contender after
the other, several rounds: a noisy machine disturbs all alike. The matrix-product peak is measured in the same run.

    resilin bench run training --help
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LENGTH = 256
# hidden, layers, mlp, heads, kv heads, vocabulary, rows a batch, tokens a row
SIZES = {
    "5M": (256, 6, 688, 4, 2, 4096, 8, 256),
    "30M": (512, 8, 1408, 8, 4, 8192, 8, 256),
    "125M": (768, 12, 2048, 12, 12, 32000, 16, 1024),
    "350M": (1024, 24, 2816, 16, 16, 32000, 8, 1024),
    "1B": (2048, 18, 5632, 16, 8, 32000, 8, 1024),
}
CONTENDERS = {"ours": "Resilin", "trainer": "transformers Trainer", "plain": "plain loop"}


def rows(size: str) -> Any:
    """The same token rows for everyone: (rows, LENGTH + 1) int64, from bytes of Python's own library."""
    import sysconfig

    import numpy as np
    import torch

    vocabulary, length = SIZES[size][5], SIZES[size][7]
    text = b"".join(path.read_bytes() for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")))
    pairs = np.frombuffer(text, dtype=np.uint8).astype(np.int64)
    ids = (pairs[:-1] * 31 + pairs[1:] * 7919) % vocabulary  # two bytes a token: uses the whole vocabulary
    count = len(ids) // (length + 1)
    return torch.from_numpy(ids[: count * (length + 1)].reshape(count, length + 1))


def transformers_model(size: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers, mlp, heads, kv_heads, vocabulary, _, length = SIZES[size]
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden,
            num_hidden_layers=layers,
            intermediate_size=mlp,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            vocab_size=vocabulary,
            max_position_embeddings=length,
            tie_word_embeddings=True,
            attn_implementation="sdpa",
        )
    )


class Turns:
    """A contender's side: `step_done` after each step; every `block` steps report the seconds and wait to go on."""

    def __init__(self, block: int, device: str) -> None:
        self.block, self.device, self.count = block, device, 0
        self.started = 0.0
        self.wait()

    def now(self) -> float:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()

    def wait(self) -> None:
        if sys.stdin.readline().strip() != "go":
            self.leave()
        self.started = self.now()

    def leave(self) -> None:
        import resource

        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if self.device == "cuda":
            import torch

            memory = torch.cuda.max_memory_allocated()
        print(json.dumps({"memory": memory}), file=OUT, flush=True)
        os._exit(0)

    def step_done(self) -> None:
        self.count += 1
        if self.count % self.block == 0:
            print(json.dumps({"seconds": self.now() - self.started}), file=OUT, flush=True)
            self.wait()


OUT = sys.stdout


def contender_ours(args: argparse.Namespace) -> None:
    import torch

    from resilin.models.decoder_settings import DecoderSettings
    from resilin.models.settings import ModelContext
    from resilin.nouns import Batch
    from resilin.objective.next_token import NextToken
    from resilin.optim.adamw import AdamW
    from resilin.precision.autocast import choose_precision
    from resilin.precision.settings import PrecisionSettings
    from resilin.run.allocator import keep_freed_memory
    from resilin.run.events import Event, StepDone
    from resilin.run.run import Pace, Run

    hidden, layers, mlp, heads, kv_heads, vocabulary, batch, length = SIZES[args.size]
    table = rows(args.size)
    if args.device == "cpu":
        keep_freed_memory()  # as `build_run` does

    class Table:
        vocab_size, sequence_length = vocabulary, length

        def slots(self, step: int) -> int:
            return batch

        def fetch(self, step: int, slots: Any) -> Batch:
            chosen = table[[(step * batch + slot) % len(table) for slot in slots]]
            return Batch(torch.tensor(list(slots)), {"tokens": chosen[:, :-1], "labels": chosen[:, 1:]})

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: Any) -> None: ...

    model = DecoderSettings(
        vocab_size=vocabulary,
        hidden_size=hidden,
        layers=layers,
        mlp_size=mlp,
        heads=heads,
        kv_heads=kv_heads,
        tie_embeddings=True,
        max_positions=length,
    ).build(ModelContext(0, None))
    model.to(args.device)
    precision = choose_precision(PrecisionSettings(compute=args.dtype), args.device)
    turns = Turns(args.block, args.device)

    def listen(event: Event) -> None:
        if isinstance(event, StepDone):
            turns.step_done()

    Run(
        source=Table(),
        model=model,
        objective=NextToken().build(),
        optimizer=AdamW(lr=1e-3).build(model, 10**6),
        pace=Pace(steps=10**6, micro_batch_size=batch, clip_norm=1.0),
        seed=0,
        device=torch.device(args.device),
        autocast=precision.autocast,
        listeners=(listen,),
        computed_model=torch.compile(model) if args.compile else None,  # type: ignore[arg-type]
    ).train()


def contender_plain(args: argparse.Namespace) -> None:
    import torch

    model, table = transformers_model(args.size).to(args.device), rows(args.size)
    called = torch.compile(model) if args.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    batch, step = SIZES[args.size][6], 0
    turns = Turns(args.block, args.device)
    while True:
        chosen = table[[(step * batch + slot) % len(table) for slot in range(batch)]].to(args.device)
        context = torch.autocast(args.device, torch.bfloat16) if args.dtype == "bf16" else nullcontext()
        with context:
            loss = called(input_ids=chosen[:, :-1], labels=chosen[:, 1:], shift_labels=chosen[:, 1:].contiguous()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        step += 1
        turns.step_done()


def contender_trainer(args: argparse.Namespace) -> None:
    import tempfile

    from transformers import Trainer, TrainerCallback, TrainingArguments

    model, table = transformers_model(args.size), rows(args.size)
    batch = SIZES[args.size][6]
    turns = Turns(args.block, args.device)

    class Report(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.step_done()

    data = [{"input_ids": row[:-1], "labels": row[:-1]} for row in table]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            use_cpu=args.device == "cpu",
            bf16=args.dtype == "bf16",
            torch_compile=args.compile,
            per_device_train_batch_size=batch,
            max_steps=10**6,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            optim="adamw_torch_fused",
            max_grad_norm=1.0,
        )
        Trainer(model=model, args=arguments, train_dataset=data, callbacks=[Report()]).train()


def start(name: str, size: str, dtype: str, args: argparse.Namespace) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--contender", name, "--size", size, "--dtype", dtype]
    command += ["--block", str(args.block), "--device", args.device, "--threads", str(args.threads)]
    command += ["--compile"] if args.compile else []
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["OMP_NUM_THREADS"] = str(args.threads)
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        stderr=log_of(name).open("w"),
    )


def log_of(name: str) -> Path:
    """Where a contender's own output goes."""
    import tempfile

    return Path(tempfile.gettempdir()) / f"resilin-benchmark-{os.getpid()}-{name}.log"


def turn(name: str, process: subprocess.Popen[str], word: str) -> dict[str, float]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(word + "\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"{name} ended early, exit code {process.wait()}:\n{log_of(name).read_text()[-3000:]}")
    found: dict[str, float] = json.loads(line)
    return found


def measure(size: str, dtype: str, args: argparse.Namespace) -> Iterator[Any]:
    import torch

    from resilin.bench.results import Row
    from resilin.models.decoder_settings import DecoderSettings
    from resilin.models.flops import train_flops_per_token
    from resilin.precision.probe import measure_peak

    hidden, layers, mlp, heads, kv_heads, vocabulary, batch, length = SIZES[size]
    settings = DecoderSettings(
        vocab_size=vocabulary, hidden_size=hidden, layers=layers, mlp_size=mlp, heads=heads, kv_heads=kv_heads,
        tie_embeddings=True,
    )  # fmt: skip
    flops, tokens = train_flops_per_token(settings, length), args.block * batch * length
    processes = {name: start(name, size, dtype, args) for name in CONTENDERS}
    speeds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    peaks: list[float] = []
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    for index in range(args.rounds + 1):
        for name, process in processes.items():
            seconds = turn(name, process, "go")["seconds"]
            if index:  # the first round warms up
                speeds[name].append(tokens / seconds)
        peaks.append(measure_peak(args.device, kind, budget=1.0).flops)
        print(
            f"{size} {dtype} round {index}: " + ", ".join(f"{n} {s[-1]:.0f}" for n, s in speeds.items() if s),
            flush=True,
        )
    memory = {name: turn(name, process, "stop")["memory"] for name, process in processes.items()}
    ours, label = speeds["ours"], f"{size} {dtype}{' compiled' if args.compile else ''}"
    target = {"fp32": 1.1, "bf16": 1.4}[dtype]
    yield Row.from_turns(label, "tokens/s", ours, speeds["trainer"], CONTENDERS["trainer"], target=target)
    yield Row.from_turns(label, "tokens/s", ours, speeds["plain"], CONTENDERS["plain"], target=1.0)
    peak = statistics.median(peaks)
    share = Row(
        name=f"{label}, share of the matrix-product peak ({peak / 1e9:,.0f} GFLOP/s)",
        unit="of peak",
        ours=statistics.median(ours) * flops / peak,
        peer=statistics.median(speeds["plain"]) * flops / peak,
        peer_name=CONTENDERS["plain"],
        runs={"peak FLOP/s": peaks},
        note=f"{flops / 1e6:.1f} MFLOP a token",
    )
    yield share
    yield Row(
        name=f"{label}, peak memory",
        unit="MiB",
        ours=memory["ours"] / 2**20,
        peer=memory["plain"] / 2**20,
        peer_name=CONTENDERS["plain"],
        better="lower",
        target=1.0,
        runs={name: [value / 2**20] for name, value in memory.items()},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), help="default: 5M 30M; 125M 350M on a GPU")
    parser.add_argument("--dtypes", nargs="+", choices=["fp32", "bf16"], help="default: fp32; bf16 on a GPU")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--block", type=int, default=4, help="steps a turn")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--name", help="the results file; default: training, training-cuda on a GPU")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument("--contender", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    parser.add_argument("--size", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    args.sizes = args.sizes or (["125M", "350M"] if on_gpu else ["5M", "30M"])
    args.dtypes = args.dtypes or (["bf16"] if on_gpu else ["fp32"])
    if args.contender:
        import torch

        global OUT
        OUT = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever a contender prints itself does not belong to the protocol
        torch.set_num_threads(args.threads)
        contender: Callable[[argparse.Namespace], None] = globals()[f"contender_{args.contender}"]
        contender(args)
        return
    import torch

    from resilin.bench.results import Report, results_name

    torch.set_num_threads(args.threads)
    settings = {k: v for k, v in vars(args).items() if k not in ("contender", "size", "dtype", "output", "name")}
    settings["sizes"] = {s: SIZES[s] for s in args.sizes}
    name, found = args.name or results_name("training", args.device), []
    for dtype in args.dtypes:
        for size in args.sizes:
            found += measure(size, dtype, args)
            path = Report.of(name, settings, found).write(args.output)  # a stop loses only what was under way
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
