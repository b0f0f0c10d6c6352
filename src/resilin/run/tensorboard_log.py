"""Curves in TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from resilin.run.events import Evaluated, Event, Failure, RunEnded, RunStarted, Saved, StepDone, to_json


def scalars(event: Event) -> dict[str, float]:
    """What curves show of an event: tag -> value; shared by TensorBoard and the trackers.

    `train/loss`, `train/lr`, `train/grad_norm` and the objective's logs, `speed/<unit>_per_second`,
    `speed/seconds_per_step`, `speed/mfu`, and `<evaluation>/<metric>`.
    """
    if isinstance(event, StepDone):
        values = {"train/loss": event.loss, "train/lr": event.lr, "train/grad_norm": event.grad_norm}
        values.update({f"train/{name}": value for name, value in event.logs.items()})
        values["speed/units_per_second"] = event.units_per_second
        values["speed/seconds_per_step"] = event.seconds
        if event.mfu is not None:
            values["speed/mfu"] = event.mfu
        return values
    if isinstance(event, Evaluated):
        return {f"{event.name}/{metric}": value for metric, value in event.metrics.items()}
    return {}


class TensorBoardLog:
    """A listener that writes event files for `tensorboard --logdir`.

    Args:
        folder: where they go; a resumed run adds a file.
        purge_step: steps committed when the run starts or goes on: points after it, of a run that was killed later,
            are hidden.
    """

    def __init__(self, folder: Path, purge_step: int = 0) -> None:
        # Here and not above: 0.2 s that only runs with curves should pay.
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import SummaryWriter

        self._summary: Any = Summary
        purge = purge_step + 1 if purge_step else None
        self._writer: Any = SummaryWriter(str(folder), purge_step=purge, max_queue=1000, flush_secs=30)

    def __call__(self, event: Event) -> None:
        """Write the event's points; settings, failures and the end as text."""
        step = event.start_step if isinstance(event, RunStarted) else getattr(event, "step", 0)
        points = [self._summary.Value(tag=tag, simple_value=value) for tag, value in scalars(event).items()]
        if points:
            # All points of a step in one record: a tenth of the time of one add_scalar each.
            self._writer.file_writer.add_summary(self._summary(value=points), step, walltime=event.time)
        if isinstance(event, RunStarted):
            settings = json.dumps(to_json(event)["settings"], indent=2, ensure_ascii=False)
            self._writer.add_text("settings", f"```json\n{settings}\n```", step, walltime=event.time)
        elif isinstance(event, Failure):
            self._writer.add_text("failures", event.message, step, walltime=event.time)
        if isinstance(event, Evaluated | Saved | Failure | RunEnded):
            self._writer.flush()

    def close(self) -> None:
        """Write what is left and close the file."""
        self._writer.close()

    def __enter__(self) -> TensorBoardLog:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
