"""`resilin plan`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resilin.cli.arguments import split_settings
from resilin.cli.default_command import with_default
from resilin.cli.option_groups import with_option_groups
from resilin.cli.plan_budget import budget
from resilin.cli.plan_failures import failures

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    cls=with_default("run"), no_args_is_help=True, help="Choose model size, steps and data, or a layout on a cluster."
)
app.command()(failures)
app.command()(budget)
LAYOUT = "The layout on a cluster (--cluster)"


class ObjectiveName(StrEnum):
    """What layouts are ranked by."""

    time = "time"
    cost = "cost"
    energy = "energy"


@dataclass(frozen=True, slots=True)
class LayoutOptions:
    """What a plan of a layout takes beside the settings and `--tokens`."""

    cluster: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=LAYOUT, help="A machine by name (dgx-a100-40, dgx-h100, frontier, ...), or its .toml file."
        ),
    ] = None
    workers: Annotated[int, typer.Option(rich_help_panel=LAYOUT, min=0, help="Devices that may be used.")] = 0
    model: Annotated[
        str | None, typer.Option(rich_help_panel=LAYOUT, help="A model by name (gpt-13b, llama3-8b, ...), or a file.")
    ] = None
    by: Annotated[ObjectiveName, typer.Option(rich_help_panel=LAYOUT, help="What to rank by.")] = ObjectiveName.time
    fewer: Annotated[
        bool, typer.Option("--fewer", rich_help_panel=LAYOUT, help="Fewer devices may be used, by whole nodes.")
    ] = False
    cluster_set: Annotated[
        list[str] | None,
        typer.Option(rich_help_panel=LAYOUT, metavar="KEY=VALUE", help="Laid over the machine's file."),
    ] = None
    write: Annotated[
        Path | None, typer.Option(rich_help_panel=LAYOUT, help="Write settings that run the best layout.")
    ] = None
    top: Annotated[int, typer.Option(rich_help_panel=LAYOUT, min=1, help="How many of the best to print.")] = 5


@app.command("run", hidden=True)
@with_option_groups
def plan(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SETTINGS.toml] [KEY=VALUE]...",
            help="A run's settings, whose model gives the family its proportions. Default: 12 layers of width 768.",
        ),
    ] = None,
    flops: Annotated[float | None, typer.Option(help="Budget: floating-point operations, 6 P a token.")] = None,
    hours: Annotated[float | None, typer.Option(help="Budget: wall-clock; steps are timed here at 3 sizes.")] = None,
    tokens: Annotated[float | None, typer.Option(help="Budget: tokens to process.")] = None,
    adjust: Annotated[bool, typer.Option("--adjust", help="Budget: what the settings' own run costs.")] = False,
    available_tokens: Annotated[
        float | None, typer.Option(help="Unique tokens there are. Default: counted in the settings' source.")
    ] = None,
    duplicate_rate: Annotated[
        float | None, typer.Option(help="Share of them that repeats other parts. Default: estimated from the source.")
    ] = None,
    rho: Annotated[str, typer.Option(help="Tokens per parameter to aim for: a number, or auto.")] = "auto",
    faithful: Annotated[bool, typer.Option("--faithful", help="auto: the paper's 5 instead of the later 20.")] = False,
    pilots: Annotated[bool, typer.Option("--pilots", help="auto: train 3 small runs for 2% of the budget.")] = False,
    fit: Annotated[
        list[Path] | None, typer.Option(help="A run folder whose loss curve predicts losses; may be repeated.")
    ] = None,
    watch: Annotated[
        Path | None, typer.Option(help="A run folder: print the power law of its loss so far instead of planning.")
    ] = None,
    floor: Annotated[bool, typer.Option("--floor", help="Fit loss curves with an irreducible part.")] = False,
    batch_tokens: Annotated[int | None, typer.Option(help="b, tokens of a step. Default: the settings' batch.")] = None,
    keep_dropout: Annotated[bool, typer.Option("--keep-dropout", help="Do not set dropout to 0.")] = False,
    *,
    layout: LayoutOptions,
) -> None:
    """Choose model size, steps and data together, so that every token is used once; or, on a cluster, the layout.

    Prints the candidate sizes with T/P, epochs and flags, the chosen one,
    how much data to ask for where it is short, and the overrides that train
    it. P counts parameters without embeddings, T tokens; rho is the T/P to
    aim for.

    \b
    resilin plan --flops 1e18 --available-tokens 5e8
    resilin plan run.toml --hours 2
    resilin plan run.toml --adjust --rho 5
    resilin plan run.toml --flops 1e15 --fit runs/small --fit runs/large
    resilin plan --watch runs/small

    With --cluster it chooses how a given model is divided: degrees of
    parallelism, micro-batch, pipeline schedule, recomputation, precision, for
    a run of --tokens. Overrides of these are kept as they are said.

    \b
    resilin plan --model gpt-13b --cluster dgx-a100-40 --workers 24 --tokens 2e11
    resilin plan run.toml --cluster mine.toml --workers 4 --tokens 1e8 --write planned.toml
    resilin plan calibrate mine.toml        measures this machine
    """
    from rich.console import Console

    from resilin.config.errors import UserError

    console = Console()
    if watch is not None:
        from resilin.planner.watch import watch_run

        watch_run(watch, lambda line: console.print(line, highlight=False), floor)
        return
    file, overrides = split_settings(arguments or [])
    if layout.cluster is not None:
        _plan_layout(layout, file, overrides, tokens, batch_tokens, console)
        return
    if sum(budget is not None for budget in (flops, hours, tokens)) + adjust != 1:
        raise UserError("give one budget: --flops 1e18, --hours 2, --tokens 1e9, or --adjust with a settings file")
    from resilin.planner.report import report
    from resilin.planner.request import PlanRequest, answer_request

    request = PlanRequest(
        file=file,
        overrides=tuple(overrides),
        flops=flops,
        hours=hours,
        tokens=tokens,
        available_tokens=available_tokens,
        duplicate_rate=duplicate_rate,
        rho=rho,
        mode="faithful" if faithful else "practical",
        pilots=pilots,
        fits=tuple(fit or ()),
        floor=floor,
        batch_tokens=batch_tokens,
        keep_dropout=keep_dropout,
    )
    answer = answer_request(request, adjust, lambda line: console.print(line, highlight=False))
    report(answer.plan, answer.notes, answer.overrides, console)


def _plan_layout(
    layout: LayoutOptions,
    file: Path | None,
    overrides: list[str],
    tokens: float | None,
    batch_tokens: int | None,
    console: Console,
) -> None:
    from resilin.config.errors import UserError
    from resilin.planner.search.report import report_layout
    from resilin.planner.search.request import LayoutRequest, answer_layout, launch_command, settings_of

    if file is not None and layout.model is not None:
        raise UserError(f"the model is said twice: by --model {layout.model} and by {file}")
    assert layout.cluster is not None
    request = LayoutRequest(
        cluster=layout.cluster,
        workers=layout.workers,
        tokens=tokens,
        model=layout.model if file is None else str(file),
        overrides=tuple(overrides),
        cluster_overrides=tuple(layout.cluster_set or ()),
        batch_tokens=batch_tokens,
        objective=layout.by.value,
        fewer=layout.fewer,
    )
    answer = answer_layout(request)
    report_layout(answer, console, top=layout.top)
    if not answer.found.best:
        raise typer.Exit(1)
    best = answer.found.best[0].step
    if layout.write is not None:
        layout.write.write_text(settings_of(answer, best), encoding="utf-8")
        console.print(f"wrote {layout.write}", highlight=False, soft_wrap=True)
        console.print(f"  {launch_command(answer, best, str(layout.write))}", highlight=False, soft_wrap=True)


@app.command("calibrate")
def calibrate_command(
    file: Annotated[Path, typer.Argument(help="The .toml file to write, which --cluster then takes.")],
    processes: Annotated[int, typer.Option(min=2, help="Processes that exchange tensors.")] = 2,
    folder: Annotated[Path, typer.Option(help="On the disk that checkpoints go to.")] = Path(),
) -> None:
    """Measure this machine, and write its description: products, memory, links, disk, and a model's passes.

    Takes about a minute; nothing else should run meanwhile. Prices, power
    and failures are not measured: add them to the file.

    \b
    resilin plan calibrate mine.toml
    resilin plan run.toml --cluster mine.toml --workers 2 --tokens 1e7
    """
    from resilin.config import UserError, settings_to_toml
    from resilin.planner.calibrate import calibrate

    if file.suffix != ".toml":
        raise UserError(f"{file}: a machine's file ends in .toml")
    found = calibrate(folder, processes, typer.echo)
    file.write_text(settings_to_toml(found), encoding="utf-8")
    typer.echo(f"wrote {file}")


@app.command("tune")
def tune_command(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[SETTINGS.toml] [KEY=VALUE]...", help="Of the run, data included.")
    ] = None,
    cluster: Annotated[str, typer.Option(help="The machine: a name or a .toml file.")] = "laptop",
    workers: Annotated[int, typer.Option(min=1, help="Devices to use.")] = 2,
    trials: Annotated[int, typer.Option(min=1, help="How many in all, those of the folder included.")] = 12,
    steps: Annotated[int, typer.Option(min=1, help="Steps of a trial that count; two more come first.")] = 4,
    timeout: Annotated[float, typer.Option(help="Seconds after which a trial has failed.")] = 300.0,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0,
    first: Annotated[int, typer.Option(min=0, help="Trials of the cost model's best.")] = 3,
    drawn: Annotated[int, typer.Option(min=0, help="Trials at random, after these.")] = 3,
    gain: Annotated[
        float, typer.Option(min=0, help="End when less is expected to be gained, as a share; 0: use all trials.")
    ] = 0.01,
    sampler: Annotated[str, typer.Option(help="What proposes: trees, tpe (of optuna) or chance.")] = "trees",
    earlier: Annotated[
        list[Path] | None, typer.Option(help="A folder of another study, to learn from; may be repeated.")
    ] = None,
    at_once: Annotated[int, typer.Option(min=1, help="Trials that run at the same time.")] = 1,
    folder: Annotated[Path, typer.Option(help="Of the study; one that is there goes on.")] = Path("runs/tune"),
    simulate: Annotated[bool, typer.Option("--simulate", help="Try by the cost model; run nothing.")] = False,
    write: Annotated[Path | None, typer.Option(help="Write settings that run the best layout.")] = None,
) -> None:
    """Find the quickest layout by short real runs: the cost model's best first, then what a surrogate proposes.

    Trees learn by how much the cost model is wrong, and what fails (memory,
    a crash, --timeout); the study ends when less than --gain is expected of
    what is left. Trials are written to FOLDER/trials.jsonl at once; the same
    command goes on where it was interrupted. At the end: which choices
    mattered.

    \b
    resilin plan tune run.toml --cluster mine.toml --workers 2 --trials 12
    """
    from resilin.planner.search.request import LayoutRequest, overrides_of, settings_of
    from resilin.planner.tune.request import TuneOptions, predicted_of, study_of
    from resilin.planner.tune.sensitivity import sensitivity, told
    from resilin.planner.tune.trial import Trial

    file, overrides = split_settings(arguments or [])

    def tell(trial: Trial) -> None:
        out = trial.outcome
        said = f"{out.rate:,.0f} tokens/s" if out.status == "ok" else f"{out.status}: {out.reason}"
        typer.echo(f"{trial.number + 1:3d}  {trial.layout}: {said}")

    request = LayoutRequest(cluster, workers, None, None if file is None else str(file), tuple(overrides))
    options = TuneOptions(
        trials, steps, timeout, seed, simulate, first, drawn, gain, at_once, sampler, tuple(earlier or ())
    )
    asked, study = study_of(request, folder, options, tell)
    best = study.best
    if best is None:
        typer.echo(f"all {len(study.trials)} trials failed; of {len(study.plans)} layouts")
        raise typer.Exit(1)
    typer.echo(f"best of {len(study.trials)} trials, {len(study.plans)} layouts: {best.layout}")
    if study.gain < gain:
        typer.echo(f"of what is left, {study.gain:.2%} more is expected: less than --gain {gain:.2%}")
    mattered = sensitivity(study, seed)
    if mattered:
        typer.echo("what mattered (and what each value did):")
    for line in told(mattered):
        typer.echo(f"  {line}")
    step = predicted_of(asked, study.plan_of(best))
    typer.echo("  " + " ".join(overrides_of(step)))
    if write is not None:
        write.write_text(settings_of(asked, step), encoding="utf-8")
        typer.echo(f"wrote {write}")
