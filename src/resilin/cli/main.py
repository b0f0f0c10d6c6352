"""The `resilin` command: its guide, and how errors and interrupts reach the user."""

from __future__ import annotations

import atexit
import os
import sys
import traceback
import warnings
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import typer

from resilin import __version__
from resilin.cli import adapter, bench, chains, checkpoint, cluster, data, experts, layout, plan, recipes
from resilin.cli.chaos import chaos
from resilin.cli.evaluate import evaluate
from resilin.cli.export import export
from resilin.cli.extract import extract
from resilin.cli.family import family
from resilin.cli.generate import generate
from resilin.cli.inspect import inspect
from resilin.cli.nest import nest
from resilin.cli.reproduce import reproduce
from resilin.cli.stages import dpo, reward, rl, sft
from resilin.cli.train import train
from resilin.cli.watch import watch
from resilin.config.errors import UserError

GUIDE = """Elastic training for PyTorch: one run that keeps going, and stays right,
while everything around it changes.

[bold]A first model, from text to conversation[/bold]

  resilin train examples/shakespeare.toml            Ctrl-C saves
  resilin train examples/shakespeare.toml --resume   goes on, to the bit
  resilin evaluate runs/shakespeare --text FILE      perplexity, bits per byte
  resilin generate runs/shakespeare -p "To be"       writes text
  resilin export runs/shakespeare my-model           a Hugging Face folder

Settings are a TOML file plus dotted overrides:
  [cyan]resilin train run.toml train.steps=200 optimizer.lr=3e-4[/cyan]
[cyan]resilin train run.toml --print-config[/cyan] shows every setting there is,
[cyan]resilin inspect run.toml[/cyan] what would run.
"""

app = typer.Typer(
    name="resilin",
    help=GUIDE,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

TRAINING, POST_TRAINING = "Train", "Train further: conversations, preferences, verifiable rewards"
USING, METHODS = "Use a trained model", "Data, plans and published methods"
app.command(rich_help_panel=TRAINING)(train)
app.command(rich_help_panel=POST_TRAINING)(sft)
app.command(rich_help_panel=POST_TRAINING)(reward)
app.command(rich_help_panel=POST_TRAINING)(dpo)
app.command(rich_help_panel=POST_TRAINING)(rl)
app.command(rich_help_panel=TRAINING)(inspect)
app.command(rich_help_panel=TRAINING)(watch)
app.command(rich_help_panel=TRAINING)(chaos)
app.command(rich_help_panel=USING)(evaluate)
app.command(rich_help_panel=USING)(generate)
app.command(rich_help_panel=USING)(export)
app.command(rich_help_panel=USING)(nest)
app.command(rich_help_panel=USING)(family)
app.command(rich_help_panel=USING)(extract)
app.add_typer(checkpoint.app, name="checkpoint", rich_help_panel=TRAINING)
app.add_typer(cluster.app, name="cluster", rich_help_panel=TRAINING)
app.add_typer(adapter.app, name="adapter", rich_help_panel=USING)
app.add_typer(chains.app, name="chains", rich_help_panel=USING)
app.add_typer(experts.app, name="experts", rich_help_panel=USING)
app.add_typer(data.app, name="data", rich_help_panel=METHODS)
app.add_typer(plan.app, name="plan", rich_help_panel=METHODS)
app.add_typer(layout.app, name="layout", rich_help_panel=METHODS)
app.add_typer(recipes.app, name="recipes", rich_help_panel=METHODS)
app.command(rich_help_panel=METHODS)(reproduce)
app.add_typer(bench.app, name="bench", rich_help_panel=METHODS)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"resilin {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Print the version."),
) -> None: ...


def _show_warning(message: Warning | str, category: type[Warning], filename: str, *place: object) -> None:
    """Ours as one line for people; those of other packages as Python shows them."""
    if issubclass(category, UserWarning) and Path(filename).is_relative_to(Path(__file__).parents[1]):
        typer.secho(f"warning: {message}", fg=typer.colors.YELLOW, err=True)
    else:
        _python_shows(message, category, filename, *place)  # type: ignore[arg-type]


_python_shows = warnings.showwarning


def _end(error: Exception) -> int:
    """Tell of an error; gives the exit code. What a user can mend has no traceback."""
    from resilin.cluster.failure import REPORT, StrandedError, leave_report

    plain = isinstance(error, UserError) and not os.environ.get("RESILIN_TRACEBACK")
    code = 2 if plain and not isinstance(error, StrandedError) else 1
    told = f"error: {error}" if plain else "".join(traceback.format_exception(error)).rstrip()
    if REPORT in os.environ:  # a worker, whose launcher tells why one failed
        leave_report(error, str(error) if plain else told, code)
    if os.environ.get("RANK", "0") != "0" or REPORT not in os.environ:  # else the launcher writes to this terminal
        typer.secho(told, fg=typer.colors.RED if plain else None, err=True)
    return code


def main() -> None:
    """Run the command line; what a user can mend is told without a traceback, with exit code 2."""
    # A user's own methods are found in the folder the command is given in, as `python -m` finds modules; last, so that
    # no file there can hide an installed package.
    sys.path.append(str(Path.cwd()))
    warnings.showwarning = _show_warning  # type: ignore[assignment]  # the last arguments are only passed on
    from resilin.cluster.position import MEMBER

    code = _run()
    if MEMBER in os.environ:
        _end_at_once(code)
    sys.exit(code)


def _run() -> int:
    try:
        app()
    except BrokenPipeError:
        # The reader of our output (head, less) has gone: not an error; keep Python from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        return _end(error)
    except KeyboardInterrupt:
        return 130
    except SystemExit as left:
        if isinstance(left.code, str):
            typer.echo(left.code, err=True)
        return left.code if isinstance(left.code, int) else int(left.code is not None)
    return 0


def _end_at_once(code: int) -> NoReturn:
    """End a worker of an elastic run: threads may be in gloo, which does not bear that Python ends around them."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
