"""docs/checkpoint-format.md says enough: a reader written from it, with json, zlib, xxhash and numpy, reads it all."""

from __future__ import annotations

import json
import math
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from ranks import as_ranks

from resilin.checkpoint.folder import CheckpointFolder
from resilin.layout import Layout, Region, flat_range, rank

NUMPY = {"F32": "<f4", "I64": "<i8", "F16": "<f2", "BOOL": "?"}


def read_by_the_book(at: Path) -> Any:
    text = json.loads((at / "index.json").read_text(encoding="utf-8"))
    assert (text["format"], text["version"]) == ("resilin-checkpoint", 2)
    content = text["content"]
    body = json.dumps(content, separators=(",", ":")).encode()
    assert text["checksum"] == f"crc32:{zlib.crc32(body):08x}"
    files = []
    for file in content["files"]:
        raw = (at / file["name"]).read_bytes()
        length = int.from_bytes(raw[:8], "little")
        assert (8 + length) % 64 == 0
        assert len(raw) == file["bytes"]
        assert file["header_checksum"] == f"crc32:{zlib.crc32(raw[: 8 + length]):08x}"
        header = json.loads(raw[8 : 8 + length])
        assert header.pop("__metadata__") == {"format": "pt"}
        ends = [0, *(entry["data_offsets"][1] for entry in header.values())]
        assert [entry["data_offsets"][0] for entry in header.values()] == ends[:-1]
        assert ends[-1] == len(raw) - 8 - length
        files.append((raw, 8 + length, header))
    tensors = {}
    for name, entry in content["tensors"].items():
        dtype = np.dtype(NUMPY[entry["dtype"]])
        whole = np.empty(entry["shape"], dtype)
        seen = np.zeros(entry["shape"], int)
        for number, inner, begin, offsets, sizes, checksums in entry["pieces"]:
            raw, start, header = files[number]
            data = raw[begin : begin + math.prod(sizes) * dtype.itemsize]
            assert header[inner]["shape"] == sizes
            assert header[inner]["dtype"] == entry["dtype"]
            assert begin == start + header[inner]["data_offsets"][0]
            block = content["block"]
            blocks = [data[k : k + block] for k in range(0, len(data), block)]
            assert checksums == [xxhash.xxh3_64_intdigest(part) % 2**32 for part in blocks]
            box = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
            whole[box] = np.frombuffer(data, dtype).reshape(sizes)
            seen[box] += 1
        assert (seen == 1).all()
        tensors[name] = whole
    return put_together(content["tree"], tensors)


def put_together(node: Any, tensors: dict[str, np.ndarray]) -> Any:
    if isinstance(node, list):
        return [put_together(item, tensors) for item in node]
    if not isinstance(node, dict):
        return node
    if set(node) == {"$tensor"}:
        return tensors[node["$tensor"]]
    if set(node) == {"$float"}:
        return float(node["$float"])
    return {key.removeprefix("$"): put_together(item, tensors) for key, item in node.items()}


def equal(a: Any, b: Any) -> bool:
    if isinstance(b, torch.Tensor):
        return isinstance(a, np.ndarray) and a.shape == tuple(b.shape) and a.tobytes() == b.numpy().tobytes()
    if isinstance(b, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in b)
    if isinstance(b, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b or (a != a and b != b)


def test_what_one_process_wrote(tmp_path: Path) -> None:
    w = torch.randn(700, 600)  # more than one block
    state = {
        "model": {"w": w, "tied": w, "__metadata__": torch.ones(2), "a/b~c": torch.ones(3, dtype=torch.float16)},
        "optimizer": [torch.tensor(3), {"$odd": torch.empty(0, 4), "é": torch.tensor([True])}],
        "top": torch.arange(4),
        "run": {"best": math.inf, "nan": math.nan, "ü": "ö", "$x": None},
    }
    folder = CheckpointFolder(tmp_path)
    folder.save(1, state)
    assert equal(read_by_the_book(folder.step_path(1)), state)


def test_what_several_processes_wrote(tmp_path: Path) -> None:
    shape, cuts = (9, 5), [0, 13, 13, 29, 45]
    held = [("m/w", rank(r), box) for r in range(4) for box in flat_range(shape, cuts[r], cuts[r + 1])]
    held += [("m/all", rank(r), Region((0,), (6,))) for r in range(4)]
    layout = Layout.of({"m/w": (shape, "F32"), "m/all": ((6,), "I64")}, held)
    w, same = torch.randn(shape), torch.arange(6)

    def work(c: Any) -> None:
        mine = w.reshape(-1)[cuts[c.rank] : cuts[c.rank + 1]]
        tree = {"m": {"w": mine, "all": same}, "run": {"step": 1}}
        CheckpointFolder(tmp_path, coordinator=c).save(1, tree, layout)

    as_ranks(4, work)
    read = read_by_the_book(CheckpointFolder(tmp_path).step_path(1))
    assert equal(read, {"m": {"w": w, "all": same}, "run": {"step": 1}})


def test_the_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "checkpoint-format.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    layout = Layout.of({"model/embed.weight": ((16, 64), "F32")}, [
        ("model/embed.weight", rank(r), Region((8 * r, 0), (8, 64))) for r in (0, 1)
    ])  # fmt: skip
    weight = torch.randn(16, 64)

    def work(c: Any) -> None:
        tree = {"model": {"embed.weight": weight[8 * c.rank :][:8]}}
        CheckpointFolder(tmp_path, coordinator=c).save(100, tree, layout)

    as_ranks(2, work)
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(code, found)
    assert np.array_equal(found["whole"], weight.numpy())
