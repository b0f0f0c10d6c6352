"""What docs/pipeline.md says in Python is true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from resilin.parallel.pipeline import Split, build, lower, simulate
from resilin.parallel.pipeline.tied import heads_kept

PAGE = Path(__file__).parents[3] / "docs" / "pipeline.md"


def test_the_pages_examples_run_and_give_what_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "order.csv").write_text("0F0,0B0\n")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n((?s:.*?))```", PAGE.read_text(encoding="utf-8"))
    assert len(blocks) >= 4
    names = {"costs": [1, 2, 3, 4, 5, 1, 1, 1], "split": Split((0, 2, 4, 6, 8))}
    for block in blocks:
        exec(block, names)
        for statement, said in re.findall(r"^(\w.*?\.counts\(\))  # (\([\d, ]+\))", block, re.MULTILINE):
            assert str(eval(statement, names)) == said
    assert names["mine"].micros == 1


@pytest.mark.parametrize(("name", "bubble"), [("gpipe", 3), ("1f1b", 3), ("zb-h1", 1)])
def test_the_pages_table_is_of_these_schedules(name: str, bubble: int) -> None:
    line = next(row for row in PAGE.read_text(encoding="utf-8").splitlines() if row.startswith(f"{name} "))
    timeline = simulate(build(name, 4, 4, 12))
    assert line.split()[2] == str(timeline.makespan)
    assert timeline.bubble * 12 == bubble


def test_the_pages_table_of_gradients_kept_for_tied_embeddings_is_what_is_kept() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith("| ranks | `gpipe`"))
    methods = [cell.split("`")[1] for cell in lines[begin].split("|")[2:-1]]
    rows = [[int(cell) for cell in line.split("|")[1:-1]] for line in lines[begin + 2 : begin + 6]]
    for ranks, *said in rows:
        for method, kept in zip(methods, said, strict=True):
            stages = ranks * (2 if method in ("interleaved", "zb-v") else 1)
            schedule = build(method, stages, ranks, 4 * ranks)
            assert heads_kept(lower(schedule, tied=True)[schedule.rank_of[-1]], stages - 1) == kept
