"""Only the byte ranges that hold what is wanted are read, in memory of a fixed size, and every block is checked."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_strategies import regions, shapes

from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.folder import CheckpointFolder
from resilin.checkpoint.load import load_part
from resilin.checkpoint.local_storage import LocalReader
from resilin.checkpoint.reader import CheckpointReader
from resilin.checkpoint.spans import spans
from resilin.checkpoint.tensor_record import BLOCK_BYTES
from resilin.layout import Layout, Region, rank, tiles

ROWS, COLUMNS = 4096, 1024  # 4 KiB a row, 256 rows a block, 16 blocks


@given(st.data(), st.integers(1, 40), st.integers(1, 40))
@settings(max_examples=300)
def test_spans_tile_a_region_and_hold_it(data: Any, limit: int, row: int) -> None:
    shape = data.draw(shapes)
    region = data.draw(regions(shape))
    whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
    parts, end_before = [], 0
    for part, first, end in spans(shape, region, limit=limit, row=row):
        inside = set(whole[part.slices].reshape(-1).tolist())
        assert (min(inside), max(inside) + 1) == (first, end)
        assert end - first <= limit or part.numel == 1
        assert first >= end_before
        parts.append(part)
        end_before = end
    assert tiles(region, parts)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = CheckpointFolder(tmp_path)
    folder.save(1, {"model": {"w": torch.arange(ROWS * COLUMNS, dtype=torch.int32).reshape(ROWS, COLUMNS)}})
    at: Path = folder.step_path(1)
    return at


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each request."""
    asked: list[int] = []
    real = LocalReader.read_into

    def counted(self: LocalReader, target: memoryview, start: int) -> None:
        asked.append(len(target))
        real(self, target, start)

    monkeypatch.setattr(LocalReader, "read_into", counted)
    return asked


WHOLE = torch.arange(ROWS * COLUMNS, dtype=torch.int32).reshape(ROWS, COLUMNS)


@pytest.mark.parametrize(
    ("region", "verify", "most"),
    [
        (Region((256, 0), (512, COLUMNS)), True, 2 * BLOCK_BYTES),  # two whole blocks
        (Region((300, 0), (10, COLUMNS)), True, BLOCK_BYTES),  # inside one
        (Region((250, 0), (10, COLUMNS)), True, 2 * BLOCK_BYTES),  # across an edge
        (Region((300, 0), (10, COLUMNS)), False, 10 * COLUMNS * 4),
        (Region((300, 7), (1, 3)), False, 12),
        (Region((300, 7), (2, 3)), False, COLUMNS * 4 + 12),
    ],
    ids=str,
)
def test_no_more_is_read_than_the_blocks_a_region_touches(
    saved: Path, read: list[int], region: Region, verify: bool, most: int
) -> None:
    with CheckpointReader(saved) as checkpoint:
        checkpoint.tensor("model/w", region=Region((0, 0), (1, 1)), verify=False)  # the header
        read.clear()
        assert torch.equal(checkpoint.tensor("model/w", region=region, verify=verify), WHOLE[region.slices])
    assert sum(read) == most


def test_ranks_of_a_column_layout_read_rows_piece_by_piece(saved: Path) -> None:
    half = COLUMNS // 2
    layout = Layout.of(
        {"model/w": ((ROWS, COLUMNS), "I32")},
        [("model/w", rank(r), Region((0, r * half), (ROWS, half))) for r in (0, 1)],
    )
    for number in (0, 1):
        part = load_part(saved, layout, rank(number)).tree["model"]["w"]
        assert torch.equal(part, WHOLE[:, number * half :][:, :half])


def test_a_flipped_bit_is_found_by_whoever_reads_its_block_and_nobody_else(saved: Path) -> None:
    file = saved / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5 * BLOCK_BYTES - 17] ^= 8  # in the sixth block from the end: rows 2560 to 2815
    file.write_bytes(data)
    with CheckpointReader(saved) as checkpoint:
        for good in (Region((0, 0), (2560, COLUMNS)), Region((2816, 0), (1000, COLUMNS))):
            assert torch.equal(checkpoint.tensor("model/w", region=good), WHOLE[good.slices])
        for bad in (Region((2600, 3), (1, 1)), Region((0, 0), (ROWS, 1)), Region((2815, 0), (1, COLUMNS))):
            with pytest.raises(CheckpointError, match=r"model.safetensors: the checksum of tensor 'w' \(bytes \d+ to"):
                checkpoint.tensor("model/w", region=bad)


def test_a_region_outside_the_tensor_is_refused(saved: Path) -> None:
    with CheckpointReader(saved) as checkpoint:
        for region in (Region((0, 0), (ROWS + 1, 1)), Region((0,), (3,))):
            with pytest.raises(CheckpointError, match=r"tensor 'model/w' \[4096, 1024\] has no region"):
                checkpoint.tensor("model/w", region=region)
        with pytest.raises(CheckpointError, match=r"holds no tensor 'model/v'"):
            checkpoint.tensor("model/v")


PEAK = """
    import resource, sys
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    from resilin.checkpoint.background import BackgroundSaves
    from resilin.checkpoint.consolidate import consolidate
    from resilin.checkpoint.diff import differences
    from resilin.checkpoint.folder import CheckpointFolder
    from resilin.checkpoint.load import load_part
    from resilin.checkpoint.verify import damages
    from resilin.layout import Layout, Region, rank

    MiB = 1 << 20
    at, what, tensors, size = Path(sys.argv[1]), sys.argv[2], 6, 32 * MiB
    shape = (64, size // 4 // 64)
    folder = CheckpointFolder(at)
    if what == "write":
        folder.save(1, {"m": {str(n): torch.full(shape, float(n)) for n in range(tensors)}})
        sys.exit()
    small = CheckpointFolder(at / "small")  # everything is imported and warm
    small.save(1, {"m": {"0": torch.ones(8, 8)}})
    consolidate(small.step_path(1), at / "small-whole")
    tiny = Layout.of({"m/0": ((8, 8), "F32")}, [("m/0", rank(0), Region((0, 0), (4, 4)))])
    load_part(small.step_path(1), tiny, rank(0))
    list(differences(small.step_path(1), small.step_path(1)))
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if what == "save":
        state = {"m": {str(n): torch.full(shape, float(n)) for n in range(tensors)}}
    before, own = peak(), 0
    path = folder.step_path(1)
    if what == "consolidate":
        consolidate(path, at / "whole")
    elif what == "save":
        CheckpointFolder(at / "again").save(2, state)
    elif what == "load":
        state = folder.load(1)
        own = tensors * size
    elif what == "columns":
        layout = Layout.of(
            {f"m/{n}": (shape, "F32") for n in range(tensors)},
            [(f"m/{n}", rank(0), Region((0, 0), (shape[0], shape[1] // 2))) for n in range(tensors)],
        )
        part = load_part(path, layout, rank(0))
        own = tensors * size // 2
    elif what == "verify":
        assert list(damages(path)) == []
    elif what == "diff":
        assert list(differences(path, path)) == []
    print((peak() - before - own) / MiB)
"""


@pytest.mark.parametrize(
    "what",
    ["save", "consolidate", "load", "columns", *(pytest.param(w, marks=pytest.mark.slow) for w in ("verify", "diff"))],
)
def test_extra_memory_is_at_most_one_largest_tensor_and_a_constant(tmp_path: Path, what: str) -> None:
    def child(task: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(PEAK), str(tmp_path), task],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    if what != "save":
        child("write")
    assert float(child(what)) < 32 + 40  # of six tensors of 32 MiB
