"""Unpacking takes the texts that were asked for and writes nowhere else."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from resilin.data.errors import DataError
from resilin.data.unpack import unpack


def tar(path: Path, members: dict[str, bytes], *, links: dict[str, str] | None = None) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return path


def test_only_matching_texts_are_written_and_again_the_same(tmp_path: Path) -> None:
    archive = tar(tmp_path / "a.tar.gz", {"p/texts/b_gut.txt": b"B", "p/texts/a_gut.txt": b"A", "p/setup.py": b"x"})
    for _ in range(2):
        files = unpack(archive, ["*/texts/*_gut.txt"], tmp_path / "out")
        assert [file.name for file in files] == ["a_gut.txt", "b_gut.txt"]
        assert {file.name: file.read_text() for file in (tmp_path / "out").iterdir()} == {
            "a_gut.txt": "A",
            "b_gut.txt": "B",
        }


def test_zip_archives_are_read_too(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr("pkg/data/x.txt", "text")
        archive.writestr("pkg/code.py", "code")
    assert [file.name for file in unpack(tmp_path / "a.whl", ["*.txt"], tmp_path / "out")] == ["x.txt"]


@pytest.mark.parametrize("name", ["../../evil.txt", "/evil.txt", "a/../../../evil.txt", "..\\..\\evil.txt"])
def test_no_name_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    archive = tar(tmp_path / "in" / "a.tar.gz", {name: b"x"})
    unpack(archive, ["*.txt"], tmp_path / "in" / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"in"}
    assert {path.name for path in (tmp_path / "in").iterdir()} == {"a.tar.gz", "out"}
    assert [path.name for path in (tmp_path / "in" / "out").iterdir()] == ["evil.txt"]


def test_links_are_passed_over(tmp_path: Path) -> None:
    archive = tar(tmp_path / "a.tar.gz", {"a.txt": b"A"}, links={"b.txt": "/etc/passwd"})
    assert [file.name for file in unpack(archive, ["*.txt"], tmp_path / "out")] == ["a.txt"]


def test_what_cannot_be_unpacked_is_told(tmp_path: Path) -> None:
    archive = tar(tmp_path / "a.tar.gz", {"x/a.txt": b"A", "y/a.txt": b"B", "l.txt": b"caf\xe9"})
    with pytest.raises(DataError, match=r"two members would be written as a\.txt"):
        unpack(archive, ["*.txt"], tmp_path / "out")
    with pytest.raises(DataError, match=r"no member matches \*\.md; it has 3: x/a\.txt"):
        unpack(archive, ["*.md"], tmp_path / "out")
    with pytest.raises(DataError, match=r"l\.txt, byte 3: not utf-8"):
        unpack(archive, ["l.txt"], tmp_path / "out")
    assert unpack(archive, ["l.txt"], tmp_path / "out", encoding="latin-1")[0].read_text() == "café"
    (tmp_path / "broken.tar.gz").write_bytes(archive.read_bytes()[:40])
    with pytest.raises(DataError, match="not a readable archive"):
        unpack(tmp_path / "broken.tar.gz", ["*"], tmp_path / "out")
    with pytest.raises(DataError, match="no such archive"):
        unpack(tmp_path / "none.zip", ["*"], tmp_path / "out")
