"""Groups of one epoch, and how they are cut."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forked import run_ranks

from resilin.cluster import store_connections
from resilin.cluster.links import Links, LinksCutError, _Waiter
from resilin.cluster.store_connections import StoreConnections
from resilin.parallel.exchange import add_up, share, swap
from resilin.parallel.messages import tell_all
from resilin.run.elastic_failure import is_own


def store_at(port: int) -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", port, None, False, timedelta(seconds=30))


def waits_for_survivor(rank: int, port: int) -> tuple[float, float, list[int]]:
    store = store_at(port)
    stores = StoreConnections(store)
    links = Links(stores, 0, rank, 60)
    group = links.group("everyone", range(3))
    assert add_up(torch.ones(1), group).item() == 3
    if rank == 2:
        time.sleep(0.3)
        links.cut()  # as if it had ended
        return 0.0, 0.0, []
    if rank == 1:  # told by the launcher, while it waits for one that is alive and waits as well
        threading.Timer(0.6, links.cut).start()
    began = time.monotonic()
    with pytest.raises(RuntimeError):
        dist.irecv(torch.zeros(1), group=group.process_group, group_src=1 - rank).wait()
    came_out = time.monotonic() - began
    links.cut()
    with pytest.raises(LinksCutError):
        links.group("more", range(3))
    began = time.monotonic()
    group = Links(stores, 1, rank, 60).group("everyone", range(2))
    told = tell_all(rank, group)
    return came_out, time.monotonic() - began, told


@pytest.fixture
def port():
    store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=30), wait_for_workers=False)
    yield store.port
    del store


def test_whoever_waits_in_a_group_comes_out_when_it_is_cut_and_a_new_one_works(port: int):
    results = run_ranks(3, waits_for_survivor, port, connect=False)
    assert [told for _, _, told in results] == [[0, 1], [0, 1], []]
    assert all(came_out < 20 for came_out, _, _ in results)  # and not after the time-out of 60 s


def never_comes(rank: int, port: int) -> float:
    links = Links(StoreConnections(store_at(port)), 0, rank, 60)
    if rank == 1:
        return 0.0
    threading.Timer(0.3, links.cut).start()
    began = time.monotonic()
    with pytest.raises(RuntimeError):
        links.group("everyone", range(2))
    return time.monotonic() - began


def test_whoever_waits_for_a_group_to_be_made_comes_out_too(port: int):
    assert run_ranks(2, never_comes, port, connect=False)[0] < 20


def test_a_group_in_the_making_is_left_behind_when_the_links_are_cut():
    """Where the other should have called and is gone, there is no socket to be ended: gloo waits until the timeout."""
    links = Links(StoreConnections(dist.TCPStore("127.0.0.1", 0, is_master=True)), 0, 0, 60.0)
    assert links._aside(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        links._aside(lambda: 1 // 0)
    lost = Lost()
    threading.Timer(0.2, links.cut).start()
    with pytest.raises(LinksCutError):
        links._aside(lost.wait)
    assert not lost.ends.is_set()
    lost.ends.set()
    with pytest.raises(LinksCutError):  # whatever else came of that
        links._aside(lambda: 1 // 0)


def patterns(rank: int, port: int) -> bool:
    group = Links(StoreConnections(store_at(port)), 0, rank, 60).group("everyone", range(3))
    parts = [torch.full((2,), float(r)) if r == rank else torch.zeros(2) for r in range(3)]
    share(parts, group)()
    received = torch.zeros(3)
    swap(received, torch.arange(3.0) + 10 * rank, [1] * 3, [1] * 3, group)()
    assert group.backend == "gloo"
    return [p[0].item() for p in parts] == [0, 1, 2] and received.tolist() == [rank, 10 + rank, 20 + rank]


def test_the_exchanges_of_an_engine_work_in_such_groups(port: int):
    assert run_ranks(3, patterns, port, connect=False) == [True] * 3


def waits_near(rank: int, port: int) -> tuple[bool, bool]:
    links = Links(StoreConnections(store_at(port)), 0, rank, 60)
    group = links.group("everyone", range(2))
    assert group.near is not None
    assert links.group("by messages", range(2), near=False).near is None
    if rank == 0:
        store_at(port).get("over")
        return True, False
    threading.Timer(0.3, links.cut).start()
    began = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        add_up(torch.ones(1), group)
    took = time.monotonic() - began
    store_at(port).set("over", "")
    return took < 20, is_own(caught.value)


def test_whoever_waits_for_memory_to_be_filled_comes_out_when_the_links_are_cut(port: int):
    assert run_ranks(2, waits_near, port, connect=False) == [(True, False)] * 2


class Lost:
    """What gloo has lost sight of: nobody says that it is over."""

    def __init__(self) -> None:
        self.ends, self.begun = threading.Event(), threading.Event()

    def is_completed(self) -> bool:
        return self.ends.is_set()

    def wait(self, timeout: timedelta | None = None) -> None:
        self.begun.set()
        if not self.ends.wait(None if timeout is None else timeout.total_seconds()):
            raise RuntimeError("Operation timed out!")


class Fails:
    """What has failed."""

    def is_completed(self) -> bool:
        return True

    def wait(self) -> None:
        raise RuntimeError("connection closed")


def links_of_one() -> Links:
    return Links(StoreConnections(dist.TCPStore("127.0.0.1", 0, is_master=True)), 0, 0, 60.0)


def for_messages(links: Links) -> Callable[[Any], object]:
    return _Waiter(links).wait


def for_collectives(links: Links) -> Callable[[Any], object]:
    return links.wait


@pytest.mark.parametrize("kind", [for_messages, for_collectives])
def test_whoever_waits_for_what_gloo_has_lost_comes_out_when_the_links_are_cut(kind: Any):
    links, lost, said = links_of_one(), Lost(), []
    waits = kind(links)

    def wait() -> None:
        try:
            waits(lost)
        except LinksCutError as error:
            said.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    assert lost.begun.wait(20)
    links.cut()
    thread.join(20)
    assert said == ["the links of epoch 0 were cut"]
    with pytest.raises(LinksCutError):
        waits(lost)
    lost.ends.set()


@pytest.mark.parametrize("kind", [for_messages, for_collectives])
def test_what_a_work_raises_is_raised_to_whoever_waits(kind: Any):
    links = links_of_one()
    with pytest.raises(RuntimeError, match="connection closed"):
        kind(links)(Fails())
    links.cut()
    with pytest.raises(LinksCutError):
        kind(links)(Fails())


def test_whoever_waits_longer_than_a_look_waits_on():
    links, late = links_of_one(), Lost()
    threading.Timer(0.35, late.ends.set).start()
    links.wait(late)
    assert late.is_completed()
    links.cut()


def test_a_connection_to_the_store_is_ready_before_it_is_needed_and_is_cut_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store_connections, "_LATER", 0.01)
    store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=30), wait_for_workers=False)
    stores = StoreConnections(store)
    first = Links(stores, 0, 0, 60.0)
    until = time.monotonic() + 200
    while not stores.is_ready:
        assert time.monotonic() < until
        time.sleep(0.01)
    ready = stores._ready
    first.cut()
    with pytest.raises(RuntimeError):
        first._store.get("anything")
    second = Links(stores, 1, 0, 60.0)
    assert second._store is ready[0]
    assert len(ready[1]) == 1
    second._store.set("key", "value")
    assert store.get("key") == b"value"
    stores.close()
    assert not stores.is_ready


def drops(rank: int, port: int) -> list[str]:
    store = store_at(port)
    links = Links(StoreConnections(store), 0, rank, 4)
    group = links.group("everyone", range(2))
    if rank == 1:
        store.get("over")
        return []
    work = dist.all_reduce(torch.ones(1), group=group.process_group, async_op=True)  # the other one never takes part
    ended: list[str] = []

    def waits() -> None:
        with suppress(RuntimeError):
            work.wait()
        ended.append("timed out")

    waiting = threading.Thread(target=waits)
    waiting.start()
    links._sockets.clear()  # a message that is lost sight of notices no end of a connection
    links.cut()
    del links, group
    gc.collect()
    ended.append("dropped")
    waiting.join()
    store.set("over", "")
    return ended


def test_who_drops_a_group_in_which_a_message_was_lost_sight_of_does_not_wait_for_it(port: int):
    assert run_ranks(2, drops, port, connect=False)[0] == ["dropped", "timed out"]
