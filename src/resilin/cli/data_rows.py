"""`resilin data mix-rows | convert-rows | decontaminate | filter-rows`: preparing rows that are there."""

from __future__ import annotations

from collections.abc import Iterable
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
    to: Annotated[Literal["trl", "open-instruct", "verl", "sharegpt"], typer.Option(help="Whose form to write.")],
    kind: Annotated[
        Literal["preferences", "prompts", "conversations"],
        typer.Option(help="Two answers to compare, prompts with their truth, or answers to learn."),
    ] = "preferences",
) -> None:
    """Write rows in the form of another trainer; any of the known forms is read, and further columns are kept.

    \b
    preferences     trl: prompt, chosen, rejected; open-instruct: whole conversations; verl: answers as text
    prompts         trl: prompt, ground_truth, dataset; open-instruct: messages; verl: data_source, reward_model
    conversations   trl: prompt, completion; open-instruct: messages; verl: prompt, response; sharegpt
    """
    from resilin.data.conversation_rows import convert_conversation
    from resilin.data.errors import DataError
    from resilin.data.preference_rows import convert_preference
    from resilin.data.prompt_rows import convert_prompt
    from resilin.data.row_files import read_rows, write_rows

    rows = read_rows(inputs)
    if kind == "conversations":
        count = write_rows(output, (convert_conversation(row, to) for row in rows))
    elif to == "sharegpt":
        raise DataError(f"{kind} have no form in ShareGPT, which holds conversations: --to trl, open-instruct or verl")
    elif kind == "preferences":
        count = write_rows(output, (convert_preference(row, to) for row in rows))
    else:
        count = write_rows(output, (convert_prompt(row, to, number) for number, row in enumerate(rows)))
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
    parquet: Annotated[bool, typer.Option("--parquet", help="Write what is left as .parquet, not .jsonl.")] = False,
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
    counts = write_decontaminated(found, rows, tests, output, "parquet" if parquet else "jsonl")
    typer.echo(f"{output}: {counts['kept']:,} of {counts['rows']:,} rows kept, {counts['removed']:,} removed")
    typer.echo(found.table().rstrip())


def filter_rows(
    inputs: Rows,
    output: OutputFile,
    min_words: Annotated[int, typer.Option(min=0, help="Of an answer.")] = 1,
    keep_refusals: Annotated[bool, typer.Option("--keep-refusals", help="Keep answers that refuse.")] = False,
    keep_self_identification: Annotated[
        bool, typer.Option("--keep-self-identification", help="Keep answers that call themselves a model.")
    ] = False,
    keep_duplicates: Annotated[
        bool, typer.Option("--keep-duplicates", help="Keep rows that are there before, but for case and white space.")
    ] = False,
    dropped: Annotated[Path | None, typer.Option(help="Where to write what is left out, with its `reason`.")] = None,
) -> None:
    """Leave out conversations with empty, short or refusing answers, ones that name their maker, and duplicates."""
    from resilin.data.row_files import read_rows, write_rows
    from resilin.posttrain.filters import AnswerFilters, filter_conversations

    filters = AnswerFilters(min_words=min_words, refusals=keep_refusals, self_identification=keep_self_identification)
    kept, left_out = filter_conversations(list(read_rows(inputs)), filters, duplicates=keep_duplicates)
    write_rows(output, kept)
    if dropped is not None:
        write_rows(dropped, left_out)
    typer.echo(f"{output}: {len(kept):,} rows{by_reason(row['reason'] for row in left_out)}")


def by_reason(reasons: Iterable[str]) -> str:
    """How many were left out, by reason, as the end of a sentence."""
    from collections import Counter

    counts = sorted(Counter(reasons).items())
    return "; left out: " + ", ".join(f"{count:,} {reason}" for reason, count in counts) if counts else ""
