"""A run in the terminal: a progress bar that stays in place, or, where there is no terminal, a line now and then."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from resilin.run.cluster_words import in_words
from resilin.run.events import Cluster, Evaluated, Event, Failure, RunEnded, RunStarted, Saved, StepDone
from resilin.run.progress import RunProgress, amount, duration, numbers


def _started(event: RunStarted) -> str:
    parts = [event.folder, f"{amount(event.parameters)} parameters", event.device]
    if event.peak_flops:
        parts.append(f"matmul peak {amount(event.peak_flops, 'FLOP/s')}")
    from_step = f"steps {event.start_step + 1} to" if event.start_step else "steps:"
    return " | ".join([*filter(None, parts), f"{from_step} {event.total_steps}"])


def _saved(event: Saved) -> str:
    return f"saved step {event.step} ({amount(event.bytes, 'B')} in {event.seconds:.1f} s)"


def _evaluated(event: Evaluated) -> str:
    return f"{event.name} at step {event.step}: {numbers(event.metrics)}"


def _ended(event: RunEnded) -> str:
    return f"{event.reason} at step {event.step} after {duration(event.seconds)}"


class LiveView:
    """A listener that shows the run.

    In a terminal the bar, the numbers, the last evaluation and the last save are redrawn in place, and only the
    start, failures that the run survives, and the end become lines of their own. Elsewhere (a pipe, a log of a batch
    job) every evaluation and save is a line too, and steps are every `seconds_between_lines`.

    Args:
        console: where; standard output if None.
        animated: whether to redraw in place; None: where the console is an interactive terminal.
        seconds_between_lines: of step lines where nothing is redrawn.
    """

    def __init__(
        self, console: Console | None = None, *, animated: bool | None = None, seconds_between_lines: float = 10.0
    ) -> None:
        self.console = console or Console()
        # FORCE_COLOR makes rich call a pipe a terminal; colours are fine there, redrawing is not.
        interactive = self.console.is_interactive and self.console.file.isatty()
        self.animated = interactive if animated is None else animated
        self.seconds_between_lines = seconds_between_lines
        self.progress = RunProgress()
        self._live: Live | None = None
        self._began = 0.0
        self._line_at = float("-inf")

    def __call__(self, event: Event) -> None:
        """Show the event."""
        self.progress.see(event)
        if isinstance(event, RunStarted):
            self._began = time.monotonic()
            self._say(_started(event))
            if self.animated:
                self._animate()
        elif isinstance(event, Failure):
            # What ends the run is told by whoever started it, and need not be read twice.
            if event.action != "stop":
                self._say(event.message, style="yellow")
        elif isinstance(event, Cluster):
            if text := in_words(event):
                self._say(text, style="yellow")
        elif isinstance(event, RunEnded):
            self.close()
            self._say(_ended(event), style="green" if event.reason == "completed" else "yellow")
        elif not self.animated:
            self._line(event)

    def close(self) -> None:
        """Draw the last state and leave the terminal as it was."""
        if self._live is not None:
            live, self._live = self._live, None
            live.stop()

    def _say(self, text: str, style: str | None = None) -> None:
        # Text, not markup: a path may hold square brackets. Soft wrap: a pipe has no width to break at.
        self.console.print(Text(text, style=style or ""), soft_wrap=True)

    def _line(self, event: Event) -> None:
        if isinstance(event, StepDone):
            due = event.time - self._line_at >= self.seconds_between_lines
            if due or event.step == self.progress.total:
                self._line_at = event.time
                head = f"step {event.step}/{self.progress.total}"
                self._say(f"{head}  {self.progress.pace()}  ETA {self.progress.time_left()}")
        elif isinstance(event, Evaluated):
            self._say(_evaluated(event))
        elif isinstance(event, Saved):
            self._say(_saved(event))

    def _animate(self) -> None:
        self.close()
        self._live = Live(get_renderable=self._render, console=self.console, refresh_per_second=4)
        self._live.start()
        # Visible, so that a killed run does not leave a terminal without a cursor.
        self.console.show_cursor(True)

    def _render(self) -> RenderableType:
        progress = self.progress
        bar = Table.grid(padding=(0, 1))
        share = progress.step / progress.total if progress.total else 0.0
        elapsed = duration(time.monotonic() - self._began)
        bar.add_row(
            ProgressBar(total=max(progress.total, 1), completed=progress.step, width=32),
            Text(f"{progress.step}/{progress.total}", style="bold"),
            Text(f"{share:.0%}"),
            Text(f"{elapsed} elapsed, {progress.time_left()} left", style="dim"),
        )
        rows: list[RenderableType] = [bar]
        news = [_evaluated(event) for event in progress.evaluated.values()]
        if progress.saved is not None:
            news.append(_saved(progress.saved))
        for text in (progress.pace(), *news):
            if text:
                rows.append(Text(text, no_wrap=True, overflow="ellipsis"))
        return Group(*rows)

    def __enter__(self) -> LiveView:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
