"""`resilin family`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resilin.cli.family_options import SizeOptions, TextOptions
from resilin.cli.model_options import ModelArgument, ModelOptions
from resilin.cli.option_groups import with_option_groups

if TYPE_CHECKING:
    from resilin.nested.family import Evaluated

WHAT = "Which members"


def _table(found: list[Evaluated], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("size", overflow="fold")
    table.add_column("")
    for name in ("parameters", "MFLOP/token", "KV B/token", "ms/token", "loss", "perplexity", "agreement", "KL"):
        table.add_column(name, justify="right")
    for one in found:
        row = one.row()
        seconds = f"{1e3 * one.seconds.token:.2f}" if one.seconds is not None else "-"
        quality = ("-",) * 4
        if one.quality is not None:
            q = one.quality
            quality = (f"{q.loss:.4f}", f"{row['perplexity']:.4g}", f"{q.agreement:.4f}", f"{q.kl:.4f}")
        figures = (f"{one.cost.parameters:,}", f"{one.cost.flops / 1e6:,.2f}", f"{one.cost.kv_bytes:,}", seconds)
        table.add_row(one.member.name, one.member.kind, *figures, *quality)
    Console().print(table)


@with_option_groups
def family(
    model: ModelArgument,
    between: Annotated[int, typer.Option(min=0, help="Mixtures between two trained sizes.", rich_help_panel=WHAT)] = 1,
    budget: Annotated[
        list[str] | None,
        typer.Option(help="A further member: a JSON file, or ffn=512,skip=3+4.", rich_help_panel=WHAT),
    ] = None,
    timed: Annotated[bool, typer.Option(help="Time each member on this machine.")] = True,
    plot: Annotated[Path | None, typer.Option(help="Write the picture of loss against cost here (PNG).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, no table.")] = False,
    *,
    sizes: SizeOptions,
    reading: TextOptions,
    opening: ModelOptions,
) -> None:
    """Evaluate the members of a nested model: what each costs, how good it is, how often it agrees with the whole.

    Members are the trained sizes and, between them, mixtures by layer (Mix'n'Match: larger sizes in deeper layers).
    Each is run inside the one model; nothing is extracted. Of a run's folder alone, its held-out data is read.

    \b
    resilin family runs/nested                                   trained sizes, one mixture between each
    resilin family runs/nested --between 3 --plot family.png     a finer line, and its picture
    resilin family my-model --text a.txt --granularities 0.5,1   a model that nothing is known of
    resilin family runs/nested --budget ffn=96,skip=3            a budget of your own beside them
    """
    from resilin.config.errors import UserError
    from resilin.nested.budgets import Budget
    from resilin.nested.family import evaluate_family, members_of, plot_family

    more = [Budget.parse(text) for text in budget or ()]
    opened = opening.open(model)
    members = members_of(opened.model.settings, sizes.record(model, opened), between=between, more=more)
    batches = reading.batches(opened, own=True)
    if batches is None and plot is not None:
        raise UserError("--plot shows losses: give --text FILE or --data SHARDS")
    found = evaluate_family(opened.model, members, batches, timed=timed)
    if as_json:
        typer.echo(json.dumps({"model": str(model), "members": [one.row() for one in found]}, indent=2))
    else:
        _table(found, opened.description)
    untrained = sum(member.kind == "untrained" for member in members)
    if untrained:
        typer.echo(
            f"{untrained} of these were not trained: their losses are those of a cut that nothing prepared.", err=True
        )
    if plot is not None and not plot_family(found, plot, opened.description):
        typer.echo("No picture: matplotlib is not installed (pip install resilin[plots]).", err=True)
