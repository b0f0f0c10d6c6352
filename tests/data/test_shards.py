"""A shard folder tells every damage by file and byte, and never reads outside itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from resilin.data.errors import DataError
from resilin.data.packed import Shards
from resilin.data.settings import SourceContext
from resilin.data.shards import TokenShards
from resilin.data.tokenizer import Tokenizer
from resilin.data.write_shards import write_documents

Make = Callable[..., TokenShards]


def edit(shards: TokenShards, change: Callable[[dict[str, Any]], None]) -> None:
    file = shards.folder / "index.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))


def test_what_is_written_is_read(make_shards: Make, bpe: Tokenizer, tmp_path: Path) -> None:
    shards = make_shards([30, 1, 60, 5], per_shard=40)
    assert (shards.token_count, shards.document_count, len(shards.shards)) == (96, 4, 2)
    assert np.concatenate([shards.tokens(0), shards.tokens(1)]).tolist() == list(range(1, 97))
    assert (shards.starts(0).tolist(), shards.starts(1).tolist()) == ([0, 30, 31], [0])
    assert shards.verify() == []
    assert shards.tokenizer is None
    with_tokenizer = write_documents(tmp_path / "t", [[1, 2]], bpe.vocab_size, tokenizer=bpe)
    assert with_tokenizer.tokenizer is not None
    assert with_tokenizer.tokenizer.digest == bpe.digest


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, "uint16"), (65537, "uint32"), (200_000, "uint32")])
def test_ids_are_stored_in_the_smallest_type_that_holds_the_vocabulary(
    vocab_size: int, dtype: str, tmp_path: Path
) -> None:
    shards = write_documents(tmp_path, [[0, vocab_size - 1]], vocab_size)
    assert shards.index["dtype"] == dtype
    assert shards.tokens(0).tolist() == [0, vocab_size - 1]


def test_equal_contents_have_equal_digests_and_others_do_not(make_shards: Make) -> None:
    assert make_shards([5, 6]).digest == make_shards([5, 6]).digest
    assert len({make_shards(lengths).digest for lengths in ([5, 6], [6, 5], [11])}) == 3


@pytest.mark.parametrize("cut", [1, 2, 7])
def test_a_truncated_shard_is_told_with_the_byte(make_shards: Make, cut: int) -> None:
    shards = make_shards([20])
    file = shards.folder / "shard-00000.tokens"
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(DataError, match=rf"shard-00000\.tokens: truncated: .*from byte {40 - cut} on"):
        TokenShards(shards.folder)


def test_a_file_that_grew_is_told(make_shards: Make) -> None:
    shards = make_shards([20])
    file = shards.folder / "shard-00000.starts"
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(DataError, match=r"shard-00000\.starts: too long"):
        TokenShards(shards.folder)


@pytest.mark.parametrize("part", ["tokens", "starts"])
def test_any_flipped_bit_is_found_by_verify(make_shards: Make, part: str) -> None:
    shards = make_shards([20, 20])
    file = shards.folder / f"shard-00000.{part}"
    for bit in (0, 13, file.stat().st_size * 8 - 1):
        raw = bytearray(file.read_bytes())
        raw[bit // 8] ^= 1 << bit % 8
        file.write_bytes(raw)
        assert any(
            problem.kind == "checksum" and part in problem.where for problem in TokenShards(shards.folder).verify()
        )
        raw[bit // 8] ^= 1 << bit % 8
        file.write_bytes(raw)
    assert TokenShards(shards.folder).verify() == []


def test_a_missing_shard_is_named(make_shards: Make) -> None:
    shards = make_shards([60, 60])
    (shards.folder / "shard-00001.tokens").unlink()
    with pytest.raises(DataError, match=r"shard-00001\.tokens: missing"):
        TokenShards(shards.folder)


def test_an_id_outside_the_vocabulary_is_refused_at_every_stage(make_shards: Make, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"document 1: token id 9 is not in \[0, 9\)"):
        write_documents(tmp_path / "w", [[1], [2, 9]], 9)
    shards = make_shards([20], vocab_size=100)
    edit(shards, lambda index: index.update(vocab_size=15))
    damaged = TokenShards(shards.folder)
    problems = {problem.kind: problem for problem in damaged.verify()}
    assert "byte 28" in problems["token id out of range"].where  # token 15 is the fifteenth of two bytes each
    source = Shards(path=shards.folder, sequence_length=19, held_out={"fraction": 0.0}).build(SourceContext())
    with pytest.raises(DataError, match=r"byte 28: token id 15 is not below the vocabulary size 15 \(step 0, slot 0\)"):
        source.fetch(0, [0])


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", 7])
def test_a_name_that_leads_out_of_the_folder_is_refused(make_shards: Make, name: object) -> None:
    shards = make_shards([20])
    outside = shards.folder.parent / "outside.tokens"
    outside.write_bytes(b"\0" * 40)
    edit(shards, lambda index: index["shards"][0].update(name=name))
    with pytest.raises(DataError, match=r"leads out of the folder|name should be a str"):
        TokenShards(shards.folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "not an index of token shards"),
        ({"version": 99}, "version 99"),
        ({"dtype": "float"}, "dtype 'float' should be one of"),
        ({"vocab_size": "many"}, "vocab_size 'many'"),
        ({"shards": {}}, "shards should be a list"),
        ({"shards": [3]}, r"shards\[0\]: should be a table"),
        ({"shards": [{"name": "shard-00000", "tokens": -1}]}, r"tokens should be a int, not -1"),
    ],
)
def test_a_wrong_index_is_told_by_its_key(make_shards: Make, change: dict[str, Any], message: str) -> None:
    shards = make_shards([20])
    edit(shards, lambda index: index.update(change))
    with pytest.raises(DataError, match=message):
        TokenShards(shards.folder)


def test_a_broken_or_absent_index_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no index\.json; it is no shard folder"):
        TokenShards(tmp_path)
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(DataError, match="tokenising has not finished"):
        TokenShards(tmp_path)
    (tmp_path / "index.json").write_text('{"format": ')
    with pytest.raises(DataError, match="not valid JSON"):
        TokenShards(tmp_path)


def test_a_changed_index_is_found_by_verify(make_shards: Make) -> None:
    shards = make_shards([20])
    edit(shards, lambda index: index.update(vocab_size=50_000))
    assert [problem.kind for problem in TokenShards(shards.folder).verify()] == ["checksum"]
