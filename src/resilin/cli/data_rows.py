"""`resilin data mix-rows | convert-rows | decontaminate | judge`: preparing rows of conversations and preferences."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Rows = Annotated[list[str], typer.Argument(help="Files of rows (.jsonl, .parquet, .arrow), folders or patterns.")]
OutputFile = Annotated[Path, typer.Option("--output", "-o", help="The .jsonl or .parquet file to write.")]


def mix_rows(
    entries: Annotated[
        list[str],
        typer.Argument(help='Names and amounts in turn: a.jsonl 0.5 b.jsonl 2000. "1.0" is all rows, "1" is one row.'),
    ],
    output: OutputFile,
    seed: Annotated[int, typer.Option(help="Which rows an amount takes.")] = 42,
) -> None:
    """Mix files of rows by fractions and counts, as open-instruct's mixer does; adds the column `source`."""
    from collections import Counter

    from resilin.data.mix_rows import mix, parse_mix
    from resilin.data.row_files import write_rows

    rows = mix([(entry.name, entry.amount) for entry in parse_mix(entries)], seed)
    write_rows(output, (row.value for row in rows))
    counts = Counter(str(row.value["source"]) for row in rows)
    parts = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    typer.echo(f"{output}: {len(rows):,} rows ({parts})")


def convert_rows(
    inputs: Rows,
    output: OutputFile,
    to: Annotated[Literal["trl", "open-instruct", "verl"], typer.Option(help="Whose form to write.")],
    kind: Annotated[
        Literal["preferences", "prompts"], typer.Option(help="Two answers to compare, or prompts with their truth.")
    ] = "preferences",
) -> None:
    """Write preference rows or prompts in the form of another trainer; any of the known forms is read."""
    from resilin.data.preference_rows import read_preference, write_preference
    from resilin.data.prompt_rows import read_prompt, write_prompt
    from resilin.data.row_files import read_rows, write_rows

    if kind == "preferences":
        count = write_rows(output, (write_preference(read_preference(row), to) for row in read_rows(inputs)))
    else:
        rows = enumerate(read_rows(inputs))
        count = write_rows(output, (write_prompt(read_prompt(row), to, extra={"index": n}) for n, row in rows))
    typer.echo(f"{output}: {count:,} rows in the form of {to}")


def decontaminate(
    inputs: Rows,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    test: Annotated[
        list[str], typer.Option("--test", help="A test set and its fields: gsm8k.jsonl:question, drop.jsonl:passage,qa")
    ],
    method: Annotated[Literal["ngram", "exact", "embedding"], typer.Option(help="How texts are compared.")] = "ngram",
    n: Annotated[int, typer.Option("--n", min=1, help="Words of an n-gram.")] = 8,
    threshold: Annotated[float, typer.Option(help="Scores above it are matches.")] = 0.5,
    key: Annotated[str | None, typer.Option(help="A text column to compare, instead of what users say.")] = None,
    encoder: Annotated[Path | None, typer.Option(help="Folder of a sentence encoder; else all-MiniLM-L6-v2.")] = None,
) -> None:
    """Leave out training rows that hold test instances; writes what is left, the matches and a table of shares."""
    from resilin.data.errors import DataError
    from resilin.data.row_files import Row, read_rows
    from resilin.inference.sentence_encoder import MeanPooled, packaged_encoder
    from resilin.posttrain.decontaminate import decontaminate as find
    from resilin.posttrain.decontaminate import read_test_set, write_decontaminated

    tests = []
    for given in test:
        path, _, fields = given.rpartition(":")
        if not path or not fields:
            raise DataError(f"--test {given}: expected a file and its fields, such as gsm8k.jsonl:question")
        tests.append(read_test_set(path, fields.split(",")))
    rows: list[Row] = []
    for name in inputs:
        label = Path(name).name
        for row in read_rows([name]):
            rows.append(row if row.value.get("source") else Row({**row.value, "source": label}, row.where))
    chosen = None
    if method == "embedding":
        chosen = packaged_encoder() if encoder is None else MeanPooled(encoder)
    found = find(rows, tests, method=method, n=n, threshold=threshold, key=key, encoder=chosen)
    counts = write_decontaminated(found, rows, tests, output)
    typer.echo(f"{output}: {counts['kept']:,} of {counts['rows']:,} rows kept, {counts['removed']:,} removed")
    typer.echo(found.table().rstrip())


def judge(
    inputs: Rows,
    output: OutputFile,
    teacher: Annotated[
        Path, typer.Option(help="A JSON or TOML file with the teacher: base_url, model, key_variable, limits, cache.")
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print calls and tokens, ask nothing.")] = False,
    own_model: Annotated[str | None, typer.Option(help="Refuse rows without an answer of this model.")] = None,
    seed: Annotated[int, typer.Option(help="Of the order of answers and of the rejected one.")] = 0,
) -> None:
    """Make preference rows from rows with several `responses`, rated by a teacher. Killed, it goes on where it was."""
    from resilin.data.row_files import read_rows, write_rows
    from resilin.posttrain.judge import TeacherRater, read_candidates
    from resilin.posttrain.judge import judge as rated
    from resilin.teacher.endpoint import read_teacher

    settings = read_teacher(teacher)
    rater = TeacherRater(settings.build(), settings.model_name(), seed=seed)
    candidates = [read_candidates(row, own_model=own_model) for row in read_rows(inputs)]
    if dry_run:
        typer.echo(str(rater.teacher.plan(rater.requests(candidates))))
        return
    judged = rated(candidates, rater, seed=seed)
    write_rows(output, judged.rows)
    lost = "".join(f", {count:,} {reason}" for reason, count in sorted(judged.dropped.items()))
    typer.echo(f"{output}: {len(judged.rows):,} pairs of {len(candidates):,} prompts{lost}")
    for where, reason in judged.failures[:5]:
        typer.secho(f"  {where}: {reason}", fg=typer.colors.YELLOW, err=True)
