"""Optimizer state lies like its parameter, or says how it lies, or is refused by name."""

from __future__ import annotations

import itertools
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_strategies import layouts
from ranks import as_ranks

from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.folder import CheckpointFolder
from resilin.checkpoint.load import load_part
from resilin.checkpoint.state_rules import Blocks, Reduced, Replicated, StateTensor, with_states
from resilin.layout import Holdings, Layout, Region, check, flat_range, rank
from resilin.layout.memory import gather, scatter

SHAPES = {"model/w": (6, 4), "model/b": (5,)}
STATES = {
    "optimizer/w/exp_avg": StateTensor("model/w", (6, 4), "F32"),
    "optimizer/w/step": StateTensor("model/w", (), "F32"),
    "optimizer/w/row": StateTensor("model/w", (6,), "F32"),
    "optimizer/w/column": StateTensor("model/w", (4,), "F32"),
    "optimizer/b/momentum": StateTensor("model/b", (5,), "F32"),
}
RULES = {"*/row": Reduced((-1,)), "*/column": Reduced((0,))}


def values() -> dict[str, np.ndarray]:
    g = np.random.default_rng(0)
    shapes = SHAPES | {name: state.shape for name, state in STATES.items()}
    return {name: g.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_any_layout_of_parameters_carries_its_states_through_a_checkpoint(data: Any) -> None:
    source = with_states(data.draw(layouts(SHAPES)), STATES, RULES)
    target = with_states(data.draw(layouts(SHAPES, places=3)), STATES, RULES)
    check(source)
    buffers = scatter(source, values(), np.nan)
    with TemporaryDirectory() as at:

        def work(c: Any) -> None:
            mine = buffers.get(rank(c.rank), {})
            # The buffers are given by name, and the tree follows from the layout.
            tree = {name: torch.from_numpy(array) for name, array in mine.items()}
            CheckpointFolder(Path(at), coordinator=c).save(1, {}, source, buffers=tree)

        as_ranks(5, work)
        path = CheckpointFolder(Path(at)).step_path(1)
        got = {}
        for place in target.places:
            tree, found = load_part(path, target, place).tree, {}
            for name in values():
                node: Any = tree
                for key in name.split("/"):
                    node = node[key]
                if node.numel():
                    found[name] = node.numpy().reshape(-1)
            got[place] = found
        for name, array in gather(target, got).items():
            np.testing.assert_array_equal(array, values()[name])


def by_flat_ranges(cuts: list[int], shape: tuple[int, ...]) -> Layout:
    held = [
        ("w", rank(number), region)
        for number, (low, high) in enumerate(itertools.pairwise(cuts))
        for region in flat_range(shape, low, high)
    ]
    return Layout.of({"w": (shape, "U8")}, held)


def test_blocks_follow_the_elements_they_scale() -> None:
    layout = with_states(
        by_flat_ranges([0, 256, 256, 512, 600], (6, 100)),
        {"o/absmax": StateTensor("w", (3,), "F32")},
        {"*/absmax": Blocks(256)},
    )
    held = {(h.place.name, str(h.region)) for h in layout if h.tensor == "o/absmax"}
    assert held == {("0", "[0:1]"), ("2", "[1:2]"), ("3", "[2:3]")}


@pytest.mark.parametrize(
    ("state", "rule", "words"),
    [
        (
            StateTensor("w", (6,), "F32"),
            None,
            r"state 'o/x' has shape \[6\] and its parameter 'w' \[6, 100\].*give a rule",
        ),
        (StateTensor("w", (100, 6), "F32"), None, r"has shape \[100, 6\]"),
        (StateTensor("v", (6, 100), "F32"), None, r"belongs to 'v', which is not in the layout"),
        (StateTensor("w", (3,), "F32"), Blocks(200), r"elements 0 to 256 at one place cut blocks of 200"),
        (StateTensor("w", (2,), "F32"), Blocks(200), r"600 elements in blocks of 200 have 3 numbers, not \[2\]"),
        (StateTensor("w", (100,), "F32"), Reduced((1,)), r"without dimensions \[1\] is not \[100\]"),
    ],
)
def test_what_does_not_follow_is_refused_by_name(state: StateTensor, rule: Any, words: str) -> None:
    layout = by_flat_ranges([0, 256, 600], (6, 100))
    with pytest.raises(CheckpointError, match=words):
        with_states(layout, {"o/x": state}, {"o/*": rule} if rule else None)


def test_a_preconditioner_may_be_replicated() -> None:
    layout = with_states(
        by_flat_ranges([0, 256, 600], (6, 100)), {"o/left": StateTensor("w", (6, 6), "F32")}, {"*/left": Replicated()}
    )
    assert {h.region for h in layout if h.tensor == "o/left"} == {Region.whole((6, 6))}


def test_states_of_a_flat_buffer_lie_in_flat_buffers_of_their_own(tmp_path: Path) -> None:
    # ZeRO-1: two parameters one after the other in a padded buffer that is cut in halves at element 8 of 16.
    def held(shape: tuple[int, ...], spans: list[tuple[int, int, int, int]]) -> Holdings:
        boxes = [(place, region, at) for place, low, high, at in spans for region in flat_range(shape, low, high)]
        made = Holdings.of(shape, "F32", [(place, region) for place, region, _ in boxes])
        starts, done = [], {}
        for place, region, at in boxes:
            starts.append(at + done.get((place, at), 0))
            done[place, at] = done.get((place, at), 0) + region.numel
        return Holdings(
            shape, "F32", made.places, made.boxes, np.array(starts), made.strides, np.zeros(len(boxes), np.int32)
        )

    tensors = {"m/a": held((5, 2), [(0, 0, 8, 0), (1, 8, 10, 0)]), "m/b": held((3,), [(1, 0, 3, 2)])}
    parameters = Layout((rank(0), rank(1)), tensors, ("flat",))
    states = {f"o/{n}/exp_avg": StateTensor(f"m/{n}", tensors[f"m/{n}"].shape, "F32") for n in "ab"}
    layout = with_states(parameters, states)
    assert layout.buffers == ("flat", "flat/exp_avg")
    padded = torch.tensor([*range(13), *[float("nan")] * 3])

    def work(c: Any) -> None:
        mine = padded[8 * c.rank :][:8]
        CheckpointFolder(tmp_path, coordinator=c).save(1, {}, layout, buffers={"flat": mine, "flat/exp_avg": mine * 2})

    as_ranks(2, work)
    state = CheckpointFolder(tmp_path).load(1)
    assert torch.equal(state["m"]["a"], torch.arange(10.0).reshape(5, 2))
    assert torch.equal(state["m"]["b"], torch.arange(10.0, 13.0))
    assert torch.equal(state["o"]["b"]["exp_avg"], 2 * torch.arange(10.0, 13.0))
    part = load_part(CheckpointFolder(tmp_path).step_path(1), layout, rank(1))
    assert torch.equal(part.buffers["flat"][:5], padded[8:13])
    assert part.tree["m"]["b"].untyped_storage().data_ptr() == part.buffers["flat"].untyped_storage().data_ptr()
