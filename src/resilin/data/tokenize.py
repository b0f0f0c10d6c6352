"""From files to token shards: in parallel, resumable, and byte for byte the same however it was run.

The inputs are cut into chunks by a plan that depends on the inputs and the tokenizer alone; each chunk becomes one
shard, written under a temporary name and renamed when complete; the index comes last. A run that was killed goes on
with the chunks that are missing. Workers import `resilin.data.tokenize_worker`, which keeps clear of torch.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from resilin.data.encode import word_cuts
from resilin.data.errors import DataError
from resilin.data.inputs import Chunk, Inputs, plan_chunks
from resilin.data.shards import INDEX_FILE, Shard, TokenShards, read_index, token_dtype
from resilin.data.tokenize_options import TokenizeOptions
from resilin.data.tokenize_report import Report
from resilin.data.tokenize_worker import Job, Worker, start_worker, work_on
from resilin.data.tokenizer import Tokenizer
from resilin.data.write_shards import write_atomically, write_index

PLAN_FILE = "plan.json"
_WORTH_A_PROCESS = 4 << 20  # below this much text, starting workers takes longer than the work


def tokenize_files(
    inputs: Inputs,
    folder: Path,
    tokenizer: Tokenizer,
    options: TokenizeOptions,
    *,
    workers: int | None = None,
    chunk_bytes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[TokenShards, Report]:
    """Write (or finish, or find finished) the token shards of some files.

    Args:
        inputs: the files.
        folder: where the shards go.
        tokenizer: makes the tokens.
        options: how.
        workers: processes; None takes one for each core, and none at all for little text.
        chunk_bytes: bytes of input a shard; None chooses by their size.
        progress: called with the bytes done and the bytes in all.

    Raises:
        DataError: for flawed input (unless skipped), a folder that holds something else, a full disk, a dead worker.
    """
    if not inputs.files:
        raise DataError("no input files")
    can_cut = options.kind == "text" and word_cuts(tokenizer) is not None
    chunks = plan_chunks(inputs, can_cut=can_cut, target=chunk_bytes)
    plan = _plan_digest(inputs, tokenizer, options, chunks)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot be made: {error.strerror}") from None
    with _alone_in(folder):
        shards, report = _claim(folder, plan) or _tokenize(
            inputs, folder, tokenizer, options, chunks, plan, workers, progress
        )
    if report.skipped and options.on_error == "stop":
        raise DataError(
            f"{folder}: was written with flawed documents left out ({report.summary()}): accept that with "
            "on_error=skip, or mend the files"
        )
    return shards, report


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other process writes this folder; the lock goes with the process, however it ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _tokenize(
    inputs: Inputs,
    folder: Path,
    tokenizer: Tokenizer,
    options: TokenizeOptions,
    chunks: list[Chunk],
    plan: str,
    workers: int | None,
    progress: Callable[[int, int], None] | None,
) -> tuple[TokenShards, Report]:
    vocab_size = tokenizer.vocab_size
    job = Job(folder, inputs.files, tuple(chunks), tokenizer.json, tokenizer.config, options, vocab_size)
    done = [number for number in range(len(chunks)) if _entry(folder, number) is not None]
    missing = sorted(set(range(len(chunks))) - set(done))
    sizes = [sum(piece.bytes for piece in chunk) for chunk in chunks]
    total, finished_bytes = sum(sizes), sum(sizes[number] for number in done)
    if progress:
        progress(finished_bytes, total)
    for number in _run(job, missing, workers, sum(sizes[number] for number in missing)):
        finished_bytes += sizes[number]
        if progress:
            progress(finished_bytes, total)
    return _finish(folder, inputs, tokenizer, options, plan, len(chunks))


def _run(job: Job, missing: list[int], workers: int | None, size: int) -> Iterator[int]:
    """Tokenise the missing chunks, yielding the number of each as it is done."""
    count = workers or (len(os.sched_getaffinity(0)) if size >= _WORTH_A_PROCESS else 1)
    count = min(count, len(missing))
    if count <= 1:
        worker = Worker(job)
        for number in missing:
            yield worker.chunk(number)
        return
    pool = ProcessPoolExecutor(count, get_context("spawn"), initializer=start_worker, initargs=(job,))
    waiting: set[Future[int]] = set()
    queue = iter(missing)
    try:
        for number in queue:
            waiting.add(pool.submit(work_on, number))
            if len(waiting) >= 2 * count:
                ready, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in ready)
        while waiting:
            ready, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in ready)
    except BrokenProcessPool:
        raise DataError(
            "a tokenising process died (out of memory?); what is done is kept: run again, perhaps with fewer workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _plan_digest(inputs: Inputs, tokenizer: Tokenizer, options: TokenizeOptions, chunks: list[Chunk]) -> str:
    settings = json.dumps(options.contents(), sort_keys=True)
    parts = ["resilin tokenize 1", tokenizer.digest, settings, json.dumps([[asdict(p) for p in c] for c in chunks])]
    parts += [file.fingerprint() for file in inputs.files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _claim(folder: Path, plan: str) -> tuple[TokenShards, Report] | None:
    """Make the folder ours; the finished shards if it already holds exactly what was asked for."""
    if (folder / INDEX_FILE).is_file():
        index = read_index(folder)
        if index.get("plan") != plan:
            raise DataError(f"{folder}: holds other token shards; choose another folder, or delete this one first")
        report = Report(Counter(index["skipped"]), index["skipped_examples"], index["blank"], index["left_out"], True)
        return TokenShards(folder), report
    plan_file = folder / PLAN_FILE
    if plan_file.is_file():
        if plan_file.read_text(encoding="utf-8").strip() != json.dumps({"plan": plan}):
            raise DataError(
                f"{folder}: holds an unfinished tokenising of other inputs or settings; choose another folder, or "
                "delete this one first"
            )
    elif any(folder.iterdir()):
        raise DataError(f"{folder}: is not empty; choose another folder")
    write_atomically(plan_file, json.dumps({"plan": plan}).encode())
    for leftover in folder.glob("*.tmp"):
        leftover.unlink()
    return None


def _entry(folder: Path, number: int) -> dict[str, Any] | None:
    file = folder / f"shard-{number:05d}.json"
    if not file.is_file():
        return None
    entry: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return entry


def _finish(
    folder: Path, inputs: Inputs, tokenizer: Tokenizer, options: TokenizeOptions, plan: str, count: int
) -> tuple[TokenShards, Report]:
    """Write the index and remove what only served an interrupted run."""
    shards, report = [], Report(left_out=len(inputs.left_out))
    for number in range(count):
        entry = _entry(folder, number)
        if entry is None:
            raise DataError(f"{folder / f'shard-{number:05d}.json'}: has vanished while tokenising; run again")
        shards.append(Shard.from_json(entry["shard"], f"shard-{number:05d}.json"))
        report.merge(entry)
    if not sum(shard.tokens for shard in shards):
        shutil.rmtree(folder)
        left = f" ({report.summary()})" if report.summary() else ""
        raise DataError(f"the inputs hold no text at all{left}; nothing was written")
    record = {
        "plan": plan,
        "options": options.contents(),
        "sources": [{"name": file.name, "format": file.format, "bytes": file.bytes} for file in inputs.files],
        "skipped": dict(sorted(report.skipped.items())),
        "skipped_examples": report.examples,
        "blank": report.blank,
        "left_out": report.left_out,
    }
    opened = write_index(
        folder, shards, dtype=token_dtype(tokenizer.vocab_size), vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer, record=record,
    )  # fmt: skip
    for number in range(count):
        (folder / f"shard-{number:05d}.json").unlink(missing_ok=True)
    (folder / PLAN_FILE).unlink(missing_ok=True)
    return opened, report
