"""The step loop: what a step is, and that stopping changes nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from resilin.checkpoint.errors import CheckpointError
from resilin.keys import Keys
from resilin.nouns import Batch, Loss, StepView
from resilin.objective.next_token import NextToken
from resilin.run.events import Evaluated, Failure, Saved, StepDone


def losses_of(run: Any) -> list[float]:
    losses: list[float] = []
    run.listeners = (*run.listeners, lambda event: losses.append(event.loss) if isinstance(event, StepDone) else None)
    run.train()
    return losses


def test_training_learns_the_rule(tiny_run: Any) -> None:
    losses = losses_of(tiny_run(pace={"steps": 60}))
    assert losses[0] > 3.0
    assert losses[-1] < 1.5


def test_stopping_and_resuming_gives_the_same_bits(tiny_run: Any, digest: Any, tmp_path: Path) -> None:
    whole = tiny_run(dropout=0.1, pace={"steps": 9})
    whole_losses = losses_of(whole)
    first = tiny_run(tmp_path, dropout=0.1, pace={"steps": 9, "save_every": 4})
    events: list[Any] = []
    first.listeners = (events.append,)
    while first.step < 5:
        first._take_step()
    assert [event.step for event in events if isinstance(event, Saved)] == [4]
    second = tiny_run(tmp_path, dropout=0.1, pace={"steps": 9, "save_every": 4})
    second.load_state_dict(second.checkpoints.load(4))
    losses = losses_of(second)
    assert losses == whole_losses[4:]
    assert digest(second.state_dict()) == digest(whole.state_dict())


@pytest.mark.parametrize("micro", [1, 2, 3, 4, 7])
def test_another_micro_batch_size_gives_the_same_run_within_rounding(tiny_run: Any, micro: int) -> None:
    whole, split = (
        tiny_run(dropout=0.2, pace={"steps": 4}),
        tiny_run(dropout=0.2, pace={"steps": 4, "micro_batch_size": micro}),
    )
    torch.testing.assert_close(losses_of(whole), losses_of(split), rtol=1e-5, atol=1e-6)
    for (name, a), b in zip(whole.model.named_parameters(), split.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


class Poisoned:
    """Next-token loss whose value is NaN for one slot of one step."""

    def __init__(self, step: int, slot: int) -> None:
        self.inner, self.step, self.slot = NextToken().build(), step, slot

    def __call__(self, model: Any, batch: Batch, keys: Keys | None) -> Loss:
        loss = self.inner(model, batch, keys)
        if keys is not None and keys.step == self.step and self.slot in batch.slots_B.tolist():
            return Loss(loss.sum * float("nan"), loss.units, loss.logs)
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None: ...


def test_a_loss_that_is_not_finite_stops_and_names_step_and_slot(tiny_run: Any, digest: Any, tmp_path: Path) -> None:
    good = tiny_run(pace={"steps": 8})
    while good.step < 3:
        good._take_step()
    run = tiny_run(tmp_path, objective=Poisoned(3, 5), pace={"micro_batch_size": 4})
    reference = tiny_run(pace={"micro_batch_size": 4})
    while reference.step < 3:
        reference._take_step()
    events: list[Any] = []
    run.listeners = (events.append,)
    outcome = run.train()
    (failure,) = [event for event in events if isinstance(event, Failure)]
    assert outcome.reason == "failed"
    assert (failure.step, failure.slots, failure.action) == (3, (5,), "stop")
    assert "slot 5" in outcome.message
    # The step was not committed: what was saved is the state before it, to the bit.
    assert outcome.step == 3
    assert digest(run.checkpoints.load(3)) == digest(reference.state_dict())


def test_skip_leaves_the_step_out_and_goes_on(tiny_run: Any) -> None:
    run = tiny_run(objective=Poisoned(3, 5), pace={"non_finite": "skip"})
    outcome = run.train()
    assert (outcome.reason, run.step, run.skipped) == ("completed", 8, 1)
    assert all(torch.isfinite(p).all() for p in run.model.parameters())


def test_more_skips_than_the_cap_stop_the_run(tiny_run: Any) -> None:
    class Always(Poisoned):
        def __call__(self, model: Any, batch: Batch, keys: Keys | None) -> Loss:
            self.step = keys.step if keys is not None else -1
            return super().__call__(model, batch, keys)

    run = tiny_run(objective=Always(0, 0), pace={"non_finite": "skip", "non_finite_cap": 2})
    outcome = run.train()
    assert (outcome.reason, run.skipped) == ("failed", 2)
    assert "non_finite_cap" in outcome.message


def test_a_step_whose_labels_are_all_masked_is_named(tiny_run: Any, counting: Any) -> None:
    class Masked(counting):  # type: ignore[misc]
        def fetch(self, step: int, slots: Any) -> Batch:
            batch = super().fetch(step, slots)
            return Batch(batch.slots_B, {"tokens": batch["tokens"], "labels": torch.full_like(batch["labels"], -100)})

    with pytest.raises(ValueError, match="without a single valid unit"):
        tiny_run(source=Masked()).train()


def test_evaluation_does_not_touch_the_run(tiny_run: Any, counting: Any, digest: Any) -> None:
    events: list[Any] = []
    plain = tiny_run(dropout=0.1)
    watched = tiny_run(
        dropout=0.1,
        pace={"evaluate_every": 3, "evaluate_at_start": True},
        validation={"validation": counting(seed=99, length=2)},
        listeners=(events.append,),
    )
    assert losses_of(plain) == losses_of(watched)
    assert digest(plain.state_dict()) == digest(watched.state_dict())
    assert [event.step for event in events if isinstance(event, Evaluated)] == [0, 3, 6, 8]


def test_a_save_that_fails_is_told_and_the_earlier_checkpoint_stays_good(
    tiny_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import os

    events: list[Any] = []
    run = tiny_run(tmp_path, pace={"steps": 8, "save_every": 3}, listeners=(events.append,))
    sync = os.fsync

    def disk_full_after_the_first_save(descriptor: int) -> None:
        if run.step > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", disk_full_after_the_first_save)
    with pytest.raises(CheckpointError, match="step 3"):
        run.train()
    assert [(event.kind, event.step) for event in events if isinstance(event, Failure)] == [("save", 6)]
    monkeypatch.undo()
    assert run.checkpoints.steps() == [3]
    resumed = tiny_run(tmp_path)
    resumed.load_state_dict(run.checkpoints.load(3))
    assert resumed.step == 3


def test_parts_hear_of_every_step_and_may_grow_the_batch(tiny_run: Any, counting: Any) -> None:
    class Growing(counting):  # type: ignore[misc]
        heard: list[tuple[str, int]]

        def slots(self, step: int) -> int:
            return 2 + step

        def before_step(self, view: StepView) -> None:
            self.heard = [*getattr(self, "heard", []), ("before", view.step)]

        def after_step(self, view: StepView) -> None:
            assert view.logs["loss"] > 0
            self.heard.append(("after", view.step))

    run = tiny_run(source=Growing(), pace={"steps": 3, "micro_batch_size": 2})
    run.train()
    assert run.source.heard == [("before", 0), ("after", 1), ("before", 1), ("after", 2), ("before", 2), ("after", 3)]
    assert run.samples == 2 + 3 + 4


def test_no_file_of_the_loop_names_a_method() -> None:
    import resilin.run

    methods = "matformer lora doremi muon adamw tulu dpo grpo ewc distill moe multigrid dataflex llama nested sparsity"
    folder = Path(resilin.run.__path__[0])
    found = [
        (path.name, word)
        for path in folder.glob("*.py")
        if path.name != "settings.py"
        for word in methods.split()
        if re.search(rf"\b{word}\b", path.read_text().lower())
    ]
    assert found == []


def test_a_part_that_calls_the_model_itself_can_do_so_in_the_format_of_the_step(tiny_run: Any, counting: Any) -> None:
    formats = []

    class Caller(counting):  # type: ignore[misc]
        def before_step(self, view: Any) -> None:
            with view.autocast():
                formats.append(torch.is_autocast_enabled("cpu"))

    tiny_run(source=Caller(), autocast=lambda: torch.autocast("cpu", torch.bfloat16), pace={"steps": 1}).train()
    tiny_run(source=Caller(), pace={"steps": 1}).train()
    assert formats == [True, False]
