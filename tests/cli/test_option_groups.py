"""Options declared once for several commands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from resilin.cli.option_groups import with_option_groups


@dataclass(frozen=True)
class Where:
    folder: Annotated[Path | None, typer.Option(help="Where it goes.")] = None
    force: Annotated[bool, typer.Option("--force", help="Replace it.")] = False


@with_option_groups
def write(text: Annotated[str, typer.Argument()], where: Where, times: int = 1) -> None:
    """Write a text."""
    typer.echo(f"{text} {where} {times}")


def test_a_group_s_fields_are_options_and_the_command_gets_the_group() -> None:
    app = typer.Typer()
    app.command()(write)
    run = CliRunner()
    assert f"hello {Where()} 1" in run.invoke(app, ["hello"]).output
    told = run.invoke(app, ["hello", "--folder", "a", "--force", "--times", "3"])
    assert f"hello {Where(Path('a'), True)} 3" in told.output
    shown = run.invoke(app, ["--help"], env={"COLUMNS": "100"}).output
    assert all(part in shown for part in ("--folder", "Where it goes.", "--force", "--times", "Write a text."))
    assert run.invoke(app, ["hello", "--nothing"]).exit_code == 2


def test_two_options_of_one_name_are_refused() -> None:
    def twice(force: int, where: Where) -> None: ...

    with pytest.raises(TypeError, match="an option of one name"):
        with_option_groups(twice)
