"""`resilin inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resilin.cli.arguments import split_settings
from resilin.cli.stages import STAGES, StageName, stage_settings
from resilin.config.errors import UserError

if TYPE_CHECKING:
    from resilin.run.settings import RunSettings


def inspect(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="WHAT [KEY=VALUE]...", help="Settings file, run, checkpoint, model or token shards."),
    ],
    verify: Annotated[bool, typer.Option(help="Also read everything and compare checksums.")] = False,
    stage: Annotated[
        StageName | None, typer.Option(help="The settings file is one for this command: resilin sft, dpo, ...")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Settings file: also who would do what among so many workers.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="With --workers: draw it into this file (svg, png).")] = None,
) -> None:
    """Tell what something is, without running it.

    A settings file: what would run, with its parameters, memory and FLOPs. A run's folder: how far it came and what
    lies where. A checkpoint: its tensors. A Hugging Face folder or .gguf: the model. Token shards: the data.

    \b
    resilin inspect run.toml model.layers=12
    resilin inspect run.toml --workers 8 parallel.tensor=2 parallel.pipeline=2
    resilin inspect chat.toml --stage sft
    resilin inspect runs/shakespeare
    resilin inspect runs/shakespeare/checkpoints/step-00000300 --verify
    resilin inspect .cache/resilin/shards-... --verify
    """
    file, overrides = split_settings(arguments)
    if file is None:
        raise UserError("inspect needs something to look at: a settings file, a folder, or a .gguf file")
    if picture is not None and workers is None:
        raise UserError("--picture draws who does what: give --workers too")
    if workers is not None:
        if file.suffix != ".toml":
            raise UserError(f"{file}: --workers goes with a settings file only")
        overrides = [*overrides, f"parallel.workers={workers}"]
        from resilin.run.who_does_what import degrees_of, who_does_what

        degrees_of(settings_of(file, overrides, stage), workers)  # a wrong product is told before all else
    print_facts(facts_of(file, overrides, verify=verify, stage=stage))
    if workers is not None:
        from resilin.cli.division import print_division

        division = who_does_what(settings_of(file, overrides, stage), workers)
        print_division(division)
        if picture is not None:
            from resilin.run.division_picture import draw_division

            draw_division(division, picture)


def settings_of(path: Path, overrides: list[str], stage: StageName | None = None) -> RunSettings:
    """The settings of a file: of `resilin train`, or of a stage."""
    from resilin.config import load_settings
    from resilin.run.settings import RunSettings

    if stage is not None:
        return stage_settings(STAGES[stage], path, overrides)
    return load_settings(RunSettings, path, overrides)


def facts_of(
    path: Path, overrides: list[str], *, verify: bool, stage: StageName | None = None
) -> dict[str, list[tuple[str, str]]]:
    """The facts about whatever lies at a path."""
    from resilin.run import look

    if path.suffix == ".toml":
        return look.at_settings(settings_of(path, overrides, stage))
    if stage is not None:
        raise UserError(f"{path}: --stage goes with a settings file only")
    if overrides:
        raise UserError(f"{path}: overrides ({overrides[0]}) go with a settings file only")
    return look.at_path(path, verify=verify)


def print_facts(facts: dict[str, list[tuple[str, str]]]) -> None:
    """Show facts as a table: group, name, text."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for group, rows in facts.items():
        for index, (name, text) in enumerate(rows):
            table.add_row("" if index else group, name, text)
        table.add_row()
    Console(highlight=False).print(table)
