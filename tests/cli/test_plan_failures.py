"""`resilin plan failures`: a study from a file, a trace that gives the same again, pictures, and errors that help."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from resilin.cli.main import app
from resilin.config import UserError

STUDY = """
[cluster]
machines = 8
devices = 2
price = 2.0
watts = 500
idle_watts = 100
[job]
stages = 2
tensor = 2
micro_batches = 4
layers = 8
step_seconds = 10
days = 4
[checkpoint]
seconds = 20
restart_seconds = 300
[failures.machine]
mean_hours = 100
repair.mean_hours = 5
[failures.slow]
mean_hours = 300
[ways]
Daly = { use = "restart", interval = "daly", fewer = true }
torchft = { use = "torchft" }
ours = { use = "resilin" }
"""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "study.toml"
    path.write_text(STUDY)
    return path


def call(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["plan", "failures", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_study_is_the_same_from_its_written_trace(study: Path, tmp_path: Path) -> None:
    trace = tmp_path / "failures.csv"
    drawn = json.loads(call(study, "--json", "--write-trace", trace).split("wrote")[0])
    assert len(trace.read_text().splitlines()) == drawn["events"] + 2
    before, after = STUDY.split("[failures.machine]")
    interval = drawn["ways"][0]["interval"]
    text = before + "[ways]" + after.split("[ways]")[1].replace('interval = "daly"', f"interval = {interval}")
    study.write_text(f'trace = "{trace}"\n{text}')
    read = json.loads(call(study, "--json"))
    for one, other in zip(drawn["ways"], read["ways"], strict=True):
        assert one == other
    assert [way["name"] for way in read["ways"]] == ["Daly", "torchft", "ours"]
    assert all(way["finished"] and 0.3 < way["goodput"] < 1 for way in read["ways"])


def test_tables_tell_time_cost_and_where_it_went(study: Path) -> None:
    said = call(study, "--way", "ours", "--way", "Daly")
    assert "8 machines, 16 workers: 2 stages of 4 replicas" in said
    assert "torchft" not in said
    for word in ("goodput", "cost", "kWh", "slower", "again", "stopped"):
        assert word in said


def test_pictures_are_the_same_file_when_made_again(study: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    made = []
    for name in ("one.svg", "two.svg"):
        call(study, "--picture", tmp_path / name)
        made.append((tmp_path / name).read_bytes())
    assert made[0] == made[1]
    assert b"torchft: goodput" in made[0]
    call(study, "job.days=1", "--sizes", "8,20", "--picture", tmp_path / "sizes.svg")
    assert b"machines" in (tmp_path / "sizes.svg").read_bytes()


def test_a_sweep_tells_every_size_and_rate(study: Path) -> None:
    sizes = json.loads(call(study, "job.days=1", "--sizes", "4,12.6", "--json"))
    assert [one["machines"] for one in sizes] == [4, 12]
    assert [one["settings"]["cluster"]["machines"] for one in sizes] == [4, 12]
    rates = json.loads(call(study, "job.days=2", "--rates", "0.01,8", "--json", "--way", "Daly"))
    assert rates[0]["events"] < rates[1]["events"]
    assert rates[0]["ways"][0]["goodput"] > rates[1]["ways"][0]["goodput"]


def test_a_kind_of_machine_gives_what_the_file_leaves_out(study: Path) -> None:
    text = STUDY.split("[failures.machine]")[0].replace("devices = 2\nprice = 2.0\nwatts = 500\nidle_watts = 100\n", "")
    study.write_text(text.replace("[job]", 'machine = "dgx-h100"\n[job]').replace("restart_seconds = 300\n", ""))
    told = json.loads(call(study, "--way", "resilin", "ways.resilin.use=resilin", "--json"))["settings"]
    from resilin.planner.hardware.find import load_cluster

    kind = load_cluster("dgx-h100")
    assert kind.price is not None and kind.power is not None and kind.failures is not None  # noqa: PT018
    assert told["cluster"]["devices"] == kind.node
    assert told["cluster"]["price"] == kind.price.device_hour
    assert told["cluster"]["watts"] == kind.power.busy
    assert told["checkpoint"]["restart_seconds"] == kind.failures.restart
    assert told["failures"]["machine"]["mean_hours"] == kind.failures.device_hours / kind.node


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["cluster.machins=3"], "did you mean 'machines'"),
        (["cluster.machines=7"], "not divisible by job.stages (2): every machine holds one stage; use 6 or 8"),
        (["job.tensor=3"], "does not divide cluster.devices"),
        (["job.stages=16", "cluster.machines=16"], "more than the 8 layers"),
        (["job.steps=5"], "either steps, or the days"),
        (["trace=none.csv"], "either from a trace or from laws"),
        (["ways.ours.fewer=true"], "fewer belongs to use = 'restart'"),
        (["ways.ours.use=resilient"], "resilin-fast"),
        (["ways.torchft.least=5"], "more than the 4 machines"),
        (["cluster.idle_watts=600"], "more than watts"),
        (["failures.machine.law=normal"], "'weibull'"),
        (["--way", "our"], "did you mean 'ours'"),
        (["--rates", "0,1"], "positive numbers"),
        (["--rates", "1", "--sizes", "8"], "one sweep"),
        (["cluster.machine=dgx-h101"], "did you mean 'dgx-h100'"),
    ],
)
def test_what_cannot_be_is_said(study: Path, arguments: list[str], said: str) -> None:
    with pytest.raises(UserError) as error:
        call(study, *arguments)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--layout", "x.toml"), "goes with --cluster"),
        (("study.toml", "--layout", "x.toml", "--cluster", "dgx-a100-40"), "without a study's file"),
        ((), "or a layout"),
        (("study.toml", "--losses-a-day", "1"), "or a layout"),
    ],
)
def test_a_study_comes_from_one_file(
    arguments: tuple[str, ...], said: str, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(study.parent)
    with pytest.raises(UserError, match=said):
        call(*arguments)
