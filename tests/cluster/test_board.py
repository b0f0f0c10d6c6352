"""What is told of workers that hang: who waits for whom, and who is to blame."""

from __future__ import annotations

import sys
import threading
from dataclasses import replace
from datetime import timedelta

import pytest
import torch.distributed as dist

from resilin.cluster.board import Board, Status, explain, table
from resilin.cluster.failure import StrandedError, kind_of
from resilin.cluster.watch import line_of
from resilin.parallel import activity


def waits(rank: int, *others: int) -> Status:
    return Status(rank, f"data {rank}", 7, "exchanging gradients", others, 61.0, "exchange.py:45 wait", 100.0)


HANGS = Status(2, "data 2", 7, "reading its slots", (), 62.0, "mine.py:3 fetch", 100.0)
HANGS_AT_1 = replace(HANGS, rank=1)


def test_the_worker_that_waits_for_none_is_named_first():
    text = explain([waits(0, 0, 1, 2), waits(1, 2), HANGS], 0, now=101)
    first, *_ = text.splitlines()
    assert first == (
        "worker 2 (data 2) waits for none, and 2 wait for it: it has been reading its slots of step 7 for 62 s, at "
        "mine.py:3 fetch"
    )
    assert [line.split()[0] for line in text.splitlines()[2:]] == ["worker", "0", "1", "2"]


def test_a_failure_explains_everything():
    failed = Status(1, "data 1", 3, failed="KeyError: 'row'", told=100.0)
    assert explain([waits(0, 1), failed, HANGS], 0, now=101) == "worker 1 (data 1) failed: KeyError: 'row'"


def test_a_worker_that_says_nothing_any_more_is_named():
    assert "worker 1 (data 1) has not been heard of for 40 s" in explain([waits(0, 1), waits(1, 0)], 0, now=140)


def test_a_circle_of_waiting_is_called_one():
    assert explain([waits(0, 1), waits(1, 0)], 0, now=101).startswith("all workers wait for each other")


def test_of_very_many_workers_those_that_wait_for_none_are_in_the_table():
    many = [waits(rank, 100) for rank in range(1000)]
    many[900] = Status(900, doing="sleeping", told=100.0)
    lines = table(many)
    assert len(lines) < 40
    assert any(line.split()[0] == "900" for line in lines)
    assert lines[-1] == "  and 968 more that wait"


def test_what_was_put_up_is_read_by_others():
    host = dist.TCPStore("127.0.0.1", 0, 1, True, timedelta(seconds=20))
    other = dist.TCPStore("127.0.0.1", host.port, None, False, timedelta(seconds=20))
    mine, theirs = Board(host, 0, 3), Board(other, 1, 3)
    mine.say(waits(0, 1, 2))
    theirs.say(HANGS_AT_1)
    assert theirs.read() == [waits(0, 1, 2), HANGS_AT_1, Status(2)]  # the last has said nothing yet


def test_an_activity_is_restored_after_a_wait_and_kept_after_an_error():
    activity.doing("forward of stage", 1)
    with activity.waiting((3,)):
        assert activity.now.activity.waits_for == (3,)
        assert str(activity.now.activity) == "forward of stage 1"
    assert activity.now.activity.waits_for == ()
    with pytest.raises(RuntimeError), activity.waiting((4,), "adding up"):
        raise RuntimeError
    assert (str(activity.now.activity), activity.now.activity.waits_for) == ("adding up", (4,))
    activity.doing("nothing")


def test_what_an_error_came_from_decides_what_it_is():
    lost = RuntimeError("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:23")
    late = RuntimeError("[/gloo/transport/tcp/unbound_buffer.cc:156] Timed out waiting 8000ms for recv")
    assert (kind_of(lost), kind_of(late)) == ("lost", "timeout")
    assert kind_of(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) == "reason"
    assert kind_of(_from(ValueError("a checkpoint is not whole"), lost)) == "lost"
    assert kind_of(_from(lost, KeyError("row"))) == "reason"  # closing connections failed after the row was broken
    assert kind_of(StrandedError("timeout", "...")) == "timeout"


def _from(error: Exception, cause: Exception) -> Exception:
    try:
        raise error from cause
    except Exception as made:
        return made


def test_the_line_of_a_thread_is_the_innermost_one_of_no_library():
    event, ready = threading.Event(), threading.Event()

    def sleeps() -> None:
        ready.set()
        event.wait(20)

    thread = threading.Thread(target=sleeps)
    thread.start()
    ready.wait(20)
    try:
        assert line_of(sys._current_frames()[thread.ident]).startswith("test_board.py:")
    finally:
        event.set()
        thread.join()
