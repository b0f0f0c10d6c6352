"""From files to token shards: in parallel, resumable, and byte for byte the same however it was run.

The inputs are cut into chunks by a plan that depends on the inputs and the tokenizer alone; each chunk becomes one
shard, written under a temporary name and renamed when complete; the index comes last. A run that was killed goes on
with the chunks that are missing. This module is imported by worker processes: it keeps clear of torch.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, Literal

import numpy as np

from resilin.data.chat import TrainOn, encode_chat
from resilin.data.documents import Blank, Document, as_text, read_piece
from resilin.data.encode import DocumentEncoder, word_cuts
from resilin.data.errors import DataError, Problem
from resilin.data.inputs import Chunk, InputFile, Inputs, plan_chunks
from resilin.data.shards import INDEX_FILE, Shard, TokenShards, numpy_dtype, read_index, token_dtype
from resilin.data.tokenizer import Tokenizer
from resilin.data.write_shards import write_atomically, write_index, write_shard

PLAN_FILE = "plan.json"
_EXAMPLES = 20
_WORTH_A_PROCESS = 8 << 20  # below this much text, starting workers takes longer than the work

OnError = Literal["stop", "skip"]
Kind = Literal["text", "chat", "tokens"]


@dataclass(frozen=True, slots=True)
class TokenizeOptions:
    """How documents become tokens.

    Attributes:
        kind: what a document is: text, a conversation ("chat": a list of messages), or ids that are already tokens.
        key: where it stands in a JSONL line or a table.
        separator: what stands between the documents of a text file; None takes each file as one document.
        add_end: append the end-of-text token to each text.
        parse_special: read the text of a special token inside a document as that token.
        train_on: which tokens of a conversation are to be learnt.
        on_error: stop at the first flaw, or leave flawed documents out and count them.
    """

    kind: Kind = "text"
    key: str = "text"
    separator: str | None = None
    add_end: bool = True
    parse_special: bool = False
    train_on: TrainOn = "assistant"
    on_error: OnError = "stop"

    def contents(self) -> dict[str, Any]:
        """The options that decide what is written; `on_error` only decides whether it may go on."""
        return {name: value for name, value in asdict(self).items() if name != "on_error"}


@dataclass(slots=True)
class Report:
    """What became of the input.

    Attributes:
        skipped: documents (or lines) left out, by the kind of flaw.
        examples: the first of them, with place and reason.
        blank: empty lines and documents.
        left_out: files in the given folders whose ending is of no known format.
        reused: the shards were there already.
    """

    skipped: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, str]] = field(default_factory=list)
    blank: int = 0
    left_out: int = 0
    reused: bool = False

    def add(self, problem: Problem, name: str) -> None:
        """Count a flaw; its place is recorded by the file's name in the index, not by this machine's path."""
        self.skipped[problem.kind] += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append({"where": name, "what": problem.what})

    def merge(self, entry: dict[str, Any]) -> None:
        """Add the counts of one chunk."""
        self.skipped.update(entry["skipped"])
        self.examples = (self.examples + entry["examples"])[:_EXAMPLES]
        self.blank += entry["blank"]

    def summary(self) -> str:
        """One line for people; "" where nothing was left out."""
        parts = [f"{count} x {kind}" for kind, count in sorted(self.skipped.items())]
        text = f"skipped {sum(self.skipped.values())}: {', '.join(parts)}" if parts else ""
        if self.left_out:
            text += ("; " if text else "") + f"{self.left_out} files of unknown format left out"
        return text


@dataclass(frozen=True, slots=True)
class _Job:
    """All a worker needs; sent once."""

    folder: Path
    files: tuple[InputFile, ...]
    chunks: tuple[Chunk, ...]
    tokenizer_json: str
    tokenizer_config: dict[str, Any]
    options: TokenizeOptions
    vocab_size: int


class _Worker:
    """Tokenises chunks; one in every process."""

    def __init__(self, job: _Job) -> None:
        self.job = job
        self.tokenizer = Tokenizer(job.tokenizer_json, job.tokenizer_config)
        self.dtype = token_dtype(job.vocab_size)
        self.encoder = DocumentEncoder(self.tokenizer, self.dtype, parse_special=job.options.parse_special)
        end = self.tokenizer.eos_id if job.options.add_end and job.options.kind == "text" else None
        self.end = b"" if end is None else np.asarray([end], numpy_dtype(self.dtype)).tobytes()

    def chunk(self, number: int) -> int:
        """Write the shard of one chunk and, last, its entry; returns its number."""
        options, width = self.job.options, numpy_dtype(self.dtype).itemsize
        tokens, starts, text_bytes = bytearray(), [], 0
        units = bytearray() if options.kind == "chat" else None
        report = Report()
        for piece in self.job.chunks[number]:
            file = self.job.files[piece.file]
            for found in read_piece(file, piece, key=options.key, separator=options.separator):
                made = self._encode(found, units) if isinstance(found, Document) else found
                if isinstance(made, Blank):
                    report.blank += 1
                elif isinstance(made, Problem):
                    if options.on_error == "stop":
                        raise made.error()
                    report.add(made, made.where.replace(str(file.path), file.name, 1))
                else:
                    assert isinstance(found, Document)
                    if found.begins:
                        starts.append(len(tokens) // width)
                    tokens += made[0]
                    text_bytes += made[1]
        name = f"shard-{number:05d}"
        # A document whose text was all left out, or that is empty, starts nowhere.
        starts = [at for at in dict.fromkeys(starts) if at < len(tokens) // width]
        shard = write_shard(self.job.folder, name, tokens, starts, dtype=self.dtype, text_bytes=text_bytes, units=units)
        entry = {
            "shard": shard.as_json(),
            "skipped": dict(report.skipped),
            "examples": report.examples,
            "blank": report.blank,
        }
        write_atomically(self.job.folder / f"{name}.json", json.dumps(entry).encode())
        return number

    def _encode(self, document: Document, units: bytearray | None) -> tuple[bytes, int] | Problem | Blank:
        options = self.job.options
        if options.kind == "text":
            made = as_text(document, options.key)
            if not isinstance(made, tuple):
                return made
            return self.encoder.encode(made[0]) + (self.end if document.ends else b""), made[1]
        if options.kind == "tokens":
            return self._ids(document)
        try:
            chat = encode_chat(self.tokenizer, document.value, train_on=options.train_on)
        except (DataError, UnicodeEncodeError) as error:
            return Problem("bad conversation", document.where, str(error))
        if not any(chat.units):
            return Problem("nothing to learn", document.where, "the conversation has no turn of the assistant")
        assert units is not None
        units += bytes(chat.units)
        text_bytes = sum(len(str(message["content"] or "").encode()) for message in document.value)
        return np.asarray(chat.ids, numpy_dtype(self.dtype)).tobytes(), text_bytes

    def _ids(self, document: Document) -> tuple[bytes, int] | Problem | Blank:
        ids, size = document.value, self.job.vocab_size
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            what = f"{self.job.options.key} should be a list of token ids"
            return Problem("wrong type", document.where, what)
        if not ids:
            return Blank()
        bad = next((token for token in ids if not 0 <= token < size), None)
        if bad is not None:
            what = f"token id {bad} is not in [0, {size})"
            return Problem("token id out of range", document.where, what)
        return np.asarray(ids, numpy_dtype(self.dtype)).tobytes(), 0


_worker: _Worker | None = None


def _end_with_parent() -> None:
    """Exit when the parent is gone: a worker whose parent was killed would otherwise wait for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _start_worker(job: _Job) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core already
    _worker = _Worker(job)


def _work(number: int) -> int:
    assert _worker is not None
    return _worker.chunk(number)


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
    folder.mkdir(parents=True, exist_ok=True)
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
    job = _Job(folder, inputs.files, tuple(chunks), tokenizer.json, tokenizer.config, options, vocab_size)
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


def _run(job: _Job, missing: list[int], workers: int | None, size: int) -> Iterator[int]:
    """Tokenise the missing chunks, yielding the number of each as it is done."""
    count = workers or (len(os.sched_getaffinity(0)) if size >= _WORTH_A_PROCESS else 1)
    count = min(count, len(missing))
    if count <= 1:
        worker = _Worker(job)
        for number in missing:
            yield worker.chunk(number)
        return
    pool = ProcessPoolExecutor(count, get_context("spawn"), initializer=_start_worker, initargs=(job,))
    waiting: set[Future[int]] = set()
    queue = iter(missing)
    try:
        for number in queue:
            waiting.add(pool.submit(_work, number))
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
