"""A transform passes on hooks, state and questions, and is invisible in a checkpoint where it has no state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from resilin.keys import Keys
from resilin.nouns import Batch, Loss, State, StepView
from resilin.transforms import ObjectiveTransform, SourceTransform, read_for


class Heard:
    """A source and an objective that remember what reached them."""

    vocab_size = 7

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.value = 0

    def slots(self, step: int) -> int:
        return 2

    def fetch(self, step: int, slots: Sequence[int]) -> Batch:
        return Batch(torch.tensor(list(slots)), {"tokens": torch.full((len(slots), 1), step)})

    def __call__(self, model: nn.Module, batch: Batch, keys: Keys | None) -> Loss:
        return Loss(batch["tokens"].sum().float(), torch.tensor(len(batch)))

    def before_step(self, view: StepView) -> None:
        self.calls.append("before")

    def after_step(self, view: StepView) -> None:
        self.calls.append("after")

    def state_dict(self) -> State:
        return {"value": self.value}

    def load_state_dict(self, state: State) -> None:
        self.value = state["value"]


class Counting(SourceTransform):
    """A transform with a state of its own."""

    count = 0

    def after_step(self, view: StepView) -> None:
        super().after_step(view)
        self.count += 1

    def own_state(self) -> State:
        return {"count": self.count}

    def load_own_state(self, state: State) -> None:
        self.count = state["count"]


VIEW: Any = None


def test_everything_reaches_what_is_wrapped() -> None:
    heard = Heard()
    source = SourceTransform(SourceTransform(heard))
    source.before_step(VIEW)
    source.after_step(VIEW)
    assert heard.calls == ["before", "after"]
    assert source.vocab_size == 7
    assert source.slots(0) == 2
    assert source.fetch(3, [0, 1])["tokens"].tolist() == [[3], [3]]
    assert not hasattr(source, "no_such_thing")
    batch = source.fetch(3, [0, 1])
    assert ObjectiveTransform(heard)(nn.Identity(), batch, None).sum.item() == 6


class Doubled(SourceTransform):
    """Shows other samples than the source behind."""

    def shown(self, step: int | None, batch: Batch) -> Batch:
        return Batch(batch.slots_B, {name: 2 * field for name, field in batch.fields.items()})


class Elsewhere(SourceTransform):
    """Fetches something of its own."""

    def fetch(self, step: int, slots: Sequence[int]) -> Batch:
        return self.inner.fetch(step + 1, slots)


class Numbered(Heard):
    """Ten samples by number, in any shape."""

    pool_parts = (10,)

    def read(self, samples: Sequence[int]) -> Batch:
        return Batch(torch.arange(len(samples)), {"tokens": torch.tensor([[number] for number in samples])})

    def resampled(self, grid: Any) -> Numbered:
        return self


def test_what_is_shown_is_shown_to_all_who_ask_and_nobody_goes_round_a_transform() -> None:
    twice = SourceTransform(Doubled(SourceTransform(Doubled(Numbered()))))
    assert twice.fetch(3, [1])["tokens"].tolist() == [[12]]
    assert twice.read([5, 2])["tokens"].tolist() == [[20], [8]]
    found = read_for(twice, 7, [4, 0], [5, 2])
    assert found["tokens"].tolist() == [[20], [8]]
    assert found.slots_B.tolist() == [4, 0]
    assert twice.pool_parts == (10,)
    assert SourceTransform(Numbered()).resampled(None) is not None
    for changed in (Doubled(Numbered()), SourceTransform(Doubled(Numbered())), Elsewhere(Numbered())):
        assert not hasattr(changed, "resampled")
    assert not hasattr(SourceTransform(Elsewhere(Numbered())), "pool_parts")


def test_without_state_a_transform_does_not_show_in_a_checkpoint() -> None:
    first, second = Heard(), Heard()
    first.value = 5
    SourceTransform(second).load_state_dict(first.state_dict())
    assert second.value == 5
    assert SourceTransform(first).state_dict() == first.state_dict()


def test_state_of_both_is_saved_and_taken_back() -> None:
    inner = Heard()
    inner.value = 4
    counting = Counting(SourceTransform(Counting(inner)))
    counting.after_step(VIEW)
    again = Counting(SourceTransform(Counting(Heard())))
    again.load_state_dict(counting.state_dict())
    assert (again.count, again.inner.inner.count, again.value) == (1, 1, 4)


def test_missing_and_superfluous_state_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="no state for Counting"):
        Counting(Heard()).load_state_dict(Heard().state_dict())
    with pytest.raises(ValueError, match="the state of Counting"):
        SourceTransform(Heard()).load_state_dict(Counting(Heard()).state_dict())


def test_a_transform_that_saves_what_it_cannot_take_back_is_refused_when_it_is_written() -> None:
    with pytest.raises(TypeError, match=r"OneWay saves state .own_state. and cannot take it back"):

        class OneWay(SourceTransform):
            def own_state(self) -> dict[str, int]:
                return {"count": 1}
