"""`resilin data`: preparing text for training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from resilin.cli import data_rows, data_teacher

app = typer.Typer(
    help="Prepare data: unpack archives, write token shards, mix, convert, filter and decontaminate rows, let a "
    "teacher write and judge them.",
    no_args_is_help=True,
)

ROWS, TEACHER = "Rows of conversations, preferences and prompts", "Rows that a teacher writes or judges"
app.command(rich_help_panel=ROWS)(data_rows.mix_rows)
app.command(rich_help_panel=ROWS)(data_rows.convert_rows)
app.command(rich_help_panel=ROWS)(data_rows.decontaminate)
app.command(rich_help_panel=ROWS)(data_rows.filter_rows)
app.command(rich_help_panel=TEACHER)(data_teacher.complete)
app.command(rich_help_panel=TEACHER)(data_teacher.synthesize)
app.command(rich_help_panel=TEACHER)(data_teacher.respond)
app.command(rich_help_panel=TEACHER)(data_teacher.judge)

Inputs = Annotated[
    list[str], typer.Argument(help="Files, folders, 'glob/**/*.jsonl' patterns, or data sets saved by `datasets`.")
]
Output = Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")]
Key = Annotated[str, typer.Option(help="Where the document stands in a JSONL line or a table.")]
Separator = Annotated[
    str | None, typer.Option(help=r"What stands between documents of a text file ('\n\n'); else a file is one.")
]
FormatOption = Annotated[
    Literal["text", "jsonl", "parquet", "arrow"] | None, typer.Option(help="How files are read; else by ending.")
]
SplitOption = Annotated[str, typer.Option(help="Which split of a saved data set that has several.")]
OnErrorOption = Annotated[
    Literal["stop", "skip"], typer.Option(help="Stop at the first flawed document, or leave such out and count them.")
]


def _unescaped(text: str | None) -> str | None:
    return None if text is None else text.replace("\\n", "\n").replace("\\t", "\t")


@app.command()
def tokenize(
    inputs: Inputs,
    output: Output,
    tokenizer: Annotated[
        str, typer.Option("--tokenizer", "-t", help="A tokenizer.json, a folder that holds one, or 'bytes'.")
    ],
    kind: Annotated[
        Literal["text", "chat", "tokens"], typer.Option(help="Documents are text, conversations, or lists of ids.")
    ] = "text",
    key: Annotated[
        str | None,
        typer.Option(help="Where the document stands in a JSONL line or a table (text, messages, input_ids)."),
    ] = None,
    separator: Separator = None,
    format: FormatOption = None,
    split: SplitOption = "train",
    on_error: OnErrorOption = "stop",
    train_on: Annotated[
        Literal["assistant", "last", "all"], typer.Option(help="What of a conversation is to be learnt.")
    ] = "assistant",
    end: Annotated[bool, typer.Option(help="Append the end-of-text token to each document.")] = True,
    parse_special: Annotated[
        bool, typer.Option(help="Read a special token's text inside a document as that token.")
    ] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; one for each core if left out.")] = None,
) -> None:
    """Write memory-mapped token shards. Killed, it goes on where it was; the result never depends on the workers."""
    import time

    from resilin.data.inputs import find_inputs
    from resilin.data.progress import tokenize_progress
    from resilin.data.tokenize import tokenize_files
    from resilin.data.tokenize_options import TokenizeOptions
    from resilin.data.tokenizer import Tokenizer
    from resilin.data.train_tokenizer import byte_tokenizer

    loaded = byte_tokenizer() if tokenizer == "bytes" else Tokenizer.load(tokenizer)
    keys = {"text": "text", "chat": "messages", "tokens": "input_ids"}
    options = TokenizeOptions(
        kind=kind,
        key=key or keys[kind],
        separator=_unescaped(separator),
        add_end=end,
        parse_special=parse_special or kind == "chat",
        train_on=train_on,
        on_error=on_error,
    )
    found = find_inputs(inputs, format=format, split=split)
    began = time.perf_counter()
    try:
        with tokenize_progress("tokenising") as progress:
            shards, report = tokenize_files(found, output, loaded, options, workers=workers, progress=progress)
    except KeyboardInterrupt:
        typer.secho(f"{output}: stopped; the same command goes on from here", fg=typer.colors.YELLOW, err=True)
        raise
    seconds = time.perf_counter() - began
    size = found.bytes / 1e6
    how = "as they were" if report.reused else f"{size:,.1f} MB in {seconds:.1f} s ({size / seconds:.1f} MB/s)"
    typer.echo(f"{output}: {shards.token_count:,} tokens in {shards.document_count:,} documents, {how}")
    if report.summary():
        typer.secho(report.summary(), fg=typer.colors.YELLOW, err=True)
        for example in report.examples[:5]:
            typer.secho(f"  {example['where']}: {example['what']}", fg=typer.colors.YELLOW, err=True)


@app.command()
def train_tokenizer(
    inputs: Inputs,
    output: Output,
    vocab_size: Annotated[int, typer.Option(min=1, help="Entries of a byte-level BPE.")] = 4096,
    kind: Annotated[Literal["bpe", "bytes", "characters"], typer.Option(help="What to make.")] = "bpe",
    key: Key = "text",
    separator: Separator = None,
    format: FormatOption = None,
    split: SplitOption = "train",
    on_error: OnErrorOption = "stop",
    megabytes: Annotated[float, typer.Option(min=0.001, help="Learn from at most this much, drawn evenly.")] = 64.0,
) -> None:
    """Learn a tokenizer from text; `transformers.AutoTokenizer` opens the folder too."""
    from resilin.data.inputs import find_inputs
    from resilin.data.tokenize_options import TokenizeOptions
    from resilin.data.tokenizer_settings import training_texts
    from resilin.data.train_tokenizer import byte_tokenizer, character_tokenizer, train_bpe

    options = TokenizeOptions(key=key, separator=_unescaped(separator), on_error=on_error)
    texts = training_texts(find_inputs(inputs, format=format, split=split), options, int(megabytes * 1e6))
    if kind == "bpe":
        made = train_bpe(texts, vocab_size)
    else:
        made = byte_tokenizer() if kind == "bytes" else character_tokenizer(texts)
    made.save(output)
    typer.echo(f"{output}: a tokenizer of {made.vocab_size:,} entries")


@app.command()
def unpack(
    archive: Annotated[Path, typer.Argument(help="A .tar, .tar.gz, .zip or .whl file.")],
    members: Annotated[
        list[str], typer.Option("--members", "-m", help="Pattern of names to take, such as '*/texts/*_gut.txt'.")
    ],
    output: Output,
    encoding: Annotated[str, typer.Option(help="Of the texts in the archive.")] = "utf-8",
) -> None:
    """Take text files out of an archive, and nothing else; no name in it can lead out of the folder."""
    from resilin.data.unpack import unpack as unpack_archive

    files = unpack_archive(archive, members, output, encoding=encoding)
    size = sum(file.stat().st_size for file in files)
    typer.echo(f"{output}: {len(files)} files, {size / 1e6:.1f} MB")


@app.command()
def verify(folder: Annotated[Path, typer.Argument(help="A folder of token shards.")]) -> None:
    """Read token shards against their checksums; exit code 1 names what is damaged."""
    from resilin.data.shards import TokenShards

    shards = TokenShards(folder)
    problems = shards.verify()
    for problem in problems:
        typer.secho(f"{problem.where}: {problem.what}", fg=typer.colors.RED, err=True)
    if problems:
        raise typer.Exit(1)
    typer.echo(f"{folder}: {shards.token_count:,} tokens in {len(shards.shards)} shards, all as written")


@app.command()
def describe(
    path: Annotated[Path, typer.Argument(help="Token shards, or files that could become them.")],
    key: Key = "text",
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Documents, tokens, lengths, bytes a token, repeated text, splits, and what is wrong."""
    from json import dumps

    from resilin.data.describe import describe as describe_data
    from resilin.data.describe import describe_text

    described = describe_data(path, key=key)
    typer.echo(dumps(described, indent=1) if json else describe_text(described))
