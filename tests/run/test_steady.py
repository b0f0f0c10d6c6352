"""A run computes the next gradient while its state is copied, and nobody can tell from what is saved."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from resilin.checkpoint.background import BackgroundSaves
from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.late_copies import LateCopies
from resilin.nouns import Loss, StepView, keeps_weights
from resilin.run.events import Failure, Staged
from resilin.run.steady import steady_tensors
from resilin.transforms import ObjectiveTransform, OptimizerTransform, SourceTransform, may_change_weights

WIDTH = 160  # its matrices are large enough to be copied late


@pytest.fixture(autouse=True)
def as_late_as_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is copied before somebody asks for it to be finished."""
    finish, complete = LateCopies.finish, LateCopies.complete

    def event(copies: LateCopies) -> threading.Event:
        found: threading.Event = copies.__dict__.setdefault("asked", threading.Event())
        return found

    monkeypatch.setattr(LateCopies, "finish", lambda self: (finish(self), event(self).set()))
    monkeypatch.setattr(LateCopies, "complete", lambda self: (event(self).wait(20), complete(self)))


class Statistics(nn.Module):
    """A module whose forward pass moves a buffer, as batch norm does, of a size that would be copied late."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("seen", torch.zeros(40_000))

    def forward(self, *given: Any, **more: Any) -> Any:
        if self.training:
            self.seen += 1
        return self.inner(*given, **more)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


class Shaking(SourceTransform):
    """Changes weights before a step, and does not say that it would not."""

    def __init__(self, inner: Any, model: nn.Module, every: int) -> None:
        super().__init__(inner)
        self.weight, self.every = next(p for p in model.parameters() if p.numel() > 20_000), every

    def before_step(self, view: StepView) -> None:
        super().before_step(view)
        if view.step % self.every == 0:
            self.weight.data.mul_(0.99)


class Lying(Shaking):
    """Says that it changes nothing."""

    @keeps_weights
    def before_step(self, view: StepView) -> None:
        super().before_step(view)


class Slow(OptimizerTransform):
    """Slow weights, which are state of the optimizer."""

    def __init__(self, inner: Any, model: nn.Module) -> None:
        super().__init__(inner)
        self.fast = dict(model.named_parameters())
        self.slow = {name: p.detach().clone() for name, p in self.fast.items()}

    @torch.no_grad()
    def step(self, step: int) -> Any:
        logs = self.inner.step(step)
        for name, slow in self.slow.items():
            slow.lerp_(self.fast[name], 0.1)
        return logs

    def own_state(self) -> Any:
        return dict(self.slow)

    def load_own_state(self, state: Any) -> None:
        for name, tensor in self.slow.items():
            tensor.copy_(state[name])


class Counting(ObjectiveTransform):
    """State that changes with every forward pass."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.calls = torch.zeros(40_000)

    def __call__(self, model: nn.Module, batch: Any, keys: Any) -> Loss:
        self.calls += 1
        return super().__call__(model, batch, keys)

    def own_state(self) -> Any:
        return {"calls": self.calls}

    def load_own_state(self, state: Any) -> None:
        self.calls.copy_(state["calls"])


def build(tiny_run: Any, counting: Any, folder: Path, background: bool, **pace: int) -> Any:
    from resilin.models.decoder_settings import DecoderSettings
    from resilin.models.settings import ModelContext
    from resilin.optim.adamw import AdamW

    run = tiny_run(folder, pace={"steps": 6, "micro_batch_size": 4, "save_every": 1} | pace)
    decoder = DecoderSettings(vocab_size=32, hidden_size=WIDTH, layers=1, heads=2, mlp_size=WIDTH)
    run.model = Statistics(decoder.build(ModelContext(0, None)))
    run.optimizer = Slow(AdamW(lr=1e-2).build(run.model, run.pace.steps), run.model)
    run.objective = Counting(run.objective)
    run.validation = {"validation": counting(seed=1, length=1)}
    run.checkpoints.keep_last = 0
    run.saves = BackgroundSaves(run.checkpoints) if background else None
    return run


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shake=st.integers(0, 3), save_every=st.integers(1, 3), evaluate_every=st.integers(0, 2), order=st.booleans())
def test_what_a_run_saves_in_the_background_is_what_it_saves_when_it_waits(
    tiny_run: Any,
    counting: Any,
    digest: Any,
    tmp_path_factory: pytest.TempPathFactory,
    shake: int,
    save_every: int,
    evaluate_every: int,
    order: bool,
) -> None:
    found = []
    for background in (False, True):
        pace = {"save_every": save_every, "evaluate_every": evaluate_every}
        run = build(tiny_run, counting, tmp_path_factory.mktemp("run"), background, **pace)
        if shake:  # otherwise nothing makes it wait before the optimizer's step
            shaking = Shaking(run.source, run.model, shake)
            run.source = SourceTransform(shaking) if order else shaking
        assert run.train().reason == "completed"
        steps = run.checkpoints.steps()
        found.append({step: digest(run.checkpoints.load(step)) for step in steps} | {-1: digest(run.state_dict())})
    assert found[0] == found[1]
    assert len(found[0]) > 2


def test_a_part_that_changes_weights_and_says_it_does_not_is_found_out(
    tiny_run: Any, counting: Any, tmp_path: Path
) -> None:
    run = build(tiny_run, counting, tmp_path, background=True, save_every=3)
    run.source = Lying(run.source, run.model, every=3)
    told: list[Any] = []
    run.listeners = (told.append,)
    with pytest.raises(CheckpointError, match=r"tensor 'model/.*' was changed while it was being saved.*keeps_weights"):
        run.train()
    (failure,) = [event for event in told if isinstance(event, Failure)]
    assert (failure.kind, failure.step > 3) == ("save", True)  # at whichever step the copying is done
    assert run.checkpoints.steps() == []


def test_a_save_that_is_asked_for_by_hand_is_copied_when_it_returns(
    tiny_run: Any, counting: Any, digest: Any, tmp_path: Path
) -> None:
    run = build(tiny_run, counting, tmp_path, background=True)
    told: list[Any] = []
    run.listeners = (told.append,)
    before = digest(run.state_dict())
    run.save()
    assert [event.step for event in told if isinstance(event, Staged)] == [0]
    for parameter in run.model.parameters():
        parameter.data.zero_()
    run.saving.wait()
    assert digest(run.checkpoints.load(0)) == before


def test_an_older_state_may_be_loaded_while_a_newer_one_is_saved(
    tiny_run: Any, counting: Any, digest: Any, tmp_path: Path
) -> None:
    run = build(tiny_run, counting, tmp_path, background=True)
    run.save()
    run.saving.wait()
    for parameter in run.model.parameters():
        parameter.data.add_(1)
    newer = digest(run.state_dict() | {"run": None})
    run.step = 1
    run.saving.begin()
    run.load_state_dict(run.checkpoints.load(0))
    run.saving.wait()
    assert digest(run.checkpoints.load(1) | {"run": None}) == newer


def test_what_a_forward_pass_may_write_is_not_steady() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            flat = torch.zeros(6)
            self.shared = nn.Parameter(flat[:3])
            self.register_buffer("beside", flat[3:])
            self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
            self.tied = nn.Parameter(self.frozen.data)
            self.weight = nn.Parameter(torch.zeros(3))

    model, mean = Odd(), torch.zeros(3)
    found = steady_tensors(model, {"parameters": {"weight": [{"mean": mean, "lr": 0.1}]}})
    assert [id(tensor) for tensor in found] == [id(model.weight), id(mean)]


def test_only_a_hook_that_is_marked_itself_is_trusted(counting: Any) -> None:
    class Marked(SourceTransform):
        @keeps_weights
        def before_step(self, view: StepView) -> None:
            super().before_step(view)

    class Again(Marked):
        def before_step(self, view: StepView) -> None:
            super().before_step(view)

    class Plain:
        def before_step(self, view: StepView) -> None: ...

    source, listening = counting(), Plain()
    assert not may_change_weights(source)
    assert may_change_weights(listening)
    for trusted in (SourceTransform(source), Marked(source), Marked(SourceTransform(source))):
        assert not may_change_weights(trusted)
    for other in (Again(source), Marked(Again(source)), SourceTransform(listening), Marked(SourceTransform(listening))):  # type: ignore[arg-type]
        assert may_change_weights(other)


def test_a_run_waits_before_an_unmarked_hook_and_not_before_a_marked_one(
    tiny_run: Any, counting: Any, tmp_path: Path
) -> None:
    order: list[str] = []

    class Unmarked(SourceTransform):
        def before_step(self, view: StepView) -> None:
            super().before_step(view)
            order.append("hook")

    class Marked(SourceTransform):
        @keeps_weights
        def before_step(self, view: StepView) -> None:
            super().before_step(view)
            order.append("hook")

    class Heard(OptimizerTransform):
        def step(self, step: int) -> Any:
            order.append("update")
            return super().step(step)

    for kind, expected in ((Unmarked, ["staged", "hook", "update"]), (Marked, ["hook", "staged", "update"])):
        order.clear()
        run = build(tiny_run, counting, tmp_path / kind.__name__, background=True, steps=2)
        run.source, run.optimizer = kind(run.source), Heard(run.optimizer)
        run.listeners = (lambda event: order.append("staged") if isinstance(event, Staged) else None,)
        run.train()
        assert order == ["hook", "update", *expected, "staged"], kind
