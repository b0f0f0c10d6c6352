"""Tokenising gives the same bytes however it was run, and loses nothing without saying so."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from resilin.data import tokenize as module
from resilin.data.errors import DataError
from resilin.data.inputs import find_inputs
from resilin.data.shards import TokenShards
from resilin.data.tokenize import tokenize_files
from resilin.data.tokenize_options import TokenizeOptions
from resilin.data.tokenize_worker import Worker
from resilin.data.tokenizer import Tokenizer

WORDS = [
    "the",
    "quick",
    "brown",
    "fox's",
    "--",
    "over",
    "12",
    "dogs,",
    "größer",
    "als\n",
    "日本",
    "naïve\n\n",
    "",
    "x\n",
]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    draw = random.Random(0)
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(3):
        text = "".join(draw.choice(WORDS) + draw.choice([" ", " ", "\n"]) for _ in range(4000 * (number + 1)))
        (folder / f"{number}.txt").write_text(text)
    lines = [json.dumps({"text": " ".join(draw.choices(WORDS, k=20))}) for _ in range(300)]
    (folder / "lines.jsonl").write_text("\n".join(lines))
    return folder


def run(corpus: Path, target: Path, tokenizer: Tokenizer, **kw: Any) -> TokenShards:
    options = kw.pop("options", TokenizeOptions())
    return tokenize_files(find_inputs([corpus]), target, tokenizer, options, chunk_bytes=8000, **kw)[0]


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_the_tokens_are_those_of_the_tokenizer_document_by_document(
    corpus: Path, tmp_path: Path, bpe: Tokenizer
) -> None:
    shards = run(corpus, tmp_path / "out", bpe)
    stream = np.concatenate([shards.tokens(number) for number in range(len(shards.shards))])
    documents = [(corpus / f"{number}.txt").read_text() for number in range(3)]
    documents += [json.loads(line)["text"] for line in (corpus / "lines.jsonl").read_text().splitlines()]
    expected: list[int] = []
    starts = []
    for document in documents:
        starts.append(len(expected))
        expected += [*bpe.encode(document), bpe.eos_id]  # type: ignore[list-item]
    assert stream.tolist() == expected
    assert len(shards.shards) > 10
    bases = np.cumsum([0, *(shard.tokens for shard in shards.shards)])
    found = [int(at) + int(bases[n]) for n in range(len(shards.shards)) for at in shards.starts(n)]
    assert found == starts
    assert shards.text_bytes == sum(len(document.encode()) for document in documents)
    assert shards.verify() == []
    assert shards.tokenizer is not None
    assert shards.tokenizer.digest == bpe.digest


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_writes_the_same_bytes(
    corpus: Path, tmp_path: Path, bpe: Tokenizer, workers: int
) -> None:
    run(corpus, tmp_path / "one", bpe, workers=1)
    run(corpus, tmp_path / "many", bpe, workers=workers)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


@pytest.mark.parametrize("after", [0, 1, 5])
def test_an_interrupted_run_goes_on_and_writes_the_same_bytes(
    corpus: Path, tmp_path: Path, bpe: Tokenizer, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(corpus, tmp_path / "whole", bpe)
    work, done = Worker.chunk, []

    def stop_in_the_middle(self: Any, number: int) -> int:
        if len(done) == after:
            (self.job.folder / f"shard-{number:05d}.tokens").write_bytes(b"half")  # written, but not yet entered
            raise KeyboardInterrupt
        done.append(number)
        return work(self, number)

    monkeypatch.setattr(Worker, "chunk", stop_in_the_middle)
    with pytest.raises(KeyboardInterrupt):
        run(corpus, tmp_path / "cut", bpe)
    with pytest.raises(DataError, match="tokenising has not finished: run the same command again"):
        TokenShards(tmp_path / "cut")
    redone = []
    monkeypatch.setattr(Worker, "chunk", lambda self, number: redone.append(number) or work(self, number))
    run(corpus, tmp_path / "cut", bpe)
    assert contents(tmp_path / "whole") == contents(tmp_path / "cut")
    assert not set(done) & set(redone)


def test_a_killed_process_and_its_workers_leave_a_folder_that_goes_on(
    corpus: Path, tmp_path: Path, bpe: Tokenizer
) -> None:
    bpe.save(tmp_path / "tok")
    target = tmp_path / "killed"
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom resilin.data import tokenize\n"
        "from resilin.data.tokenize_options import TokenizeOptions\n"
        "from resilin.data.inputs import find_inputs\nfrom resilin.data.tokenizer import Tokenizer\n"
        "if __name__ == '__main__':\n"
        "    a, b, c = map(Path, sys.argv[1:])\n"
        "    tokenize.tokenize_files(find_inputs([a]), b, Tokenizer.load(c), TokenizeOptions(), workers=2,\n"
        "        chunk_bytes=8000, progress=lambda done, total: time.sleep(0.05))\n"
    )
    (tmp_path / "job.py").write_text(script)
    command = [sys.executable, str(tmp_path / "job.py"), str(corpus), str(target), str(tmp_path / "tok")]
    process = subprocess.Popen(command, start_new_session=True)
    deadline = time.monotonic() + 200
    while len(list(target.glob("shard-*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (target / "index.json").exists()
    deadline = time.monotonic() + 200  # its workers see that it is gone, and end
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        pytest.fail("workers outlive their killed parent")
    run(corpus, target, bpe)
    run(corpus, tmp_path / "whole", bpe)
    assert contents(target) == contents(tmp_path / "whole")


def test_a_finished_folder_is_reused_and_another_never_overwritten(
    corpus: Path, tmp_path: Path, bpe: Tokenizer, bytes_tokenizer: Tokenizer
) -> None:
    run(corpus, tmp_path / "out", bpe)
    before = contents(tmp_path / "out")
    _, report = tokenize_files(find_inputs([corpus]), tmp_path / "out", bpe, TokenizeOptions(), chunk_bytes=8000)
    assert report.reused
    with pytest.raises(DataError, match="holds other token shards"):
        run(corpus, tmp_path / "out", bytes_tokenizer)
    (corpus / "0.txt").write_text("changed")
    with pytest.raises(DataError, match="holds other token shards"):
        run(corpus, tmp_path / "out", bpe)
    assert contents(tmp_path / "out") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match="is not empty"):
        run(corpus, tmp_path / "mine", bpe)


FLAWED = (
    b'{"text": "good one"}\n{"text": "bro\n{"text": 5}\n{"body": "x"}\n{"text": "\xff"}\n{"text": ""}\n'
    b'{"text": "good two"}\n'
)


def test_flaws_stop_with_their_line(tmp_path: Path, bpe: Tokenizer) -> None:
    (tmp_path / "bad.jsonl").write_bytes(FLAWED)
    for workers in (1, 2):
        with pytest.raises(DataError, match=r"bad\.jsonl, line 2, byte 21: not valid JSON"):
            run(tmp_path / "bad.jsonl", tmp_path / "out", bpe, workers=workers)
    assert not (tmp_path / "out" / "index.json").exists()


def test_flaws_are_skipped_counted_and_recorded(tmp_path: Path, bpe: Tokenizer) -> None:
    (tmp_path / "bad.jsonl").write_bytes(FLAWED)
    options = TokenizeOptions(on_error="skip")
    shards, report = tokenize_files(find_inputs([tmp_path / "bad.jsonl"]), tmp_path / "out", bpe, options)
    assert shards.tokens(0).tolist() == [*bpe.encode("good one"), bpe.eos_id, *bpe.encode("good two"), bpe.eos_id]
    assert report.skipped == {"broken JSON": 1, "wrong type": 1, "missing key": 1, "invalid UTF-8": 1}
    assert report.blank == 1
    assert report.summary() == "skipped 4: 1 x broken JSON, 1 x invalid UTF-8, 1 x missing key, 1 x wrong type"
    assert shards.index["skipped"] == report.skipped
    assert shards.index["skipped_examples"][0]["where"] == "bad.jsonl, line 2, byte 21"
    assert str(tmp_path) not in (tmp_path / "out" / "index.json").read_text()
    again = tokenize_files(find_inputs([tmp_path / "bad.jsonl"]), tmp_path / "out", bpe, options)[1]
    assert again.skipped == report.skipped


def test_after_a_stop_the_same_folder_goes_on_with_skipping_but_not_the_other_way(
    tmp_path: Path, bpe: Tokenizer
) -> None:
    (tmp_path / "bad.jsonl").write_bytes(FLAWED)
    with pytest.raises(DataError, match="line 2"):
        run(tmp_path / "bad.jsonl", tmp_path / "out", bpe)
    run(tmp_path / "bad.jsonl", tmp_path / "out", bpe, options=TokenizeOptions(on_error="skip"))
    with pytest.raises(DataError, match=r"flawed documents left out \(skipped 4.*on_error=skip"):
        run(tmp_path / "bad.jsonl", tmp_path / "out", bpe)


def test_an_empty_file_is_an_error_or_counted(tmp_path: Path, bpe: Tokenizer) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.txt").write_text("")
    with pytest.raises(DataError, match=r"a\.txt: is empty"):
        run(tmp_path / "c", tmp_path / "out", bpe)
    with pytest.raises(DataError, match=r"no text at all \(skipped 1: 1 x empty file\)"):
        run(tmp_path / "c", tmp_path / "out2", bpe, options=TokenizeOptions(on_error="skip"))
    assert not (tmp_path / "out2").exists()
    (tmp_path / "c" / "b.txt").write_text("words")
    shards = run(tmp_path / "c", tmp_path / "out3", bpe, options=TokenizeOptions(on_error="skip"))
    assert shards.index["skipped"] == {"empty file": 1}


def test_ids_that_are_tokens_already_are_checked_against_the_vocabulary(tmp_path: Path, bpe: Tokenizer) -> None:
    options = TokenizeOptions(kind="tokens", key="input_ids")
    (tmp_path / "a.jsonl").write_text(f'{{"input_ids": [1, 2, 3]}}\n{{"input_ids": [7, {bpe.vocab_size}]}}\n')
    with pytest.raises(DataError, match=rf"line 2, byte 25: token id {bpe.vocab_size} is not in \[0, "):
        run(tmp_path / "a.jsonl", tmp_path / "out", bpe, options=options)
    skip = TokenizeOptions(kind="tokens", key="input_ids", on_error="skip")
    shards = run(tmp_path / "a.jsonl", tmp_path / "skipped", bpe, options=skip)
    assert shards.tokens(0).tolist() == [1, 2, 3]
    assert shards.index["skipped"] == {"token id out of range": 1}


def test_documents_cannot_forge_the_end_of_a_text(tmp_path: Path, bpe: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("one<|endoftext|>two")
    shards = run(tmp_path / "a.txt", tmp_path / "out", bpe)
    assert shards.tokens(0).tolist().count(bpe.eos_id) == 1
    parsed = run(tmp_path / "a.txt", tmp_path / "parsed", bpe, options=TokenizeOptions(parse_special=True))
    assert parsed.tokens(0).tolist().count(bpe.eos_id) == 2


def test_a_worker_that_dies_is_told_and_what_is_done_is_kept(
    corpus: Path, tmp_path: Path, bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "work_on", os._exit)
    with pytest.raises(DataError, match="a tokenising process died"):
        run(corpus, tmp_path / "out", bpe, workers=2)


def test_a_full_disk_is_told_by_file(
    corpus: Path, tmp_path: Path, bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DataError, match="could not be written: No space left on device"):
        run(corpus, tmp_path / "out", bpe)
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_a_folder_or_file_that_cannot_be_used_is_named(corpus: Path, tmp_path: Path, bpe: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"0\.txt/out: cannot be made"):
        run(corpus, corpus / "0.txt" / "out", bpe)
    inputs = find_inputs([corpus])
    (corpus / "1.txt").unlink()
    with pytest.raises(DataError, match=r"1\.txt: cannot be read: No such file"):
        tokenize_files(inputs, tmp_path / "out", bpe, TokenizeOptions())


def test_a_log_gets_a_line_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from resilin.data import progress

    clock = iter([0.0, 10.0, 40.0, 50.0, 75.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.tokenize_progress("tokenising") as tell:
        for done in (0, 80, 90, 150):
            tell(done * 10**6, 200 * 10**6)
    shown = capsys.readouterr().err.splitlines()
    assert shown == ["tokenising: 80 of 200 MB, 2.0 MB/s", "tokenising: 150 of 200 MB, 2.0 MB/s"]
