"""Sources over files: the same tokens from every format, tokenised once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from resilin.data import file_source
from resilin.data.errors import DataError
from resilin.data.packed import PackedSource
from resilin.data.settings import SourceContext
from resilin.data.text_source import TextSource

DOCUMENTS = [f"This is document number {i}, and it's {'very ' * (i % 5)}short." for i in range(60)]


def settings(tmp_path: Path, *paths: Path, **kw: Any) -> TextSource:
    tree = {"paths": [str(path) for path in paths], "cache": tmp_path / "cache", "sequence_length": 16}
    return TextSource.model_validate({**tree, "tokenizer": {"vocab_size": 300}, **kw})


def all_tokens(source: PackedSource) -> list[int]:
    return [token for step in range(len(source)) for row in source.fetch(step, range(source.slots(step)))["tokens"]
            for token in row.tolist()]  # fmt: skip


def write_text(folder: Path) -> Path:
    (folder / "text").mkdir()
    for number, document in enumerate(DOCUMENTS):
        (folder / "text" / f"{number:03d}.txt").write_text(document)
    return folder / "text"


def write_jsonl(folder: Path) -> Path:
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": document}) for document in DOCUMENTS))
    return folder / "a.jsonl"


def write_parquet(folder: Path) -> Path:
    pa = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pa.table({"text": DOCUMENTS}), folder / "a.parquet")
    return folder / "a.parquet"


def write_data_set(folder: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": DOCUMENTS}).save_to_disk(str(folder / "saved"))
    return folder / "saved"


@pytest.mark.parametrize("write", [write_jsonl, write_parquet, write_data_set])
def test_every_format_gives_the_same_tokens(write: Callable[[Path], Path], tmp_path: Path) -> None:
    kw = {"held_out": {"fraction": 0.0}, "shuffle": False, "epochs": 1, "tokenizer": {"kind": "bytes"}}
    expected = all_tokens(settings(tmp_path, write_text(tmp_path), **kw).build(SourceContext(0, "train", 4)))
    source = settings(tmp_path, write(tmp_path), **kw).build(SourceContext(0, "train", 4))
    assert all_tokens(source) == expected
    assert source.tokenizer is not None
    assert source.tokenizer.decode(expected[:20]).startswith("This is document n")


def test_the_second_build_tokenises_and_learns_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = settings(tmp_path, write_text(tmp_path))
    first = chosen.build(SourceContext(0, "train", 4))

    def refuse(*_: object) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr("resilin.data.tokenize.Worker", refuse)
    monkeypatch.setattr("resilin.data.tokenizer_settings.train_bpe", refuse)
    again = chosen.build(SourceContext(0, "train", 4))
    assert again.digest == first.digest
    assert torch.equal(again.fetch(7, [1])["tokens"], first.fetch(7, [1])["tokens"])
    chosen.build(SourceContext(0, "validation", 4))


def test_a_changed_file_is_tokenised_anew(tmp_path: Path) -> None:
    folder = write_text(tmp_path)
    chosen = settings(tmp_path, folder, tokenizer={"kind": "bytes"})
    first = chosen.build(SourceContext(0, "train", 4))
    (folder / "000.txt").write_text(DOCUMENTS[0].replace("number", "numbex"))  # the same size
    second = chosen.build(SourceContext(0, "train", 4))
    assert first.digest != second.digest
    with pytest.raises(DataError, match="other data"):
        second.load_state_dict(first.state_dict())


def test_validation_files_of_their_own_share_the_tokenizer(tmp_path: Path) -> None:
    folder = write_text(tmp_path)
    (tmp_path / "valid.txt").write_text("Something else entirely, held apart from the rest.")
    chosen = settings(tmp_path, folder, validation_paths=[str(tmp_path / "valid.txt")], shuffle=False)
    train, validation = (chosen.build(SourceContext(0, split, 4)) for split in ("train", "validation"))  # type: ignore[arg-type]
    assert train.tokenizer is not None
    assert validation.tokenizer is not None
    assert train.tokenizer.digest == validation.tokenizer.digest
    assert len(train.stream) == train.stream.shards.token_count
    batch = validation.fetch(0, [0])
    assert validation.tokenizer.decode(batch["tokens"][0].tolist()).startswith("Something else")


def test_one_text_file_holds_out_its_tail(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("\n".join(DOCUMENTS))
    with pytest.raises(DataError, match=r"held_out\.by=tail"):
        settings(tmp_path, tmp_path / "one.txt").build(SourceContext(0, "train", 4))
    tail = settings(tmp_path, tmp_path / "one.txt", held_out={"by": "tail", "fraction": 0.1})
    validation = tail.build(SourceContext(0, "validation", 4))
    assert validation.tokenizer is not None
    last = validation.fetch(0, [0])
    assert validation.tokenizer.decode(last["tokens"][0].tolist()) in "\n".join(DOCUMENTS[-10:])
    lines = settings(tmp_path, tmp_path / "one.txt", separator="\n").build(SourceContext(0, "train", 4))
    assert lines.stream.shards.document_count == len(DOCUMENTS)


def test_skipped_documents_are_told_on_every_build(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_jsonl(tmp_path)
    file.write_text(file.read_text() + "\nnonsense\n")
    with pytest.raises(DataError, match="line 61"):
        settings(tmp_path, file).build(SourceContext(0, "train", 4))
    chosen = settings(tmp_path, file, on_error="skip")
    for _ in range(2):
        chosen.build(SourceContext(0, "train", 4))
        assert "skipped 1: 1 x broken JSON" in capsys.readouterr().err


def test_a_given_tokenizer_is_used_as_it_is(tmp_path: Path, bpe: Any) -> None:
    bpe.save(tmp_path / "tok")
    source = settings(tmp_path, write_text(tmp_path), tokenizer={"path": tmp_path / "tok"}).build(
        SourceContext(0, "train", 4)
    )
    assert source.tokenizer is not None
    assert source.tokenizer.digest == bpe.digest
    with pytest.raises(DataError, match="no such file"):
        settings(tmp_path, tmp_path / "text", tokenizer={"path": tmp_path / "none.json"}).build(SourceContext())


def test_a_tokenizer_learns_from_pieces_of_all_files(tmp_path: Path) -> None:
    from resilin.data.inputs import find_inputs
    from resilin.data.tokenize_options import TokenizeOptions
    from resilin.data.tokenizer_settings import training_texts

    folder = write_text(tmp_path)
    everything = list(training_texts(find_inputs([folder]), TokenizeOptions(), 10**9))
    assert everything == DOCUMENTS
    assert file_source.FileSourceSettings is not None
