"""Runs whose workers are killed, stopped, added and let go, beside one process that nothing ever happened to."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from elastic_checks import changes, check_close, check_same, equal, events, states
from elastic_runs import STEPS, check_met, go, go_with_a_newcomer, settings_of

from resilin.checkpoint.errors import CheckpointError
from resilin.cluster.elastic_job import ElasticJob, JobEnded
from resilin.cluster.faults import Fault
from resilin.cluster.links import LinksCutError
from resilin.parallel.errors import ParallelError
from resilin.run.elastic_failure import is_own
from resilin.run.events import Cluster, Event, StepDone
from resilin.run.run import Run
from resilin.run.saving import Saving


@pytest.mark.parametrize(
    "faults",
    [
        [Fault(1, 3, "forward and backward of micro-batch 2"), Fault(0, 8, "adding gradients up")],
        pytest.param([Fault(2, 2, "updating weights"), Fault(1, 9, "copying its states")], marks=pytest.mark.slow),
        [Fault(0, 4, "evaluating"), Fault(2, 7, "saving")],
        [Fault(1, 4, "updating weights"), Fault(2, 4, "reading its states from copies")],  # while it recovers
        pytest.param(
            [Fault(0, 0, "forward and backward"), Fault(2, 13, "adding gradients up", "leave")], marks=pytest.mark.slow
        ),
    ],
    ids=["work", "update", "boundary", "recovery", "ends"],
)
def test_whatever_happens_the_bits_are_those_of_one_process(
    faults: list[Fault], text: Path, undisturbed: Path, tmp_path: Path
):
    together = faults[0].step == faults[1].step  # two neighbours on the ring, of three: then two copies are needed
    ended = go(settings_of(text, cluster={"copies": 1 + together}), tmp_path / "run", faults)
    assert ended == JobEnded(0, "")
    check_same(tmp_path / "run", undisturbed)
    happened = changes(tmp_path / "run")
    assert len(happened) >= 2
    assert all(change["redone"] <= 1 for change in happened)


def test_workers_come_and_go_in_a_run_and_others_take_the_place_of_those_that_are_lost(
    text: Path, undisturbed: Path, tmp_path: Path
):
    grown: list[int] = []

    def watch(job: ElasticJob, event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 1:
            job.add()
        if isinstance(event, Cluster) and event.what == "ready":
            job.signal(1, signal.SIGCONT)  # it stopped in step 2, so that the others have not ended by now
        if isinstance(event, Cluster) and event.what == "change":
            grown.append(len(event.facts["members"]))

    settings = settings_of(text, parallel={"workers": 2}, cluster={"replace": True, "silence": 60})
    stopped = Fault(1, 2, "adding gradients up", "stop")
    ended = go(settings, tmp_path / "run", [stopped, Fault(0, 6, "updating weights")], watch=watch)
    assert ended == JobEnded(0, "")
    check_same(tmp_path / "run", undisturbed)
    assert grown[:3] == [2, 3, 2]


@pytest.mark.parametrize("reduction", ["exact", "fast"])
def test_a_newcomer_has_read_its_states_when_the_others_have_computed_a_step(
    reduction: str, text: Path, undisturbed: Path, tmp_path: Path
):
    settings = settings_of(text, parallel={"workers": 2, "reduction": reduction}, cluster={"silence": 60})
    assert go_with_a_newcomer(settings, tmp_path / "run") == JobEnded(0, "")
    if reduction == "exact":
        check_same(tmp_path / "run", undisturbed)
    else:
        check_close(tmp_path / "run", undisturbed)
    first, joined = changes(tmp_path / "run")
    assert (first["members"], joined["members"]) == ([0, 1], [0, 1, 2])
    assert (joined["version"], joined["redone"], joined["kept"]) == (3, 0, 8), "nothing is computed twice"
    read = joined["bytes"]["2"]
    assert read["ahead"] > 10_000
    assert read["migrate"] == 0, "nobody has waited for it"


def test_fast_sums_are_those_of_one_process_to_rounding_and_all_have_equally_many_slots(
    text: Path, undisturbed: Path, tmp_path: Path
):
    settings = settings_of(text, parallel={"reduction": "fast"}, train={"micro_batch_size": 4})
    # Of two whole micro-batches the third worker would have none to be killed in.
    faults = [Fault(2, 3, "forward and backward"), Fault(0, 8, "adding gradients up")]
    assert go(settings, tmp_path / "run", faults) == JobEnded(0, "")
    assert [len(change["members"]) for change in changes(tmp_path / "run")] == [3, 2, 1]
    assert changes(tmp_path / "run")[-1]["kept"] > 0, "what the last one had computed, as it was cut for two"
    check_close(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_a_loss_in_the_evaluation_before_the_first_step_begins_the_run_again(
    text: Path, undisturbed: Path, tmp_path: Path
):
    settings = settings_of(text, evaluation={"at_start": True})
    assert go(settings, tmp_path / "run", [Fault(1, 0, "evaluating")]) == JobEnded(0, "")
    assert equal(states(tmp_path / "run", STEPS)["model"], states(undisturbed, STEPS)["model"])
    told = {event["step"]: event["metrics"] for event in events(tmp_path / "run", "eval")}
    assert list(told) == [0, *(event["step"] for event in events(undisturbed, "eval"))]
    assert [change["members"] for change in changes(tmp_path / "run")] == [[0, 1, 2], [0, 2]]


@pytest.mark.slow
def test_all_states_lost_is_said_and_the_last_checkpoint_goes_on(text: Path, undisturbed: Path, tmp_path: Path):
    at_once = [Fault(number, 6, "forward and backward") for number in (1, 2)]
    ended = go(settings_of(text), tmp_path / "run", at_once)
    if ended.code:  # whichever comes first; mostly member 1 and the copy of its states at member 2 are gone together
        assert "are lost with everyone who had a copy" in ended.message
        assert go(settings_of(text), tmp_path / "run", resume=True) == JobEnded(0, "")
    assert equal(states(tmp_path / "run", STEPS)["model"], states(undisturbed, STEPS)["model"])


def test_a_worker_whose_machine_will_be_taken_away_leaves(
    text: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Worker 1's machine says so once worker 0 has stopped, which goes on when worker 1 wants to leave."""
    (tmp_path / "spot_of_test.py").write_text(
        "import os, pathlib\n\ndef evicted():\n"
        "    return os.environ.get('RESILIN_MEMBER') == '1' and (pathlib.Path(__file__).parent / 'notice').exists()\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.syspath_prepend(tmp_path)

    def go_on(job: ElasticJob) -> None:
        """Worker 0 may have stopped by now, or not yet."""
        while job.signal(0, signal.SIGCONT):
            time.sleep(0.05)

    def watch(job: ElasticJob, event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 3:
            (tmp_path / "notice").touch()
        if isinstance(event, Cluster) and event.what == "leaving":
            threading.Thread(target=go_on, args=(job,), daemon=True).start()

    settings = settings_of(text, cluster={"notice": "spot_of_test:evicted", "notice_every": 0.05, "silence": 60})
    ended = go(settings, tmp_path / "run", [Fault(0, 5, "adding gradients up", "stop")], watch=watch)
    assert ended == JobEnded(0, "")
    check_same(tmp_path / "run", undisturbed)
    assert [change["members"] for change in changes(tmp_path / "run")] == [[0, 1, 2], [0, 2]]


def test_a_failure_of_the_program_is_told_with_its_trace(text: Path, tmp_path: Path):
    faults = [Fault(number, 3, "adding gradients up", "fail") for number in range(3)]
    ended = go(settings_of(text), tmp_path / "run", faults, all_happen=False)  # the second one ends the run
    assert ended.code == 1
    assert "a failure on purpose while adding gradients up in step 3" in ended.message
    assert "Traceback" in ended.message


def test_what_a_user_can_mend_is_told_without_a_trace(text: Path, tmp_path: Path):
    ended = go(settings_of(text, source={"held_out": {"by": "documents"}}), tmp_path / "run")
    assert ended.code == 1
    assert "no document can be held out; set held_out.by=tail" in ended.message
    assert "Traceback" not in ended.message


def test_a_listener_that_fails_ends_the_run_with_its_trace(text: Path, tmp_path: Path):
    def watch(job: ElasticJob, event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 2:
            raise OSError("no space left on the disk of the log")

    ended = go(settings_of(text, parallel={"workers": 2}), tmp_path / "run", watch=watch)
    assert ended.code == 1
    assert "the launcher failed: no space left on the disk of the log" in ended.message
    assert "Traceback" in ended.message


def test_a_fault_that_never_happens_is_found_out(text: Path, tmp_path: Path):
    faults = [Fault(0, 1, "adding gradients up", "leave"), Fault(1, 2, "forward and backward of micro-batch 9")]
    with pytest.raises(AssertionError, match=r"never happened.*micro-batch 9"):
        go(settings_of(text, parallel={"workers": 2}, train={"steps": 4}), tmp_path / "run", faults)
    check_met(tmp_path / "run", faults[:1])


@pytest.mark.parametrize(
    ("over", "match"),
    [
        ({"parallel": {"context": 3}}, "other kinds of parallelism need elastic = false"),
        ({"parallel": {"sharding": "fsdp"}}, "zero1"),
        ({"train": {"micro_batch_size": 0}}, "micro_batch_size"),
    ],
)
def test_what_cannot_change_while_it_runs_is_refused(over: dict[str, Any], match: str, text: Path, tmp_path: Path):
    with pytest.raises(ParallelError, match=match):
        go(settings_of(text, **over), tmp_path / "run")


def test_a_save_that_one_worker_has_to_begin_anew_is_begun_by_all():
    """Whether a save was finished when the workers changed may differ between them, and saving is done together."""
    run, saved, asked = object.__new__(Run), [], []

    class Others:
        """One of them asks for it."""

        def agreed(self, number: int) -> int:
            asked.append(number)
            return max(number, 500 if len(asked) == 1 else 0)

    class Quiet:
        def asks(self, number: int) -> int:
            return number

        def agreed(self, number: int) -> int:
            return number

    run.engine, run.elastic, run.saving = Others(), Quiet(), Saving(run)
    run.saving.begin = lambda: saved.append(True)
    assert run._agreed(2) == 2
    assert (saved, asked) == ([True], [2, 2])
    run.saving.again = True
    assert run._agreed(0) == 0
    assert (len(saved), asked[2:]) == (2, [500, 0])


def test_a_save_that_was_cut_off_with_its_links_is_no_failure_of_the_worker_sis_own():
    cut = CheckpointError("rank 0: the ranks that save this checkpoint lost each other")
    cut.__cause__ = LinksCutError("the links of epoch 0 were cut")
    assert not is_own(cut)
    assert is_own(CheckpointError("the disk is full"))


@pytest.mark.parametrize(
    ("second", "own"),
    [
        (torch.distributed.DistNetworkError("Broken pipe"), False),  # of a connection that ended with a second loss
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer"), False),
        (ValueError("a bug"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), True),
    ],
)
def test_what_fails_in_the_midst_of_a_change_is_told_by_itself(second: Exception, own: bool):
    second.__context__ = LinksCutError("the links of epoch 0 were cut")
    assert is_own(second) is own


def test_workers_share_the_cores_of_their_machine(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    cores = len(os.sched_getaffinity(0))
    settings = settings_of(text, train={"threads": 0, "steps": 2}, parallel={"workers": 2})
    assert go(settings, tmp_path / "run") == JobEnded(0, "")
    (start,) = events(tmp_path / "run", "start")
    assert start["device"].startswith(f"cpu, {max(1, cores // 2)} thread")
