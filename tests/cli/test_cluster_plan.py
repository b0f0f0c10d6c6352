"""`resilin cluster plan` as a user calls it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from resilin.cli.main import app
from resilin.config import UserError

PAGE = Path(__file__).parents[2] / "docs" / "elastic.md"
SETTINGS = "[model]\nvocab_size = 96\nhidden_size = 16\nlayers = 4\nheads = 2\n[source]\npaths = ['text.txt']\n"


def call(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["cluster", "plan", *map(str, arguments)])
    if result.exception is not None:
        raise result.exception
    return result.output


def throughputs(told: str) -> dict[str, str]:
    return dict(re.findall(r"^(\S.*?)  +\S+ +\d+  (\S+%)$", told, re.MULTILINE))


def test_every_way_is_told_with_what_it_costs_and_why() -> None:
    told = call("--lose", 1)
    rates = throughputs(told)
    assert rates["nothing lost"] == "100.0%"
    assert rates["the whole replica left out"] == "75.0%"
    assert list(rates)[-1] == "all axes"
    assert [line.split(":")[0] for line in told.splitlines()[-4:]] == ["random", "dataflow", "graph", "frequency"]
    assert "graph: move [step 1.048 -> 1.036]; layers 9 6 9 8, 2 of them move" in told


def test_the_page_shows_what_the_command_says() -> None:
    page = PAGE.read_text(encoding="utf-8")
    shown = re.search(r"\$ resilin cluster plan (.*)\n((?:.*\n)*?)```", page)
    assert shown is not None
    said = call(*shown.group(1).split())
    assert shown.group(2).split() == said.split()


def test_json_has_every_decision() -> None:
    told = json.loads(call("--lose", "3", "--layers", 8, "--clocks", "1,1.1,1.2", "--json"))
    *_, last = told["policies"]
    assert last["decision"]["clocks"] == [1.0, 1.0, 1.0, 1.2]
    assert last["seconds"] < told["policies"][-2]["seconds"]


def test_a_decoder_s_head_has_its_weight(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(SETTINGS, encoding="utf-8")
    plain = call(file, "--stages", 2, "--replicas", 2, "--micros", 4, "--lose", 0)
    assert "layers 2 2," in plain
    wide = call(file, "model.vocab_size=20000", "--stages", 2, "--replicas", 2, "--micros", 4, "--lose", "0.1")
    assert "layers 3 1," in wide
    seconds = call(file, "--stages", 2, "--replicas", 2, "--micros", 4, "--tflops", 1e-6, "--bandwidth", 1e-9)
    assert "times are seconds" in seconds
    assert re.search(r"50 steps gain \S+ and moving takes [1-9]", seconds) or "no split has a quicker" in seconds


def test_a_run_s_settings_say_what_it_has(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        f"{SETTINGS}sequence_length = 32\n[parallel]\npipeline = 2\ndata = 3\nlayers = [3, 1]\n"
        "[train]\nbatch_size = 24\nmicro_batch_size = 4\n",
        encoding="utf-8",
    )
    told = call(file, "--lose", 0)
    assert told.startswith("2 stages of 3 replicas, layers 3 1, 6 micro-batches;")
    assert re.search(r"nothing lost +1 +24 ", told)
    assert call(file, "parallel.workers=8", "parallel.data=auto", "--lose", 0).startswith("2 stages of 4 replicas")
    assert call(file, "--stages", 1, "--replicas", 2, "--lose", 0).startswith("1 stages of 2 replicas, layers 4,")


def test_measured_times_give_layers_their_cost(tmp_path: Path) -> None:
    times = tmp_path / "schedule.csv"
    times.write_text("rank,action,start,end\n0,0F0,0,1\n1,1F0,1,2\n1,1B0,2,8\n0,0B0,8,10\n", encoding="utf-8")
    told = call("--stages", 2, "--replicas", 1, "--micros", 1, "--layers", 4, "--counts", "2,2", "--measured", times,
                "--replicas", 2, "--micros", 2)  # fmt: skip
    assert "times are seconds" in told
    assert "nothing lost" in told
    start = re.search(r"nothing lost +(\S+)", told)
    assert start is not None
    assert float(start.group(1)) == pytest.approx(10)


HANDED: list[object] = []


def test_clocks_are_handed_to_whom_the_user_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import test_cluster_plan as named

    named.HANDED.clear()
    call("--lose", "3", "--layers", 8, "--clocks", "1,1.1,1.2")
    assert not named.HANDED
    call("--lose", "3.2", "--layers", 8, "--clocks", "1,1.1,1.2", "--clocks-hook", "test_cluster_plan:take")
    assert [one["clock"] for one in named.HANDED] == [1.0, 1.0, 1.0, 1.2]  # type: ignore[index]
    assert named.HANDED[3] == {"stage": 3, "members": [12, 13, 15], "clock": 1.2, "usual": 1.0}


def take(stages: list[dict[str, object]]) -> None:
    HANDED.extend(stages)


def test_what_cannot_be_planned_is_said(tmp_path: Path) -> None:
    for arguments, message in (
        (["--lose", "x"], "write a stage"),
        (["--lose", "9"], "there is no stage 9"),
        (["--lose", "0.9"], "replicas 0 to 3, and no 9"),
        (["--layers", "a"], "write numbers"),
        (["--layers", "3"], "3 layers cannot fill 4 stages|no split of 3 layers"),
        (["--counts", "1,2"], "names 2 stages with 3 layers"),
        (["--bandwidth", "1"], "a step's seconds are not known"),
        (["--measured", tmp_path / "none.csv"], "cannot read"),
        (["--clocks", "1,2", "--clocks-hook", "nowhere:f"], "clocks cannot be handed to 'nowhere:f'"),
        (["--clocks-hook", "json:dumps"], "no clocks to hand over"),
        (["--micros", "2"], "no more than the 2 micro-batches"),
    ):
        with pytest.raises(UserError, match=message):
            call(*arguments)
