from __future__ import annotations

from pathlib import Path

import pytest

from resilin.data.errors import DataError
from resilin.data.settings import SourceContext
from resilin.data.train_tokenizer import byte_tokenizer
from resilin.recipes import standard_library
from resilin.recipes.standard_library import StandardLibrary, library_files


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "lib"
    for name, text in {
        "a.py": "x = 1\n" * 40,
        "b/c.py": "é = '<|endoftext|>'\n" * 9,
        "b/test/d.py": "no",
        "site-packages/e.py": "no",
        "f.txt": "no",
        "latin.py": None,
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\xe9" if text is None else text.encode())
    monkeypatch.setattr(standard_library.sysconfig, "get_paths", lambda: {"stdlib": str(folder)})
    return folder


def test_its_tokens_are_the_modules_bytes_as_the_byte_tokenizer_writes_them(library: Path, tmp_path: Path):
    shards = StandardLibrary(cache=tmp_path / "cache").shards()
    tokenizer = byte_tokenizer()
    texts = [path.read_text() for path in library_files(library) if path.name != "latin.py"]
    assert len(texts) == 2
    expected = [[*tokenizer.encode(text, parse_special=False), tokenizer.eos_id] for text in texts]
    assert shards.document_count == 2
    assert shards.tokens(0)[:].tolist() == [token for document in expected for token in document]


def test_it_is_written_once_and_the_same_again_elsewhere(library: Path, tmp_path: Path):
    first = StandardLibrary(cache=tmp_path / "cache").shards()
    written = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    assert StandardLibrary(cache=tmp_path / "cache").shards().folder == first.folder
    assert {path: path.stat().st_mtime_ns for path in first.folder.iterdir()} == written
    assert StandardLibrary(cache=tmp_path / "other").shards().digest == first.digest


def test_a_limit_takes_whole_modules_only(library: Path, tmp_path: Path):
    limited = StandardLibrary(bytes=200, cache=tmp_path / "cache").shards()
    assert limited.document_count == 1
    assert limited.folder != StandardLibrary(cache=tmp_path / "cache").shards().folder


def test_a_python_without_source_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(standard_library.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(DataError, match="no library source"):
        StandardLibrary(cache=tmp_path / "cache").build(SourceContext())
