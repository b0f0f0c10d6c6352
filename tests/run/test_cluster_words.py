"""Lines about workers that come and go."""

from __future__ import annotations

import io

from rich.console import Console

from resilin.run.cluster_words import in_words
from resilin.run.events import Cluster
from resilin.run.live_view import LiveView

CHANGE = {
    "epoch": 1, "why": "member 2 was killed by SIGKILL", "members": [0, 1, 3], "version": 41, "redone": 0, "kept": 6,
    "shards_moved": 16, "halting": 0.02, "adopting": 0.1, "stages": [[0, 1, 3]], "layers": [],
}  # fmt: skip


def test_a_change_is_told_with_what_it_took():
    line = in_words(Cluster(what="change", facts=CHANGE))
    assert line == "3 workers (0, 1, 3) go on after 41 steps, 0.12 s later; 6 micro-batches were kept"
    assert "1 of them anew" in in_words(Cluster(what="change", facts=CHANGE | {"redone": 1}))
    assert in_words(Cluster(what="change", facts=CHANGE | {"epoch": 0})) == ""
    staged = in_words(Cluster(what="change", facts=CHANGE | {"stages": [[0, 1], [3]], "layers": [0, 4, 6]}))
    assert staged.startswith("3 workers (0, 1, 3) in stages of 2 + 1 with blocks 0:4, 4:6 go on after 41 steps")


def test_losses_leaves_and_the_digest_are_told():
    lost = Cluster(what="lost", facts={"member": 2, "why": "was killed by SIGKILL"})
    assert in_words(lost) == "worker 2 was killed by SIGKILL"
    assert in_words(Cluster(what="leaving", facts={"member": 2})) == "worker 2 wants to leave"
    assert in_words(Cluster(what="digest", facts={"weights": "ab"})) == "digest of the weights: ab"
    out = io.StringIO()
    LiveView(Console(file=out, width=100))(lost)
    assert out.getvalue() == "worker 2 was killed by SIGKILL\n"
