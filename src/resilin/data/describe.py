"""What a data set holds, for `resilin inspect` and `resilin data describe`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from resilin.data.documents import Blank, Document, as_text, read_piece
from resilin.data.duplicates import duplicate_rate
from resilin.data.errors import Problem
from resilin.data.inputs import find_inputs, plan_chunks
from resilin.data.shards import INDEX_FILE, TokenShards
from resilin.data.split import HeldOut, held_out_ranges


def is_data_set(path: Path) -> bool:
    """Whether `describe` can say something of a path: a shard folder, or files in a known format."""
    if (path / INDEX_FILE).is_file():
        return True
    return path.suffix.lower() in (".txt", ".jsonl", ".ndjson", ".parquet", ".arrow")


def describe(path: Path | str, *, held_out: HeldOut | None = None, key: str = "text") -> dict[str, Any]:
    """What a data set holds.

    Args:
        path: a shard folder, or files that could become one.
        held_out: the split to count; the default split if left out.
        key: where the text stands in JSONL lines and tables.

    Returns:
        JSON values by name: for shards the tokens, documents, lengths, bytes per token, duplicates and splits; for
        files the documents, bytes and what is wrong with them.

    Raises:
        DataError: for a path that holds no data.
    """
    path = Path(path)
    return _shards(path, held_out or HeldOut()) if (path / INDEX_FILE).is_file() else _files(path, key)


def _shards(path: Path, held_out: HeldOut) -> dict[str, Any]:
    shards = TokenShards(path)
    base, starts = 0, []
    for number, shard in enumerate(shards.shards):
        starts.append(shards.starts(number).astype(np.int64) + base)
        base += shard.tokens
    lengths = np.diff(np.append(np.concatenate(starts) if starts else [], base)) if shards.document_count else None
    duplicates = duplicate_rate(shards)
    described: dict[str, Any] = {
        "kind": "token shards",
        "path": str(path),
        "tokens": shards.token_count,
        "documents": shards.document_count,
        "text_bytes": shards.text_bytes,
        "bytes_per_token": shards.text_bytes / shards.token_count if shards.token_count else None,
        "longest_document": int(lengths.max()) if lengths is not None else 0,
        "median_document": float(np.median(lengths)) if lengths is not None else 0.0,
        "vocab_size": shards.vocab_size,
        "dtype": shards.index["dtype"],
        "shards": len(shards.shards),
        "duplicate_passages": duplicates.rate,
        "duplicate_documents": duplicates.documents,
        "passage_tokens": duplicates.passage,
        "skipped": shards.index.get("skipped", {}),
        "digest": shards.digest,
    }
    if held_out.fraction and (shards.document_count > 1 or held_out.by == "tail"):
        held = sum(stop - start for start, stop in held_out_ranges(shards, held_out))
        described["splits"] = {"train": shards.token_count - held, "validation": held}
    return described


def _files(path: Path, key: str) -> dict[str, Any]:
    inputs = find_inputs([path])
    documents = longest = text_bytes = blank = 0
    problems: dict[str, int] = {}
    examples: list[str] = []
    for chunk in plan_chunks(inputs, can_cut=False):
        for piece in chunk:
            for found in read_piece(inputs.files[piece.file], piece, key=key, separator=None):
                made = as_text(found, key) if isinstance(found, Document) else found
                if isinstance(made, Problem):
                    problems[made.kind] = problems.get(made.kind, 0) + 1
                    if len(examples) < 5:
                        examples.append(f"{made.where}: {made.what}")
                elif isinstance(made, Blank):
                    blank += 1
                else:
                    documents, text_bytes, longest = documents + 1, text_bytes + made[1], max(longest, made[1])
    return {
        "kind": "text files",
        "path": str(path),
        "files": len(inputs.files),
        "files_left_out": len(inputs.left_out),
        "documents": documents,
        "blank": blank,
        "text_bytes": text_bytes,
        "longest_document_bytes": longest,
        "problems": problems,
        "examples": examples,
    }


def describe_text(description: dict[str, Any]) -> str:
    """A description as lines for people."""
    d = description
    lines = [f"{d['path']}: {d['kind']}"]

    def line(name: str, text: str) -> None:
        lines.append(f"  {name:<20} {text}")

    if d["kind"] == "token shards":
        line("tokens", f"{d['tokens']:,} ({d['dtype']}, vocabulary {d['vocab_size']:,}, {d['shards']} shards)")
        line("documents", f"{d['documents']:,}, median {d['median_document']:,.0f} tokens, longest "
             f"{d['longest_document']:,}")  # fmt: skip
        if d["text_bytes"]:
            line("text", f"{d['text_bytes']:,} bytes, {d['bytes_per_token']:.2f} bytes a token")
        line("repeated text", f"{100 * d['duplicate_passages']:.1f}% of {d['passage_tokens']}-token passages; "
             f"{d['duplicate_documents']:,} documents are copies")  # fmt: skip
        for name, tokens in d.get("splits", {}).items():
            line(name, f"{tokens:,} tokens ({100 * tokens / d['tokens']:.1f}%)")
        for kind, count in d["skipped"].items():
            line("skipped", f"{count:,} x {kind}")
    else:
        line("files", f"{d['files']:,}, {d['files_left_out']:,} of other formats left out")
        line("documents", f"{d['documents']:,}, longest {d['longest_document_bytes']:,} bytes; {d['blank']:,} blank")
        line("text", f"{d['text_bytes']:,} bytes")
        for kind, count in d["problems"].items():
            line("problem", f"{count:,} x {kind}")
        lines += [f"    {example}" for example in d["examples"]]
    return "\n".join(lines)
