"""Elastic runs whose model is divided into stages, beside one process that nothing ever happened to."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from elastic_checks import changes, check_close, check_same, equal, events, states
from elastic_runs import STEPS, alone, go, settings_of

from resilin.cluster.elastic_job import ElasticJob, JobEnded
from resilin.cluster.faults import Fault
from resilin.config import parse_settings
from resilin.parallel.errors import ParallelError
from resilin.run.events import Cluster, Event, StepDone
from resilin.run.settings import RunSettings
from resilin.run.start import start_run

MODEL = {"layers": 4}
WIDE = {**MODEL, "mlp_size": 256}  # the head counts little beside a block: FLOPs say what is balanced
TIED = {**MODEL, "tie_embeddings": True}


@pytest.fixture(scope="module")
def undisturbed(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process with as many blocks, to which nothing happens."""
    return alone(text, tmp_path_factory.mktemp("elastic") / "one", model=MODEL)


def staged(text: Path, workers: int = 4, stages: int = 2, **over: Any):
    parallel = {"workers": workers, "pipeline": stages, **over.pop("parallel", {})}
    return settings_of(text, parallel=parallel, **{"model": MODEL, **over})


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param([], marks=pytest.mark.slow),
        [Fault(1, 3, "forward of stage 0 micro-batch 3"), Fault(2, 8, "backward of stage 1 micro-batch 3")],
        pytest.param([Fault(3, 2, "updating weights"), Fault(0, 9, "copying its states")], marks=pytest.mark.slow),
        pytest.param(  # while it recovers
            [Fault(2, 4, "adding gradients up"), Fault(0, 4, "reading its states from copies")],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["none", "passes", "update", "recovery"],
)
def test_stages_lose_members_and_the_bits_are_those_of_one_process(
    faults: list[Fault], text: Path, undisturbed: Path, tmp_path: Path
):
    assert go(staged(text), tmp_path / "run", faults) == JobEnded(0, "")
    check_same(tmp_path / "run", undisturbed)
    happened = changes(tmp_path / "run")
    assert len(happened) >= (2 if faults else 1)
    assert all(change["redone"] <= 1 for change in happened)
    assert [len(stage) for stage in happened[0]["stages"]] == [2, 2]


@pytest.mark.slow
def test_a_stage_that_has_nobody_left_is_given_a_member_of_another(text: Path, undisturbed: Path, tmp_path: Path):
    ended = go(staged(text, workers=3), tmp_path / "run", [Fault(2, 5, "backward of stage 1 micro-batch 2")])
    assert ended == JobEnded(0, "")
    check_same(tmp_path / "run", undisturbed)
    assert [change["stages"] for change in changes(tmp_path / "run")][:2] == [[[0, 1], [2]], [[0], [1]]]


def test_members_come_and_leave_and_blocks_follow_them(text: Path, tmp_path: Path):
    """Blocks are divided by what stages can do; the head counts as little here, the vocabulary being bytes."""
    done: list[str] = []

    def watch(job: ElasticJob, event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 1 and not done:
            job.add()
            job.add()
            done.append("added")
        if isinstance(event, Cluster) and event.what == "change" and len(event.facts["members"]) == 4:
            job.signal(0, signal.SIGTERM)

    settings = staged(text, workers=2, train={"steps": 20})
    one = alone(text, tmp_path / "one", model=MODEL, train={"steps": 20})
    assert go(settings, tmp_path / "run", watch=watch) == JobEnded(0, "")
    check_same(tmp_path / "run", one, 20)
    happened = changes(tmp_path / "run")
    assert {len(change["members"]) for change in happened} >= {2, 4, 3}
    assert len({tuple(change["layers"]) for change in happened}) > 1
    assert all(change["redone"] == 0 for change in happened)


def check_moves(
    settings: RunSettings,
    more: dict[str, Any],
    lost: Sequence[int],
    check: Callable[..., None],
    text: Path,
    tmp_path: Path,
) -> None:
    """After a loss something moves in a step of which all is kept, and nobody waits for what is read.

    Args:
        settings: of the run.
        more: what they have beside the usual.
        lost: members, in step 3.
        check: given the changes up to the move, of which the last is it.
        text: to learn from.
        tmp_path: where runs go.
    """
    parallel = more.get("parallel", {})
    same = check_close if "reduction" in parallel else check_same
    if "tensor" in parallel:
        assert go(staged(text, 4, **more), tmp_path / "one") == JobEnded(0, "")
    else:
        alone(text, tmp_path / "one", model=more["model"])
    waited = []
    while 0 not in waited and len(waited) < 3:  # who hears a step late that it is to move has read the states in vain
        folder, faults = tmp_path / f"run{len(waited)}", [Fault(number, 3, "adding gradients up") for number in lost]
        assert go(settings, folder, faults) == JobEnded(0, "")
        same(folder, tmp_path / "one")
        happened = changes(folder)
        moves = [place for place, one in enumerate(happened) if one["kept"] == 16]
        assert moves, "nothing has moved with every micro-batch, of both stages, kept"
        happened = happened[: moves[0] + 1]
        check(*happened)
        moved = happened[-1]
        assert moved["redone"] == 0
        assert sum(told.get("ahead", 0) for told in moved["bytes"].values()) > 10_000
        waited.append(sum(told.get("migrate", 0) for told in moved["bytes"].values()))
    assert waited[-1] == 0, "bytes that were waited for, each time"


@pytest.mark.parametrize(
    ("more", "workers"),
    [
        ({"model": WIDE}, 3),
        pytest.param({"model": WIDE, "parallel": {"tensor": 2}}, 6, marks=pytest.mark.slow),
        pytest.param({"model": {**WIDE, "tie_embeddings": True}}, 3, marks=pytest.mark.slow),
        pytest.param({"model": WIDE, "parallel": {"reduction": "fast"}}, 3, marks=pytest.mark.slow),
    ],
    ids=["stages", "teams", "tied", "fast"],
)
def test_blocks_move_while_a_step_is_computed_and_nothing_is_computed_again(
    more: dict[str, Any], workers: int, text: Path, tmp_path: Path
):
    """Two in the first stage have more blocks than the one in the last; once there is one in each, some move."""

    def check(begun: dict[str, Any], lost: dict[str, Any], moved: dict[str, Any]) -> None:
        assert begun["layers"] == lost["layers"] != moved["layers"]
        assert (lost["members"], moved["costs"]) == (moved["members"], "by FLOPs")

    check_moves(staged(text, workers, **more), more, (0,), check, text, tmp_path)


@pytest.mark.parametrize(
    ("more", "workers", "lost"),
    [
        ({"model": WIDE}, 6, (1, 2)),
        pytest.param({"model": {**WIDE, "tie_embeddings": True}}, 6, (1, 2), marks=pytest.mark.slow),
        # Who leaves the last stage has losses that nobody else has.
        pytest.param({"model": {**WIDE, "tie_embeddings": True}}, 6, (4, 5), marks=pytest.mark.slow),
        pytest.param({"model": WIDE, "parallel": {"tensor": 2}}, 12, (2, 3, 4, 5), marks=pytest.mark.slow),
        pytest.param({"model": WIDE, "parallel": {"reduction": "fast"}}, 6, (1, 2), marks=pytest.mark.slow),
    ],
    ids=["stages", "tied", "tied last", "teams", "fast"],
)
def test_workers_change_their_stage_while_a_step_is_computed_and_nothing_is_computed_again(
    more: dict[str, Any], workers: int, lost: tuple[int, ...], text: Path, tmp_path: Path
):
    """Of three and three, two of one stage are lost: one of the other stage moves there."""

    def check(*happened: dict[str, Any]) -> None:
        team = more.get("parallel", {}).get("tensor", 1)
        sizes = [[len(stage) // team for stage in one["stages"]] for one in happened]
        assert (sizes[0], sorted(sizes[-2]), sizes[-1]) == ([3, 3], [1, 3], [2, 2])

    check_moves(staged(text, workers, cluster={"copies": 2}, **more), more, lost, check, text, tmp_path)


@pytest.mark.slow
def test_blocks_follow_what_is_measured_and_the_bits_stay(text: Path, tmp_path: Path):
    """How long blocks take here is nobody's to say: only that it was measured, by the time a worker leaves."""

    def watch(job: ElasticJob, event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 12:
            job.signal(0, signal.SIGTERM)

    one = alone(text, tmp_path / "one", model=MODEL, train={"steps": 30})
    assert go(staged(text, train={"steps": 30}), tmp_path / "run", watch=watch) == JobEnded(0, "")
    check_same(tmp_path / "run", one, 30)
    happened = changes(tmp_path / "run")
    assert (happened[0]["costs"], happened[-1]["costs"], len(happened[-1]["members"])) == ("by FLOPs", "measured", 3)


@pytest.mark.slow
def test_the_users_function_is_handed_the_clocks_of_stages(
    text: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "clocks_of_test.py").write_text(
        "import json, pathlib\n\ndef set_clocks(stages):\n"
        "    with (pathlib.Path(__file__).parent / 'set.jsonl').open('a') as file:\n"
        "        file.write(json.dumps(list(stages)) + '\\n')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    cluster = {"clocks": (1.0, 1.5, 2.0, 2.5), "clocks_hook": "clocks_of_test:set_clocks"}
    settings = staged(text, parallel={"layers": (2, 2)}, cluster=cluster)
    assert go(settings, tmp_path / "run", [Fault(3, 5, "updating weights")]) == JobEnded(0, "")
    check_same(tmp_path / "run", undisturbed)
    (told,) = [e["facts"] for e in events(tmp_path / "run", "cluster") if e["what"] == "clocks"]
    handed = [json.loads(line) for line in (tmp_path / "set.jsonl").read_text().splitlines()]
    assert [len(stage) for stage in changes(tmp_path / "run")[-1]["stages"]] == [2, 1]
    assert handed[0] == told["stages"]
    assert [one["members"] for one in handed[0]] == [[0, 1], [2]]
    assert handed[0][1]["clock"] > handed[0][0]["clock"] == 1.0
    assert told["seconds"]["after"] < told["seconds"]["before"]
    assert [[one["clock"] for one in stages] for stages in handed[1:]] == [[1.0, 1.0]]  # once the run is over


@pytest.mark.slow
def test_adapters_are_trained_while_stages_change_and_what_is_frozen_goes_along(text: Path, tmp_path: Path):
    """The head is the embedding here, both frozen: at both ends of the pipeline."""
    model = {
        "use": "resilin.adapt.adapted:Adapted",
        "model": {"hidden_size": 32, "layers": 4, "heads": 4, "kv_heads": 2, "mlp_size": 48, "tie_embeddings": True},
        "adapters": {"default": {"method": "lora", "rank": 4}},
    }
    one = settings_of(text, parallel={"workers": 0}, cluster={"elastic": False})
    tree = one.model_dump(mode="json", exclude_unset=True) | {"model": model}
    one = parse_settings(RunSettings, tree, "test")
    assert start_run(one, tmp_path / "one")[1].reason == "completed"
    tree |= {"parallel": {"workers": 3, "pipeline": 2, "timeout": 60}, "cluster": {"elastic": True}}
    settings = parse_settings(RunSettings, tree, "test")
    faults = [Fault(2, 5, "backward of stage 1 micro-batch 2")]  # the only one that has the last blocks
    assert go(settings, tmp_path / "run", faults) == JobEnded(0, "")
    check_same(tmp_path / "run", tmp_path / "one")
    assert [change["stages"] for change in changes(tmp_path / "run")][:2] == [[[0, 1], [2]], [[0], [1]]]
    assert equal(states(tmp_path / "run", STEPS)["frozen"], states(tmp_path / "one", STEPS)["frozen"])


@pytest.mark.parametrize(
    "faults",
    [
        [Fault(4, 3, "backward of stage 1 micro-batch 2"), Fault(0, 8, "backward of stage 0 micro-batch 2")],
        pytest.param([Fault(2, 4, "adding gradients up"), Fault(4, 4, "reading its states")], marks=pytest.mark.slow),
        pytest.param([Fault(1, 5, "updating weights"), Fault(3, 9, "forward of stage 1")], marks=pytest.mark.slow),
    ],
    ids=["passes", "recovery", "update"],
)
def test_tied_embeddings_are_trained_at_both_ends_and_the_bits_are_those_of_one_process(
    faults: list[Fault], text: Path, tmp_path: Path
):
    one = alone(text, tmp_path / "one", model=TIED)
    assert go(staged(text, 5, model=TIED), tmp_path / "run", faults) == JobEnded(0, "")
    check_same(tmp_path / "run", one)


@pytest.mark.slow
def test_fast_sums_of_tied_embeddings_are_those_of_one_process_to_rounding(text: Path, tmp_path: Path):
    one = alone(text, tmp_path / "one", model=TIED)
    settings = staged(text, 5, model=TIED, parallel={"reduction": "fast"})
    assert go(settings, tmp_path / "run", [Fault(4, 5, "adding gradients up")]) == JobEnded(0, "")
    found, expected = ([e["loss"] for e in events(at, "step")] for at in (tmp_path / "run", one))
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("model", [MODEL, TIED], ids=["untied", "tied"])
def test_a_checkpoint_of_stages_is_resumed_with_others(model: dict[str, Any], text: Path, tmp_path: Path):
    constant = {"schedule": {"use": "resilin.optim.schedule:Constant"}}
    one = alone(text, tmp_path / "one", model=model, optimizer=constant)
    half = staged(text, model=model, optimizer=constant, train={"steps": 8})
    assert go(half, tmp_path / "run", [Fault(1, 6, "adding gradients up")]) == JobEnded(0, "")
    whole = staged(text, workers=3, stages=3, model=model, optimizer=constant)
    assert go(whole, tmp_path / "run", resume=True, accept_changes=True) == JobEnded(0, "")
    assert equal(states(tmp_path / "run", STEPS)["model"], states(one, STEPS)["model"])


@pytest.mark.parametrize(
    ("over", "match"),
    [
        ({"parallel": {"schedule": "zb-h1"}}, "1f1b"),
        ({"parallel": {"layers": (1, 1, 2)}}, "wanted are 2 stages"),
        ({"parallel": {"context": 2}}, "other kinds"),
        ({"parallel": {"pipeline": 5, "workers": 5}}, "4 blocks cannot be divided over 5"),
        ({"parallel": {"pipeline": 5, "workers": 4}}, "4 workers cannot hold 5"),
    ],
)
def test_what_stages_cannot_do_while_they_change_is_refused(
    over: dict[str, Any], match: str, text: Path, tmp_path: Path
):
    with pytest.raises(ParallelError, match=match):
        go(staged(text, **over), tmp_path / "run")
