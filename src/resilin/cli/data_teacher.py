"""`resilin data complete | synthesize | respond | judge`: rows that a teacher writes or judges.

All four ask only for what the teacher's cache does not hold, and write their file whole or not at all. Where a request
failed, what there is is written, and the command ends with exit code 1: the same command asks for the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resilin.cli.data_rows import OutputFile, Rows, by_reason
from resilin.config.errors import UserError

if TYPE_CHECKING:
    from resilin.teacher import ChatTeacher

TeacherFile = Annotated[
    Path, typer.Option(help="A TOML or JSON file with the teacher: base_url, model, key_variable, limits, cache.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print calls and tokens, ask nothing.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="Of sampling; 0 is greedy.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Of an answer.")]
System = Annotated[str | None, typer.Option(help="The system message of prompts that have none.")]
MinWords = Annotated[int, typer.Option(min=0, help="Shorter answers are left out.")]


@contextmanager
def _watching(what: str) -> Iterator[Callable[[ChatTeacher], ChatTeacher]]:
    """Counts replies on the terminal while they come: gives what a teacher is handed through to be watched."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}: {task.completed:,.0f} replies"), TimeElapsedColumn())
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=None)

            def watched(teacher: ChatTeacher) -> ChatTeacher:
                teacher.watch = lambda reply: bar.advance(task)
                return teacher

            yield watched
    except KeyboardInterrupt:
        typer.secho("stopped; the same command goes on from the teacher's cache", fg=typer.colors.YELLOW, err=True)
        raise


def _write(
    output: Path,
    rows: Sequence[Mapping[str, object]],
    what: str,
    dropped: Mapping[str, int],
    failures: Sequence[tuple[str, str]],
    unanswered: int,
) -> None:
    """Write the rows and say what gave none.

    Raises:
        UserError: there are no rows: an earlier file is left as it is.
        typer.Exit: code 1, where asking again would give more.
    """
    from resilin.data.row_files import write_rows

    lost = by_reason(reason for reason, count in dropped.items() for _ in range(count))
    again = f"{unanswered:,} could not be had: the same command asks for these alone" if unanswered else ""
    shown = [f"{where}: {reason}" for where, reason in failures[:5]]
    if len(failures) > len(shown):
        shown.append(f"... and {len(failures) - len(shown):,} more")
    if not rows:
        raise UserError(
            "\n  ".join([f"{output}: not written: there is not one row{lost}", *filter(None, [again]), *shown])
        )
    write_rows(output, rows)
    typer.echo(f"{output}: {len(rows):,} {what}{lost}")
    for line in shown:
        typer.secho(f"  {line}", fg=typer.colors.YELLOW, err=True)
    if unanswered:
        typer.secho(f"error: {again}", fg=typer.colors.RED, err=True)
        raise typer.Exit(1)


def complete(
    inputs: Rows,
    output: OutputFile,
    teacher: TeacherFile,
    dry_run: DryRun = False,
    system: System = None,
    temperature: Temperature = 0.7,
    max_tokens: MaxTokens = 2048,
    min_words: MinWords = 1,
    keep_refusals: Annotated[bool, typer.Option("--keep-refusals", help="Keep answers that refuse.")] = False,
) -> None:
    """Write answers to prompts that have none. Killed, it goes on where it was.

    Rows are messages that end with the user, or prompts; rows that have an answer are kept as they are. Answers that
    are empty, short, cut, refusing, or that name their maker are left out and counted.

    \b
    resilin data complete prompts.jsonl -o chats.jsonl --teacher big.toml --dry-run
    """
    from resilin.data.row_files import read_rows
    from resilin.posttrain.completions import CompletionSettings, plan_completions
    from resilin.posttrain.completions import complete as written
    from resilin.posttrain.filters import AnswerFilters
    from resilin.teacher.endpoint import read_teacher

    settings = read_teacher(teacher)
    how = CompletionSettings(
        model=settings.model_name(),
        system=system,
        temperature=temperature,
        max_tokens=max_tokens,
        filters=AnswerFilters(min_words=min_words, refusals=keep_refusals),
    )
    rows = list(read_rows(inputs))
    asked = settings.build()
    if dry_run:
        typer.echo(str(plan_completions(rows, asked, how)))
        return
    with _watching("completing") as watched:
        done = written(rows, watched(asked), how)
    _write(output, done.rows, f"rows ({done.kept:,} had an answer)", done.dropped, done.failures, len(done.failures))


def synthesize(
    tasks: Annotated[Path, typer.Argument(help="A TOML file of [[tasks]]: how each kind is asked for and checked.")],
    output: OutputFile,
    personas: Annotated[
        list[str], typer.Option(help="Rows with a column persona, or a .txt file of one a line; several times.")
    ],
    teacher: TeacherFile,
    answer_teacher: Annotated[
        Path | None, typer.Option(help="Who answers the tasks; left out, the same teacher.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many personas.")] = None,
    dry_run: DryRun = False,
) -> None:
    """Write training rows for a skill: a teacher invents tasks for personas and answers them. Killed, it goes on.

    Mathematical tasks are answered several times and most answers decide the truth; constraints on the form of an
    answer are checked. What is empty, short, cut, refusing, twice there, or names its maker is left out and counted.

    \b
    resilin data synthesize examples/persona-tasks.toml --personas personas.txt --teacher big.toml -o rows.jsonl
    """
    from resilin.config import load_settings
    from resilin.posttrain.synthesis import Teachers, plan_synthesis, synthesise
    from resilin.posttrain.synthesis_settings import Synthesis, read_personas
    from resilin.teacher.endpoint import read_teacher

    settings = load_settings(Synthesis, tasks)
    named = read_personas(personas)[:limit]
    asks = read_teacher(teacher)
    asking = asks.build()
    solves = asks if answer_teacher is None else read_teacher(answer_teacher)
    solving = asking if answer_teacher is None else solves.build()
    teachers = Teachers(asking, asks.model_name(), solving, solves.model_name())
    if dry_run:
        first, second = plan_synthesis(settings, named, teachers)
        typer.echo(f"tasks: {first}\nanswers: {second}")
        return
    with _watching("synthesising") as watched:
        watched(asking)
        watched(solving)
        found = synthesise(settings, named, teachers)
    what = f"rows for {len(named):,} personas"
    _write(output, found.rows, what, found.dropped, found.failures, len(found.failures))


def respond(
    inputs: Rows,
    output: OutputFile,
    pool: Annotated[
        Path, typer.Option(help="A TOML file: `own`, and a table of each model's teacher under [models.NAME].")
    ],
    dry_run: DryRun = False,
) -> None:
    """Write several answers to each prompt, by models of a pool; one is always the model to be trained.

    Killed, it goes on where it was. The rows are what `resilin data judge` takes.

    \b
    resilin data respond prompts.jsonl -o answers.jsonl --pool examples/pool.toml
    resilin data judge answers.jsonl -o pairs.jsonl --teacher judge.toml
    """
    from resilin.config import load_settings
    from resilin.data.row_files import read_rows
    from resilin.posttrain.responses import ModelPool, plan_responses
    from resilin.posttrain.responses import respond as answered

    settings = load_settings(ModelPool, pool)
    rows = list(read_rows(inputs))
    if dry_run:
        for name, plan in plan_responses(rows, settings).items():
            typer.echo(f"{name}: {plan}")
        return
    with _watching("responding") as watched:

        def teacher_of(name: str) -> tuple[ChatTeacher, str]:
            teacher, model = settings.teacher_of(name)
            return watched(teacher), model

        found = answered(rows, settings, teacher_of)
    _write(output, found.rows, "rows", found.dropped, found.failures, len(found.failures))


def judge(
    inputs: Rows,
    output: OutputFile,
    teacher: TeacherFile,
    dry_run: DryRun = False,
    own_model: Annotated[str | None, typer.Option(help="Refuse rows without an answer of this model.")] = None,
    seed: Annotated[int, typer.Option(help="Of the order of answers and of the rejected one.")] = 0,
) -> None:
    """Make preference rows from rows with several `responses`, rated by a teacher. Killed, it goes on where it was."""
    from resilin.data.row_files import read_rows
    from resilin.posttrain.judge import TeacherRater, read_candidates
    from resilin.posttrain.judge import judge as rated
    from resilin.teacher.endpoint import read_teacher

    settings = read_teacher(teacher)
    rater = TeacherRater(settings.build(), settings.model_name(), seed=seed)
    candidates = [read_candidates(row, own_model=own_model) for row in read_rows(inputs)]
    if dry_run:
        typer.echo(str(rater.teacher.plan(rater.requests(candidates))))
        return
    with _watching("judging") as watched:
        watched(rater.teacher)
        judged = rated(candidates, rater, seed=seed)
    what = f"pairs of {len(candidates):,} prompts"
    _write(output, judged.rows, what, judged.dropped, judged.failures, judged.unanswered)
