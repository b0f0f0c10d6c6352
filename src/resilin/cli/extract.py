"""`resilin extract`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resilin.cli.family_options import SizeOptions, TextOptions
from resilin.cli.model_options import DTypeName, ModelArgument, StepOption, TokenizerOption
from resilin.cli.option_groups import with_option_groups

if TYPE_CHECKING:
    from resilin.models.decoder import Decoder
    from resilin.models.decoder_settings import DecoderSettings
    from resilin.nested.budgets import Budget
    from resilin.nested.rungs import SizeRecord
    from resilin.run.open_model import OpenedModel

WHICH = "Which member"


def _chosen(model: Decoder, record: SizeRecord, params: str | None, flops: str | None, latency: str | None) -> Budget:
    from resilin.nested.cost import latency as measured
    from resilin.nested.mix_n_match import largest_within, measured_by
    from resilin.nested.quantities import count_of, seconds_of

    settings, rungs = model.settings, record.rungs(model.settings)
    if params is not None:
        return largest_within(rungs, measured_by(settings, "params"), count_of(params))[1]
    if flops is not None:
        return largest_within(rungs, measured_by(settings, "flops"), count_of(flops))[1]
    assert latency is not None
    prompt = min(64, settings.max_positions - 1)
    return largest_within(rungs, lambda wanted: measured(model, wanted, prompt=prompt).token, seconds_of(latency))[1]


def _why(settings: DecoderSettings) -> str:
    """What no stock architecture has."""
    if settings.chains is not None:
        return "layers have chains"
    if settings.sizes_differ:
        return "layers have different sizes"
    return "layers are looped" if settings.loop is not None else "experts have offsets, or are weighted by sigmoids"


def _by_use(
    opened: OpenedModel, reading: TextOptions, layers: int | None, experts: int | None, top_k: int | None
) -> Budget:
    """The most used experts and the best layers on some text."""
    from resilin.config.errors import UserError
    from resilin.nested.deploy import deployable

    batches = reading.batches(opened, own=True)
    if batches is None:
        raise UserError("--layers and --experts choose by reading text: give --text FILE or --data SHARDS")
    found = deployable(opened.model, batches, layers=layers, experts=experts, top_k=top_k)
    for one in found:
        typer.echo(f"{one.quality.loss:.4f}  {one.wanted}")
    return found[0].wanted


@with_option_groups
def extract(
    model: ModelArgument,
    output: Annotated[Path, typer.Argument(help="The folder to write.")],
    params: Annotated[
        str | None, typer.Option(help="The largest with at most so many parameters: 20M.", rich_help_panel=WHICH)
    ] = None,
    flops: Annotated[str | None, typer.Option(help="... operations for a token: 50M.", rich_help_panel=WHICH)] = None,
    latency: Annotated[
        str | None, typer.Option(help="... time for a token, measured here: 20ms.", rich_help_panel=WHICH)
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="This one: a JSON file, or ffn=512,skip=3+4.", rich_help_panel=WHICH)
    ] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="So many layers: those that do best on the text.", rich_help_panel=WHICH)
    ] = None,
    experts: Annotated[
        int | None,
        typer.Option(min=1, help="So many experts of each layer: the most used on the text.", rich_help_panel=WHICH),
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="So many experts to a token.", rich_help_panel=WHICH)] = None,
    dtype: Annotated[DTypeName, typer.Option(help="Of the stored weights.")] = "float32",
    force: Annotated[bool, typer.Option("--force", help="Replace the files of an earlier export in OUTPUT.")] = False,
    step: StepOption = None,
    tokenizer: TokenizerOption = None,
    *,
    sizes: SizeOptions,
    reading: TextOptions,
) -> None:
    """Cut a member out of a nested model, as an ordinary model; nothing is trained.

    With --params, --flops or --latency the largest member is taken that keeps to it: layers at two neighbouring trained
    sizes, the larger one in the deeper layers (Mix'n'Match). Where all layers get the same size the folder is one of a
    stock architecture, which transformers opens; where they differ, its config.json is our own and only resilin opens
    it. Of a Hugging Face folder only the bytes of the member are read.

    \b
    resilin extract runs/nested small --budget ffn=128
    resilin extract runs/nested small --params 20M
    resilin extract runs/nested small --latency 20ms
    resilin extract runs/elastic small --layers 12 --experts 32 --top-k 2     by its held-out data, or --text
    """
    import torch

    from resilin.cli.export import READ_BACK, tell_files
    from resilin.config.errors import UserError
    from resilin.models.own_config import has_own_config
    from resilin.nested.budgets import Budget
    from resilin.nested.cost import cost
    from resilin.nested.extract import extract as taken_out
    from resilin.nested.extract import extract_folder
    from resilin.run.export import check_output, export_model
    from resilin.run.open_model import open_model, open_outline

    by_use = any(size is not None for size in (layers, experts, top_k))
    given = [value for value in (params, flops, latency, budget) if value is not None]
    if len(given) + by_use != 1:
        raise UserError(
            "say which member: one of --params, --flops, --latency and --budget, or any of --layers, --experts, --top-k"
        )
    check_output(output, force=force)
    wanted = Budget.parse(budget) if budget is not None else None
    read = latency is not None or by_use
    outline = open_outline(model, tokenizer) if not read and step is None else None
    opened = outline or open_model(model, step=step, tokenizer=tokenizer, device="cpu")
    full, record = opened.model.settings, sizes.known(model, opened)
    if by_use:
        wanted = _by_use(opened, reading, layers, experts, top_k)
    if wanted is None:
        record = sizes.record(model, opened)
        wanted = _chosen(opened.model, record, params, flops, latency)
    small = taken_out(opened.model, wanted) if outline is None else extract_folder(model, wanted)
    files = export_model(small, opened.tokenizer, output, dtype=getattr(torch, dtype), force=force)
    told, whole = cost(full, wanted), cost(full, Budget())
    tell_files(f"{opened.description} -> {output}: {wanted}", files)
    typer.echo(f"{told.parameters:,} of {whole.parameters:,} parameters. {READ_BACK}")
    kind = "untrained" if record is None else record.kind(full, wanted)
    if kind == "untrained":
        typer.secho(
            "Nothing tells that the model was trained at this size: expect it to be bad until it is.",
            fg=typer.colors.YELLOW,
            err=True,
        )
    if has_own_config(small.settings):
        typer.echo(f"Its {_why(small.settings)}: resilin opens it, transformers does not.")
    if opened.tokenizer is None:
        typer.echo("No tokenizer was found: AutoTokenizer will not open this folder (see --tokenizer).")
