import multiprocessing
import os
import signal
import tempfile
from dataclasses import replace
from multiprocessing.connection import Connection

import pytest
import torch

from resilin.cluster.peer import Address, Peer, PeerServer
from resilin.cluster.pool import CopyError, Pool, copy_of
from resilin.memory.pages import _POPULATE, Handle, Pages, PagesError, Spares

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="this system has no such memory")


def _gives(port: int, pipe: Connection) -> None:
    """A member that gives three versions, each in the memory that its pool has, and then waits for its end."""
    torch.set_num_threads(1)
    pool, peer = Pool(1), Peer(Address("127.0.0.1", port), "s", 10)
    for version in range(3):
        made = copy_of(1, 0, version, [("w", "weights", torch.full((100_000,), float(version)))], {"of": 1}, pool)
        pool.put(made)
        peer.put(made)
    pipe.send(pool.versions())
    signal.pause()


def test_what_a_killed_process_has_shared_is_still_there():
    pool = Pool(2)
    server = PeerServer(pool, "s")
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_gives, args=(server.address.port, there))
    process.start()
    try:
        assert here.recv() == pool.versions() == {(1, 0): [1, 2]}
        for version in (1, 2):
            handle = pool.get(1, 0, version).pages.handle
            assert handle is not None
            assert handle.process == process.pid, "nothing was sent"
        process.kill()
        process.join()
        reader = Peer(server.address, "s", 10)
        for version in (1, 2):
            (slot,) = pool.get(1, 0, version).slots
            assert reader.head(1, 0, version)["rest"] == {"of": 1}
            (piece,) = reader.get(1, 0, version, [(slot.start, slot.bytes)])
            assert piece.view(torch.float32).eq(version).all()
    finally:
        process.kill()
        server.close()


def test_pages_of_another_are_never_filled_anew():
    mine, theirs = Pool(1), Pool(2)
    server = PeerServer(theirs, "s")
    try:
        peer = Peer(server.address, "s", 10)
        for version in range(4):
            made = copy_of(1, 0, version, [("w", "weights", torch.full((64,), float(version)))], None, mine)
            mine.put(made)
            peer.put(made)
        fresh = theirs.memory(256)
        fresh.data.fill_(255)
        for pool in (mine, theirs):
            for version in (2, 3):
                kept = pool.get(1, 0, version)
                kept.check()
                assert kept.tensor(kept.slots[0]).eq(version).all()
        again = mine.memory(256).handle
        assert again is not None
        assert again not in [mine.get(1, 0, version).pages.handle for version in (2, 3)]
    finally:
        server.close()


def test_shared_pages_that_were_damaged_are_found_when_they_are_read():
    pool = Pool(2)
    server = PeerServer(pool, "s")
    try:
        peer = Peer(server.address, "s", 10)
        made = copy_of(1, 0, 3, [("w", "weights", torch.ones(64))], None)
        peer.put(made)
        made.data[5] ^= 1
        with pytest.raises(CopyError, match="member 1's states of version 3 is damaged"):
            peer.head(1, 0, 3)
    finally:
        server.close()


def test_what_cannot_be_mapped_is_sent(capsys: pytest.CaptureFixture[str]):
    pool = Pool(2)
    server = PeerServer(pool, "s")
    try:
        peer = Peer(server.address, "s", 10)
        for version in (3, 4):
            made = copy_of(1, 0, version, [("w", "weights", torch.ones(64))], None)
            assert made.pages.handle is not None
            elsewhere = replace(made.pages.handle, process=2**22 + 1)  # as another machine's numbers are: nobody's here
            peer.put(replace(made, pages=Pages(made.data, elsewhere)))
            kept = pool.get(1, 0, version)
            assert kept.pages.own
            assert kept.head() == made.head()
        assert capsys.readouterr().err.count("are sent from now on") == 1, "which is said once"
    finally:
        server.close()


def test_nothing_but_the_copy_that_was_meant_is_opened():
    pages, other = Pages.of(64), Pages.of(64)
    handle, second = pages.handle, other.handle
    assert handle is not None
    assert second is not None
    same = Pages.mapped(handle)
    same.data[3] = 7
    assert pages.data[3] == 7
    with pytest.raises(PagesError, match="another copy than the one that was meant"):
        Pages.mapped(replace(handle, descriptor=second.descriptor))
    with tempfile.TemporaryFile() as file:
        file.write(b"x" * 64)
        file.flush()
        facts = os.fstat(file.fileno())
        with pytest.raises(PagesError, match="and no copy"):
            Pages.mapped(Handle(os.getpid(), file.fileno(), facts.st_dev, facts.st_ino, 64))
    cut = os.memfd_create("resilin-copy", os.MFD_CLOEXEC)
    try:
        os.ftruncate(cut, 64)
        facts = os.fstat(cut)
        with pytest.raises(PagesError, match="could be cut off"):
            Pages.mapped(Handle(os.getpid(), cut, facts.st_dev, facts.st_ino, 64))
    finally:
        os.close(cut)
    del pages
    with pytest.raises(PagesError, match="cannot be opened"):
        Pages.mapped(handle)
    assert same.data[3] == 7
    for told in (None, [1, 2, 3], [1, 2, 3, 4, -5], [1, 2, 3, 4, "5"], [True, 2, 3, 4, 5]):
        with pytest.raises(PagesError, match="no handle of pages"):
            Handle.of_json(told)


def test_pages_that_are_made_ready_hold_what_they_held():
    pages = Pages.of(1 << 20)
    assert pages.handle is not None
    pages.data[5] = 7
    before = os.fstat(pages.handle.descriptor).st_blocks
    try:
        pages._mapping.madvise(_POPULATE, 0, 1)
    except OSError:
        pytest.skip("this system cannot be told to")
    pages.touch(1 << 19)
    assert os.fstat(pages.handle.descriptor).st_blocks - before >= ((1 << 19) - (1 << 16)) // 512
    assert pages.data[:10].tolist() == [0] * 5 + [7] + [0] * 4
    Pages(torch.zeros(3)).touch(3)  # memory of another kind stays as it is


def test_spare_pages_are_used_again_the_smallest_that_do():
    spares = Spares(most=2)
    small, large, other = spares.take(100), spares.take(1000), spares.take(400)
    assert [len(one.data) for one in (small, large, other)] == [
        256,
        2048,
        896,
    ]  # with room for more, and for every format
    for one in (large, small, other):
        spares.give(one)
    assert spares.take(100) is other  # the smallest of the largest two
    assert spares.take(900) is large
    assert len(spares.take(10).data) == 128
    theirs = Pages.mapped(large.handle)  # type: ignore[arg-type]
    spares.give(theirs)  # another's are not to be filled anew
    assert spares.take(2000) is not theirs


def test_pages_that_nobody_else_may_map_are_used_again_too():
    spares = Spares(most=1, shown=False)
    pages = spares.take(1 << 20)
    assert pages.handle is None
    pages.data[3] = 5
    pages.touch(1 << 20)
    assert pages.data[3] == 5
    spares.give(pages)
    assert spares.take(100) is pages
