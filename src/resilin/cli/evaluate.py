"""`resilin evaluate`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from resilin.cli.evaluate_suite import SuiteOptions, evaluate_suite
from resilin.cli.model_options import ModelArgument, ModelOptions
from resilin.cli.option_groups import with_option_groups
from resilin.config.errors import UserError

if TYPE_CHECKING:
    from resilin.evaluate.multiple_choice import ChoiceScore
    from resilin.evaluate.perplexity import TextScore
    from resilin.run.open_model import OpenedModel

WHAT, HOW = "What to evaluate on", "How"
Progress = Callable[[float], None]


def _text_row(kind: str, name: str, score: TextScore) -> dict[str, Any]:
    return {
        "kind": kind,
        "data": name,
        "tokens": score.tokens,
        "bytes": score.bytes,
        "loss": score.loss,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte if score.bytes else None,
    }


def _choice_row(name: str, score: ChoiceScore) -> dict[str, Any]:
    row: dict[str, Any] = {"kind": "choices", "data": name, "questions": score.questions}
    for key in ("acc", "acc_norm", "acc_bytes"):
        row[key] = getattr(score, key)
        row[f"{key}_stderr"] = score.standard_error(row[key]) if score.questions > 1 else None
    return {**row, "chance": score.chance, "truncated_choices": score.truncated}


def _tables(rows: list[dict[str, Any]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    texts = [row for row in rows if row["kind"] != "choices"]
    choices = [row for row in rows if row["kind"] == "choices"]
    if texts:
        table = Table(title=title, title_justify="left")
        table.add_column("text", overflow="fold")
        for name in ("tokens", "bytes", "loss (nats/token)", "perplexity", "bits/byte"):
            table.add_column(name, justify="right")
        for row in texts:
            bits = "-" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}"
            figures = (f"{row['loss']:.4f}", f"{row['perplexity']:.4g}", bits)
            table.add_row(row["data"], f"{row['tokens']:,}", f"{row['bytes']:,}", *figures)
        console.print(table)
    if choices:
        table = Table(title=title if not texts else None, title_justify="left")
        table.add_column("questions of", overflow="fold")
        for name in ("questions", "acc", "acc_norm", "acc_bytes", "chance"):
            table.add_column(name, justify="right")
        for row in choices:
            cells = []
            for key in ("acc", "acc_norm", "acc_bytes"):
                spread = row[f"{key}_stderr"]
                cells.append(f"{row[key]:.4f}" + ("" if spread is None else f" ± {spread:.4f}"))
            table.add_row(row["data"], str(row["questions"]), *cells, f"{row['chance']:.4f}")
        console.print(table)
        cut = sum(row["truncated_choices"] for row in choices)
        if cut:
            console.print(f"{cut} choices had a context longer than the model; its beginning was cut off.")


def _evaluations(
    opened: OpenedModel,
    text: list[Path],
    data: list[Path],
    choices: list[Path],
    options: dict[str, Any],
) -> list[tuple[str, Callable[[Progress], dict[str, Any]]]]:
    """What is to be evaluated, by name; files are read here, so that a wrong one stops before hours of work."""
    from resilin.evaluate.multiple_choice import answer_questions
    from resilin.evaluate.perplexity import read_text, source_score, text_score
    from resilin.evaluate.questions import read_questions
    from resilin.run.held_out import held_out_source, shard_source

    model, jobs = opened.model, []
    batch_tokens = options["batch_tokens"]

    def of_text(path: Path, content: str) -> Callable[[Progress], dict[str, Any]]:
        window = {"window": options["window"], "stride": options["stride"]}

        def job(progress: Progress) -> dict[str, Any]:
            words = opened.needed_tokenizer()
            score = text_score(model, words, content, **window, batch_tokens=batch_tokens, progress=progress)
            return _text_row("text", str(path), score)

        return job

    def of_source(name: str, source: Any) -> Callable[[Progress], dict[str, Any]]:
        def job(progress: Progress) -> dict[str, Any]:
            score = source_score(model, source, len(source), tokenizer=opened.tokenizer, progress=progress)
            return _text_row("tokens", name, score)

        return job

    def of_choices(path: Path, questions: Any) -> Callable[[Progress], dict[str, Any]]:
        def job(progress: Progress) -> dict[str, Any]:
            words = opened.needed_tokenizer()
            begin = options["begin_token"]
            return _choice_row(
                str(path),
                answer_questions(
                    model, words, questions, begin_token=begin, batch_tokens=batch_tokens, progress=progress
                ),
            )

        return job

    for path in text:
        jobs.append((str(path), of_text(path, read_text(path))))
    for path in data:
        source = shard_source(path, model, opened.tokenizer, options["window"], batch_tokens, options["split"])
        jobs.append((str(path), of_source(str(path), source)))
    for path in choices:
        questions = read_questions(path, options["template"])[: options["limit"]]
        jobs.append((str(path), of_choices(path, questions)))
    if not jobs:
        if opened.run is None:
            raise UserError("nothing to evaluate on: give --text FILE, --data SHARDS or --choices FILE.jsonl")
        jobs.append(("held-out data of the run", of_source("held-out data of the run", held_out_source(opened.run))))
    return jobs


@with_option_groups
def evaluate(
    model: ModelArgument,
    text: Annotated[
        list[Path] | None, typer.Option(help="Text files: perplexity, bits per byte.", rich_help_panel=WHAT)
    ] = None,
    data: Annotated[list[Path] | None, typer.Option(help="Token shards: the same.", rich_help_panel=WHAT)] = None,
    choices: Annotated[
        list[Path] | None,
        typer.Option(help="JSON Lines of multiple-choice questions: accuracy.", rich_help_panel=WHAT),
    ] = None,
    split: Annotated[
        Literal["all", "validation"],
        typer.Option(help="With --data: all of it, or only what a run holds out.", rich_help_panel=WHAT),
    ] = "all",
    limit: Annotated[
        int | None, typer.Option(min=1, help="With --choices: only the first so many.", rich_help_panel=WHAT)
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens read at a time. Default: the model's positions.", rich_help_panel=HOW),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(min=1, help="New tokens of each further window. Default: half of it.", rich_help_panel=HOW),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(help="Context of a question from its fields: 'Q: {question}\\nA:'.", rich_help_panel=HOW),
    ] = None,
    begin_token: Annotated[
        bool,
        typer.Option(
            "--begin-token", help="Put the tokenizer's begin token before every question.", rich_help_panel=HOW
        ),
    ] = False,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens computed at a time.", rich_help_panel=HOW)] = 4096,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, no tables.", rich_help_panel=HOW)] = False,
    *,
    whole: SuiteOptions,
    opening: ModelOptions,
) -> None:
    """Measure how good a model is: perplexity, bits per byte, multiple-choice accuracy, or a whole suite.

    Of a run's folder alone, its own held-out data is scored. Every token of a text is scored exactly once; texts
    longer than the model are read in overlapping windows. Of a question, the choice with the highest log-likelihood
    is the model's answer (acc), or the highest per character (acc_norm) or byte (acc_bytes).

    A suite is a file of evaluations: what the model writes, checked by verifiers or judged, and what it finds likely.
    Killed, the same command goes on.

    \b
    resilin evaluate runs/shakespeare                        held-out split
    resilin evaluate runs/shakespeare --step 400             older checkpoint
    resilin evaluate my-model --text a.txt --text b.txt      bits per byte
    resilin evaluate SmolLM2.gguf --choices arc.jsonl        accuracy
    resilin evaluate my-model --text a.txt --json > a.json   for scripts
    resilin evaluate runs/dpo --suite suite.toml --before sft.json   a table by skill
    """
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    others: dict[str, object] = {"--text": text, "--data": data, "--choices": choices, "--limit": limit}
    others |= {"--window": window, "--stride": stride, "--template": template, "--begin-token": begin_token}
    others["--split"] = split != "all"
    if whole.suite is not None:
        if foreign := [name for name, value in others.items() if value]:
            raise UserError(
                f"--suite names everything that is evaluated, and how: {', '.join(foreign)} cannot stand beside it; "
                "the lines of the suite's file have settings of their own"
            )
        evaluate_suite(lambda: opening.open(model), whole, batch_tokens, as_json)
        return
    if lost := whole.without_suite():
        raise UserError(f"{', '.join(lost)} belong to a suite: add --suite FILE")
    if window is not None and stride is not None and stride > window:
        raise UserError(f"--stride {stride} is more than --window {window}: some tokens would never be scored")
    opened = opening.open(model)
    options = {
        "window": window,
        "stride": stride,
        "template": template.replace("\\n", "\n") if template is not None else None,
        "begin_token": begin_token,
        "batch_tokens": batch_tokens,
        "split": split,
        "limit": limit,
    }
    jobs = _evaluations(opened, text or [], data or [], choices or [], options)
    rows = []
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        for name, job in jobs:
            task = bar.add_task(name, total=1.0)
            rows.append(job(lambda share, task=task: bar.update(task, completed=share)))  # type: ignore[misc]
    if as_json:
        report = {"model": str(model), "step": opened.step, "results": rows}
        typer.echo(json.dumps(report, indent=2))
    else:
        _tables(rows, opened.description)
