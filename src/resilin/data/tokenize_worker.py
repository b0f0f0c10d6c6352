"""Tokenising one chunk of the input into one shard; run in worker processes, which keep clear of torch."""

from __future__ import annotations

import json
import os
import signal
import threading
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import numpy as np

from resilin.data.chat import encode_chat
from resilin.data.documents import Blank, Document, as_text, read_piece
from resilin.data.encode import DocumentEncoder
from resilin.data.errors import DataError, Problem
from resilin.data.inputs import Chunk, InputFile
from resilin.data.shards import numpy_dtype, token_dtype
from resilin.data.tokenize_options import TokenizeOptions
from resilin.data.tokenize_report import Report
from resilin.data.tokenizer import Tokenizer
from resilin.data.write_shards import write_atomically, write_shard


@dataclass(frozen=True, slots=True)
class Job:
    """All a worker needs; sent once."""

    folder: Path
    files: tuple[InputFile, ...]
    chunks: tuple[Chunk, ...]
    tokenizer_json: str
    tokenizer_config: dict[str, Any]
    options: TokenizeOptions
    vocab_size: int


class Worker:
    """Tokenises chunks; one in every process."""

    def __init__(self, job: Job) -> None:
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


_worker: Worker | None = None


def _end_with_parent() -> None:
    """Exit when the parent is gone: a worker whose parent was killed would otherwise wait for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def start_worker(job: Job) -> None:
    """Set up a worker process: once, before its first chunk."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core already
    _worker = Worker(job)


def work_on(number: int) -> int:
    """Tokenise one chunk in a worker process; returns its number."""
    assert _worker is not None
    return _worker.chunk(number)
