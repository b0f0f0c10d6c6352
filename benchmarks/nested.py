"""What nesting costs: sub-models in place against ordinary models of their size, training, switching, cutting out.

Contenders take turns on the same weights and tokens. An ordinary model of a size is what `extract` gives, computed by
the same decoder without any budget. On a CPU one thread computes and its processor time is taken, with what the system
spends on its pages: other programs on the machine change little. Files are timed by the clock on the wall, and the
files that are read have been read before.

    resilin bench run nested --help
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from resilin.bench.results import Report, Row, results_name
from resilin.keys import Keys
from resilin.models.cache import KVCache
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.huggingface import save_pretrained
from resilin.nested import Budget, budget, extract, extract_folder
from resilin.nested.granularities import budget_at, label_of
from resilin.nested.objective import Nested
from resilin.nouns import Batch, Objective
from resilin.objective.next_token import NextToken
from resilin.run.allocator import keep_freed_memory

SIZES = {
    "cpu": DecoderSettings(vocab_size=4096, hidden_size=256, layers=6, heads=8, kv_heads=4, mlp_size=1024),
    "cuda": DecoderSettings(vocab_size=32000, hidden_size=2048, layers=16, heads=16, kv_heads=8, mlp_size=8192),
}
ON_DISK = DecoderSettings(vocab_size=8192, hidden_size=512, layers=12, heads=8, kv_heads=4, mlp_size=4096)
ROWS, TOKENS = {"cpu": 4, "cuda": 8}, {"cpu": 256, "cuda": 1024}
SHARES = (0.125, 0.25, 0.5, 1)
SWITCH_LIMIT = 1e-3
Work = Callable[[], object]


def in_turns(contenders: dict[str, Work], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each, in another order each time; the first round warms up."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(rounds + 1):
        for name, work in random.Random(index).sample(list(contenders.items()), len(contenders)):
            if device == "cuda":
                torch.cuda.synchronize()
            began = clock()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            if index:
                taken[name].append(clock() - began)
    return taken


def batch_of(settings: DecoderSettings, device: str) -> Batch:
    shape = (ROWS[device], TOKENS[device] + 1)
    tokens = torch.randint(0, settings.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    fields = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}
    return Batch(torch.arange(shape[0]), fields).to(device)


def step_of(model: Decoder, objective: Objective, batch: Batch, keys: Callable[[], Keys | None]) -> Work:
    def work() -> None:
        model.zero_grad(set_to_none=True)
        objective(model, batch, keys()).sum.backward()

    return work


def token_of(model: Decoder, wanted: Budget, batch: Batch, count: int = 16) -> Work:
    """Some single tokens behind a prompt."""

    @torch.inference_mode()
    def work() -> None:
        with budget(model, wanted):
            cache = KVCache.of(model, 1, 64 + count)
            model(batch["tokens"][:1, :64], cache=cache)
            for place in range(count):
                output = model(batch["tokens"][:1, place : place + 1], cache=cache)
                model.logits(output.hidden_BTD[:, -1])  # type: ignore[union-attr]

    return work


def within(model: Decoder, wanted: Budget, work: Work) -> Work:
    def inside() -> None:
        with budget(model, wanted):
            work()

    return inside


def training_rows(model: Decoder, batch: Batch, rounds: int, device: str) -> list[Row]:
    plain, step = NextToken().build(), 0

    def next_step() -> Keys:
        nonlocal step
        step += 1
        return Keys(0, step, batch.slots_B)

    whole = Nested(probabilities=(0, 0, 0, 1)).build()
    drawn = Nested().build()
    four = [number for number in range(4) for _ in range(rounds + 1)]
    random.Random(0).shuffle(four)
    sizes = iter(four)
    # Every size equally often, so that the mean is that of a long run.
    drawn.drawn_at = lambda seed, step: next(sizes)  # type: ignore[method-assign]
    taken = in_turns(
        {
            "plain": step_of(model, plain, batch, next_step),
            "whole": step_of(model, whole, batch, next_step),
            **{f"drawn {n}": step_of(model, drawn, batch, next_step) for n in range(4)},
        },
        rounds,
        device,
    )
    mean = [sum(taken[f"drawn {n}"][i] for n in range(4)) / 4 for i in range(rounds)]
    return [
        Row.from_turns("training step, full budget", "s", taken["whole"], taken["plain"], "plain", better="lower",
                       target=0.98),
        Row.from_turns("training step, one of four sizes drawn", "s", mean, taken["plain"], "plain", better="lower",
                       target=1 / 1.1),
    ]  # fmt: skip


def size_rows(model: Decoder, batch: Batch, rounds: int, device: str) -> list[Row]:
    rows, plain = [], NextToken().build()
    for share in SHARES[:-1]:
        wanted = budget_at(model.settings, share)
        alone = extract(model, wanted)
        inside = step_of(model, plain, batch, lambda: None)
        for what, ours, peer in (
            ("training step", within(model, wanted, inside), step_of(alone, plain, batch, lambda: None)),
            ("16 tokens behind a prompt of 64", token_of(model, wanted, batch), token_of(alone, Budget(), batch)),
        ):
            taken = in_turns({"ours": ours, "peer": peer}, rounds, device)
            rows.append(
                Row.from_turns(f"{what}, {label_of(share)} of the neurons in place", "s", taken["ours"], taken["peer"],
                               "extracted", better="lower", target=0.95)
            )  # fmt: skip
    return rows


def switch_row(model: Decoder, rounds: int) -> Row:
    budgets = [budget_at(model.settings, share) for share in SHARES]
    taken = []
    for index in range(rounds + 1):
        began = time.perf_counter()
        for number in range(200):
            with budget(model, budgets[number % len(budgets)]):
                pass
        if index:
            taken.append((time.perf_counter() - began) / 200)
    return Row.from_turns("switching between requests", "s", taken, [SWITCH_LIMIT], "the limit set", better="lower",
                          target=1.0)  # fmt: skip


def extraction_row(rounds: int) -> Row:
    """Reading a half from a folder and writing it, against copying a file of that size."""
    model = Decoder(ON_DISK)
    wanted = budget_at(model.settings, 0.5)
    ours, peer = [], []
    with tempfile.TemporaryDirectory() as temporary:
        full, small, copied = (Path(temporary) / name for name in ("full", "small", "copy"))
        save_pretrained(model, full)
        for index in range(rounds + 2):
            began = time.perf_counter()
            save_pretrained(extract_folder(full, wanted), small)
            made = time.perf_counter()
            shutil.copyfile(small / "model.safetensors", copied)
            ended = time.perf_counter()
            size = copied.stat().st_size / 1e9
            if index > 1:  # the first rounds make memory and files
                ours.append(size / (made - began))
                peer.append(size / (ended - made))
    return Row.from_turns(
        "cutting out half of the neurons, read and written", "GB/s", ours, peer, "copy of the file", target=0.7
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--name", help="the results file; default: nested, nested-cuda on a GPU")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    model = Decoder(SIZES[args.device]).to(args.device)
    batch = batch_of(model.settings, args.device)
    rows = training_rows(model, batch, args.rounds, args.device)
    rows += size_rows(model, batch, args.rounds, args.device)
    rows += [switch_row(model, args.rounds), extraction_row(args.rounds)]
    for row in rows:
        print(f"{row.name}: {row.ours:.4g} {row.unit}, {row.peer_name} {row.peer:.4g} ({row.ratio:.2f}x)")
    settings = {
        "rounds": args.rounds,
        "device": args.device,
        "threads": 1,
        **SIZES[args.device].model_dump(mode="json"),
    }
    name = args.name or results_name("nested", args.device)
    print(f"wrote {Report.of(name, settings, rows).write(args.output)}")


if __name__ == "__main__":
    main()
