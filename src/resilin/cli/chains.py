"""`resilin chains expand`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from resilin.cli.model_options import DTypeName, ModelArgument, StepOption, TokenizerOption

app = typer.Typer(help="Decoders of chains: let a trained model grow, with what it was inside.", no_args_is_help=True)


@app.callback()
def chains() -> None:
    """Decoders of chains: let a trained model grow, with what it was inside."""


@app.command()
def expand(
    model: ModelArgument,
    output: Annotated[Path, typer.Argument(help="The folder to write.")],
    heads: Annotated[int, typer.Option(min=1, help="Query heads of the new chain; its width follows from them.")],
    neurons: Annotated[
        int | None, typer.Option(min=1, help="Of its feed-forward. Default: in proportion to the heads.")
    ] = None,
    share_keys: Annotated[
        bool | None,
        typer.Option("--share-keys/--own-keys", help="CoLM-Air: the new chain reads the keys that are there."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the new weights.")] = 0,
    dtype: Annotated[DTypeName, typer.Option(help="Of the stored weights.")] = "float32",
    force: Annotated[bool, typer.Option("--force", help="Replace the files of an earlier export in OUTPUT.")] = False,
    step: StepOption = None,
    tokenizer: TokenizerOption = None,
) -> None:
    """Give a trained model one more chain: a wider model that computes the same until the new chain is trained.

    The model becomes the first chain and is frozen; settings to train the new one are printed. Its folder has a config
    of our own: resilin opens it, transformers does not; `resilin extract --budget chains=1` gives the old model back.

    \b
    resilin chains expand smollm2 smollm2-wider --heads 3
    resilin chains expand runs/mine wider --heads 8 --share-keys
    """
    import torch

    from resilin.cli.export import tell_files
    from resilin.models.flops import parameter_counts
    from resilin.nested.chain_expand import expand as expanded
    from resilin.run.export import check_output, export_model
    from resilin.run.open_model import open_model

    check_output(output, force=force)
    opened = open_model(model, step=step, tokenizer=tokenizer, device="cpu")
    made = expanded(opened.model, heads, neurons=neurons, share_keys=share_keys, seed=seed)
    files = export_model(made, opened.tokenizer, output, dtype=getattr(torch, dtype), force=force)
    before, after = (parameter_counts(one.settings).total for one in (opened.model, made))
    tell_files(f"{opened.description} -> {output}, {before:,} -> {after:,} parameters", files)
    typer.echo(
        "Train the new chain with:\n"
        f'  [model]\n  use = "resilin.models.pretrained:Pretrained"\n  path = "{output}"\n'
        '  [objective]\n  use = "resilin.nested.chain_objective:ChainLosses"\n  loss = "last"'
    )
