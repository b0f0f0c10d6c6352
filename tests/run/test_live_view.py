"""What a person sees of a run, in a terminal and where there is none."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from resilin.run.events import Evaluated, Event, Failure, Interrupted, RunEnded, RunStarted, Saved, StepDone
from resilin.run.live_view import LiveView
from resilin.run.progress import RunProgress, amount, duration, numbers

START = RunStarted(
    folder="runs/[x]",
    settings={},
    parameters=5_123_456,
    device="cpu, 2 threads, fp32",
    start_step=0,
    total_steps=40,
    flops_per_unit=3e7,
    peak_flops=1.8e11,
    time=1000.0,
)


def step(number: int, at: float | None = None, **changed: Any) -> StepDone:
    values: dict[str, Any] = {
        "step": number,
        "loss": 3.0,
        "lr": 3e-4,
        "grad_norm": 0.9,
        "units": 4096,
        "seconds": 0.5,
        "mfu": 0.6,
        "time": 1000.0 + number if at is None else at,
    }
    return StepDone(**{**values, **changed})


def a_run(total: int = 40) -> list[Event]:
    events: list[Event] = [START]
    for number in range(1, total + 1):
        events.append(step(number))
        if number % 10 == 0:
            events.append(Evaluated(step=number, name="validation", metrics={"loss": 2.5, "accuracy": 0.25}))
        if number % 20 == 0:
            events.append(Saved(step=number, path="x", bytes=61_000_000, seconds=0.2))
    return [*events, RunEnded(step=total, reason="completed", seconds=41.0)]


def screen(raw: str, width: int) -> list[str]:
    """The lines a terminal shows after this output; knows what rich writes, and fails on anything else."""
    lines, row, column = [""], 0, 0
    tokens = re.compile(r"\x1b\[(\??[\d;]*)([A-Za-z])|(\r)|(\n)|([^\x1b\r\n])")
    for match in tokens.finditer(raw):
        argument, command, back, down, letter = match.groups()
        if letter:
            if column == width:
                row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
            lines[row] = lines[row][:column].ljust(column) + letter + lines[row][column + 1 :]
            column += 1
        elif down:
            row += 1  # a terminal in raw mode stays in its column; the tty's own \r comes separately
            lines += [""] * (row + 1 - len(lines))
        elif back:
            column = 0
        elif command == "A":
            row = max(0, row - int(argument or 1))
        elif command == "K":
            lines[row] = ""
        else:
            assert (command in "hl" and argument == "?25") or command == "m", match[0]
    assert not tokens.sub("", raw), "unknown control sequence"
    return [line.rstrip() for line in lines]


def shown(events: list[Event], *, width: int = 100) -> tuple[str, list[str]]:
    """What is written to a terminal, and what it shows in the end."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=width, color_system=None, legacy_windows=False)
    view = LiveView(console, animated=True)
    for event in events:
        view(event)
    view.close()
    raw = file.getvalue()
    return raw, screen(raw.replace("\n", "\r\n"), width)


def printed(events: list[Event], **options: Any) -> list[str]:
    """The lines written where there is no terminal."""
    console = Console(file=io.StringIO(), width=80)
    view = LiveView(console, **options)
    assert not view.animated
    for event in events:
        view(event)
    view.close()
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined,no-any-return]


# -- in a terminal ----------------------------------------------------------------------------------------------


def test_a_terminal_ends_with_one_bar_the_numbers_the_news_and_the_end() -> None:
    _, lines = shown(a_run())
    assert lines[0] == "runs/[x] | 5.12M parameters | cpu, 2 threads, fp32 | matmul peak 180 GFLOP/s | steps: 40"
    assert re.fullmatch(r"━+ 40/40 100% 0:0\d elapsed, 0:00 left", lines[1])
    assert lines[2] == "loss 3.0000  lr 3.00e-04  grad norm 0.9  8.19k tokens/s  MFU 60%"
    assert lines[3:] == [
        "validation at step 40: loss 2.5  accuracy 0.25",
        "saved step 40 (61.0 MB in 0.2 s)",
        "completed at step 40 after 0:41",
        "",
    ]


def test_a_failure_stays_above_the_bar_and_nothing_is_there_twice() -> None:
    events = a_run()
    message = "step 20 was not committed: its loss is not finite [red]; slot 3"
    events.insert(24, Failure(step=19, kind="non_finite", message=message, slots=(3,), action="skip"))
    _, lines = shown(events)
    assert lines[1] == message
    for text in (message, "40/40", "loss 3.0000", "validation at", "saved step", "completed"):
        assert sum(text in line for line in lines) == 1, text


def test_the_cursor_is_visible_whatever_ends_the_process() -> None:
    file = io.StringIO()
    view = LiveView(Console(file=file, force_terminal=True, width=80), animated=True)
    view(START)
    view(step(1))
    raw = file.getvalue()  # nothing more would come if the process died here
    assert raw.rfind("\x1b[?25h") > raw.rfind("\x1b[?25l")
    view.close()


def test_a_narrow_terminal_cuts_lines_and_redraws_as_many_as_it_drew() -> None:
    _, lines = shown(a_run(), width=40)
    assert sum("40/40" in line for line in lines) == 1
    assert all(len(line) <= 40 for line in lines)
    assert sum(line.startswith("loss 3.0000") for line in lines) == 1


def test_closing_twice_or_before_the_start_does_no_harm() -> None:
    screen = io.StringIO()
    view = LiveView(Console(file=screen, force_terminal=True), animated=True)
    view.close()
    assert screen.getvalue() == ""
    with view:
        view(START)
    shown = screen.getvalue()
    assert shown
    view.close()
    assert screen.getvalue() == shown


SCRIPT = """
    import sys, time
    from resilin.run.events import RunStarted, RunEnded, StepDone, Interrupted, Saved
    from resilin.run.interrupts import Interrupts
    from resilin.run.live_view import LiveView

    with LiveView() as view, Interrupts() as interrupts:
        view(RunStarted(folder="runs/x", settings={}, parameters=1, device="cpu", start_step=0, total_steps=1000))
        for step in range(1, 1000):
            view(StepDone(step=step, loss=1.0, lr=1e-3, grad_norm=1.0, units=10, seconds=0.01))
            if step == 3:
                print("a line of the user's own", flush=True)
                print("a warning", file=sys.stderr, flush=True)
                open(sys.argv[1], "w").close()
            time.sleep(0.05)
            if interrupts.requested:
                time.sleep(0.5)  # the rest of a long step, while the display goes on
                break
        view(Saved(step=step, path="x", bytes=5, seconds=0.1))
        view(Interrupted(step=step))
        view(RunEnded(step=step, reason="interrupted", seconds=1))
    print("after")
"""


def in_a_terminal(tmp_path: Any, during: Callable[[subprocess.Popen[bytes]], None]) -> list[str]:
    """Run SCRIPT in a pseudo-terminal of 100 columns; gives what it shows in the end."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "50", "NO_COLOR": "1"}
    environment.pop("FORCE_COLOR", None)
    mark = tmp_path / "mark"
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(mark)]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as child:
        os.close(theirs)
        raw = bytearray()
        told = False
        while True:
            try:
                raw += os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            if mark.exists() and not told:
                told = True
                during(child)
    os.close(ours)
    return screen(raw.decode(), 100)


def test_ctrl_c_in_a_real_terminal_garbles_nothing(tmp_path: Any) -> None:
    lines = in_a_terminal(tmp_path, lambda child: child.send_signal(2))
    text = "\n".join(lines)
    for once in (
        r"runs/x \|",
        r"\d+/1000",
        r"loss 1\.0000",
        r"a line of the user's own",
        r"a warning",
        r"interrupted: finishing this step",
        r"interrupted at step",
        r"saved step",
        r"^after$",
    ):
        assert len(re.findall(once, text, re.MULTILINE)) == 1, (once, text)
    bar = next(number for number, line in enumerate(lines) if "/1000" in line)
    assert lines.index("a line of the user's own") < bar


# -- where there is no terminal ---------------------------------------------------------------------------------


def test_without_a_terminal_there_are_plain_lines_now_and_then() -> None:
    lines = printed(a_run())
    assert lines == [
        "runs/[x] | 5.12M parameters | cpu, 2 threads, fp32 | matmul peak 180 GFLOP/s | steps: 40",
        "step 1/40  loss 3.0000  lr 3.00e-04  grad norm 0.9  8.19k tokens/s  MFU 60%  ETA -:--",
        "validation at step 10: loss 2.5  accuracy 0.25",
        "step 11/40  loss 3.0000  lr 3.00e-04  grad norm 0.9  8.19k tokens/s  MFU 60%  ETA 0:29",
        "validation at step 20: loss 2.5  accuracy 0.25",
        "saved step 20 (61.0 MB in 0.2 s)",
        "step 21/40  loss 3.0000  lr 3.00e-04  grad norm 0.9  8.19k tokens/s  MFU 60%  ETA 0:19",
        "validation at step 30: loss 2.5  accuracy 0.25",
        "step 31/40  loss 3.0000  lr 3.00e-04  grad norm 0.9  8.19k tokens/s  MFU 60%  ETA 0:09",
        "step 40/40  loss 3.0000  lr 3.00e-04  grad norm 0.9  8.19k tokens/s  MFU 60%  ETA 0:00",
        "validation at step 40: loss 2.5  accuracy 0.25",
        "saved step 40 (61.0 MB in 0.2 s)",
        "completed at step 40 after 0:41",
    ]


def test_plain_output_has_no_control_sequences_and_no_line_is_broken() -> None:
    console = Console(file=io.StringIO(), width=20)
    view = LiveView(console)
    for event in a_run():
        view(event)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b" not in text
    assert "\r" not in text
    assert len(text.splitlines()) == 13


def test_colours_forced_on_a_pipe_do_not_make_it_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    console = Console(file=io.StringIO())
    assert console.is_terminal
    assert not LiveView(console).animated


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    ours, theirs = pty.openpty()
    with open(theirs, "w") as file:  # noqa: PTH123  # a descriptor
        assert not LiveView(Console(file=file)).animated
    os.close(ours)


def test_a_failure_is_a_line_unless_it_ends_the_run_and_its_starter_will_say_it() -> None:
    def failure(action: str) -> Failure:
        return Failure(step=3, kind="non_finite", message="step 3 was not committed", action=action)

    end = RunEnded(step=3, reason="failed", seconds=3661)
    assert printed([START, failure("skip"), end])[1:] == ["step 3 was not committed", "failed at step 3 after 1:01:01"]
    assert printed([START, failure("stop"), end])[1:] == ["failed at step 3 after 1:01:01"]


def test_an_interrupted_run_says_so_once() -> None:
    lines = printed([START, Interrupted(step=3), RunEnded(step=3, reason="interrupted", seconds=9)])
    assert lines[1:] == ["interrupted at step 3 after 0:09"]


def test_a_resumed_run_says_where_it_goes_on() -> None:
    (line,) = printed([RunStarted(**{**vars(START), "start_step": 20})])
    assert line.endswith("steps 21 to 40")


# -- the numbers ------------------------------------------------------------------------------------------------


def test_the_loss_is_smoothed_without_a_bias_at_the_start() -> None:
    progress = RunProgress()
    for number in range(1, 200):
        progress.see(step(number, loss=7.0))
        assert progress.loss == pytest.approx(7.0)
    progress.see(step(200, loss=float("nan")))
    assert progress.loss == pytest.approx(7.0)
    progress.see(step(201, loss=8.0))
    assert progress.loss == pytest.approx(7.05)


def test_throughput_and_mfu_leave_out_the_warm_up_of_the_first_step() -> None:
    progress = RunProgress()
    progress.see(START)
    progress.see(step(1, seconds=60.0, mfu=0.005))
    for number in range(2, 6):
        progress.see(step(number, seconds=0.5, mfu=0.6))
    assert progress.units_per_second == pytest.approx(8192)
    assert progress.mfu == pytest.approx(0.6)


def test_time_left_counts_evaluation_and_saving_too() -> None:
    progress = RunProgress()
    progress.see(START)
    assert progress.time_left() == "-:--"
    for number in range(1, 11):
        progress.see(step(number, at=2000.0 + 3.0 * number, seconds=1.0))  # 1 s a step, and 2 s of something else
    assert progress.seconds_left == pytest.approx(90.0)
    progress.see(RunStarted(**{**vars(START), "start_step": 10}))
    assert progress.time_left() == "-:--"  # hours may have passed between


def test_a_run_without_known_flops_has_no_mfu() -> None:
    progress = RunProgress()
    progress.see(step(1, mfu=None))
    assert progress.mfu is None
    assert "MFU" not in progress.pace()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (7, "7"), (999, "999"), (0.5, "0.50"), (12.34, "12.3"), (999.4, "999"), (999.6, "1.00k"),
        (1000, "1.00k"), (12_345, "12.3k"), (999_499, "999k"), (999_500, "1.00M"), (5.1e6, "5.10M"),
        (1.8e11, "180G"), (3e17, "300P"), (3e19, "30000P"),
    ],
)  # fmt: skip
def test_amounts_have_three_digits(value: float, text: str) -> None:
    assert amount(value) == text


def test_amounts_with_a_unit() -> None:
    assert amount(1.8e11, "FLOP/s") == "180 GFLOP/s"
    assert amount(12, "B") == "12 B"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3600, "1:00:00"), (90_061, "1d 1:01:01"), (-3, "0:00")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_small_mfu_keeps_a_digit() -> None:
    progress = RunProgress()
    progress.see(step(1, mfu=0.0123))
    assert "MFU 1.2%" in progress.pace()


def test_many_metrics_are_counted_instead_of_shown() -> None:
    assert numbers({"a": 1, "b": 2.34567, "c": float("nan")}, limit=2) == "a 1  b 2.346  (+1 more)"
