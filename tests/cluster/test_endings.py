"""Which of several failures is told, and with which exit code."""

from __future__ import annotations

import itertools

import pytest

from resilin.cluster.endings import End, Ended, Failed, how_it_ended

GOOD = End(0, "data 0", 0, 9.0, False, None, "above")


def end(rank: int, code: int, at: float = 9.0, failed: Failed | None = None, *, stopped: bool = False) -> End:
    return End(rank, f"data {rank}", code, at, stopped, failed, f"worker-{rank}.log")


BUG = end(1, 1, 5.0, Failed(5.0, "reason", "Traceback ...\nKeyError: 'row'", 1))
MISTAKE = end(1, 2, 5.0, Failed(5.0, "reason", "lr is wrong", 2))
LOST = end(2, 1, 4.0, Failed(4.0, "lost", "worker 2 lost a connection", 1))
WAITED = end(3, 1, 8.0, Failed(8.0, "timeout", "worker 3 waited", 1))
KILLED = end(4, -9, 3.0)


def test_nothing_is_told_of_a_job_that_went_well():
    assert how_it_ended([GOOD, end(1, 0)]) == Ended(0)


@pytest.mark.parametrize("order", list(itertools.permutations([BUG, LOST, WAITED])))
def test_a_reason_is_told_though_what_followed_was_reported_earlier(order: tuple[End, ...]):
    ends = [GOOD, *sorted(order, key=lambda one: one.rank)]
    ended = how_it_ended(ends)
    assert ended.code == 1
    assert ended.message.startswith("worker 1 (data 1) failed:\nTraceback")
    assert "lost a connection" not in ended.message


def test_what_a_user_can_mend_ends_with_2():
    assert how_it_ended([GOOD, MISTAKE]) == Ended(2, "worker 1 (data 1) failed:\nlr is wrong")


def test_what_all_say_alike_is_no_single_worker_s():
    ends = [end(rank, 2, 5.0, Failed(5.0 - rank, "reason", "lr is wrong", 2)) for rank in range(3)]
    assert how_it_ended(ends) == Ended(2, "lr is wrong")


def test_who_waited_in_vain_tells_more_than_who_lost_a_connection():
    ends = [GOOD, end(1, -9, stopped=True), LOST, WAITED]
    assert how_it_ended(ends).message == "worker 3 waited\n(1 of 4 workers had to be stopped)"


def test_a_killed_worker_is_named_with_its_log():
    ended = how_it_ended([GOOD, end(1, 0), LOST, WAITED, KILLED])
    assert ended.code == 1
    assert ended.message.startswith("worker 4 (data 4) was killed (SIGKILL, as the system does when memory runs out)")
    assert "worker-4.log" in ended.message


def test_an_error_after_a_worker_was_killed_is_not_the_reason_and_one_before_is():
    assert "was killed" in how_it_ended([GOOD, BUG, LOST, WAITED, KILLED]).message
    early = end(1, 1, 5.0, Failed(1.0, "reason", "boom", 1))
    assert "boom" in how_it_ended([GOOD, early, LOST, WAITED, KILLED]).message


def test_a_worker_that_the_launcher_stopped_was_not_killed_by_the_system():
    assert "was killed" not in how_it_ended([GOOD, BUG, end(2, -9, stopped=True)]).message


@pytest.mark.parametrize("code", [130, 3])
def test_all_ending_alike_have_told_why(code: int):
    assert how_it_ended([end(0, code), end(1, code)]) == Ended(code)


def test_a_second_interrupt_ends_with_130_whatever_else_happened():
    assert how_it_ended([end(0, -9), end(1, -9)], interrupts=2).code == 130
    assert how_it_ended([end(0, -15), end(1, 130)], interrupts=1) == Ended(130)
