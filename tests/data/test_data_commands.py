"""`resilin data ...` from an archive to checked shards, as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from resilin.cli.data import app
from resilin.data.errors import DataError
from resilin.data.shards import TokenShards
from resilin.data.tokenizer import Tokenizer


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, DataError):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    texts = tmp_path / "src" / "texts"
    texts.mkdir(parents=True)
    for name, words in (("a_gut.txt", "to be or not to be\n" * 40), ("b_gut.txt", "that is the question\n" * 40)):
        (texts / name).write_text(words)
    (texts / "readme.md").write_text("no")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as opened:
        opened.add(tmp_path / "src", "pkg")
    return tmp_path / "a.tar.gz"


def test_from_an_archive_to_checked_shards(archive: Path, tmp_path: Path) -> None:
    text, tok, out = tmp_path / "text", tmp_path / "tok", tmp_path / "shards"
    assert "2 files" in run("unpack", archive, "--members", "*/texts/*_gut.txt", "--output", text)
    assert "a tokenizer of" in run("train-tokenizer", text, "--output", tok, "--vocab-size", 280)
    assert Tokenizer.load(tok).vocab_size <= 280
    first = run("tokenize", text, "--output", out, "--tokenizer", tok)
    assert "2 documents" in first
    assert "MB/s" in first
    assert "as they were" in run("tokenize", text, "--output", out, "--tokenizer", tok)
    assert "all as written" in run("verify", out)
    assert "documents            2" in run("describe", out)
    described = json.loads(run("describe", out, "--json"))
    assert described["tokens"] == TokenShards(out).token_count


def test_lines_become_documents_and_bytes_need_no_file(archive: Path, tmp_path: Path) -> None:
    run("unpack", archive, "-m", "*a_gut.txt", "-o", tmp_path / "text")
    run("tokenize", tmp_path / "text", "-o", tmp_path / "out", "-t", "bytes", "--separator", "\\n")
    assert TokenShards(tmp_path / "out").document_count == 40


def test_damage_is_named_with_exit_code_1(archive: Path, tmp_path: Path) -> None:
    run("unpack", archive, "-m", "*_gut.txt", "-o", tmp_path / "text")
    run("tokenize", tmp_path / "text", "-o", tmp_path / "out", "-t", "bytes")
    file = tmp_path / "out" / "shard-00000.tokens"
    raw = bytearray(file.read_bytes())
    raw[10] ^= 1
    file.write_bytes(raw)
    assert "do not match the checksum" in run("verify", tmp_path / "out", code=1)


def test_skipping_prints_what_was_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\nbroken\n')
    arguments = ("tokenize", tmp_path / "a.jsonl", "-o", tmp_path / "out", "-t", "bytes")
    with pytest.raises(DataError, match="line 2"):
        run(*arguments)
    shown = run(*arguments, "--on-error", "skip")
    assert "skipped 1: 1 x broken JSON" in shown
    assert "a.jsonl, line 2, byte 17: not valid JSON" in shown


def test_help_needs_no_heavy_import() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom resilin.cli.data import app\n"
        "assert CliRunner().invoke(app, ['tokenize', '--help']).exit_code == 0\n"
        "heavy = {'torch', 'tokenizers', 'numpy', 'pyarrow', 'datasets', 'jinja2'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr


def test_tokenising_workers_never_import_torch() -> None:
    code = "import sys, resilin.data.tokenize\nassert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
