"""What a part adds to the log of a step."""

from __future__ import annotations

from typing import Any

from resilin.nouns import StepView
from resilin.run.events import StepDone


def test_a_note_reaches_the_log_of_its_step_and_the_view_knows_the_length_of_the_run(
    tiny_run: Any, counting: Any
) -> None:
    lengths, events = [], []

    class Noting(counting):  # type: ignore[misc]
        def before_step(self, view: StepView) -> None:
            lengths.append(view.steps)

        def after_step(self, view: StepView) -> None:
            if view.step != 2:
                view.note("committed", float(view.step))

    run = tiny_run(source=Noting(), pace={"steps": 3, "micro_batch_size": 8}, listeners=(events.append,))
    run.train()
    steps = [event for event in events if isinstance(event, StepDone)]
    assert [event.logs.get("committed") for event in steps] == [1.0, None, 3.0]
    assert lengths == [3, 3, 3]
