"""`resilin nest`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from resilin.cli.family_options import SizeOptions, TextOptions
from resilin.cli.model_options import DTypeName, ModelArgument, StepOption, TokenizerOption
from resilin.cli.option_groups import with_option_groups


@with_option_groups
def nest(
    model: ModelArgument,
    output: Annotated[Path, typer.Argument(help="The folder to write.")],
    heads: Annotated[bool, typer.Option(help="Put heads in order too, not neurons alone.")] = True,
    dtype: Annotated[DTypeName, typer.Option(help="Of the stored weights.")] = "float32",
    force: Annotated[bool, typer.Option("--force", help="Replace the files of an earlier export in OUTPUT.")] = False,
    step: StepOption = None,
    tokenizer: TokenizerOption = None,
    *,
    sizes: SizeOptions,
    reading: TextOptions,
) -> None:
    """Make a trained model ready to be nested: its most important neurons and heads first.

    The model computes the same as before and is written as an ordinary Hugging Face folder, with nested.json beside it.
    With text, importance is measured on it; without, it is that of the weights. Training the folder on as a nested
    model then makes its leading parts good models; the settings for that are printed.

    \b
    resilin nest smollm2 smollm2-nested --text sample.txt
    resilin nest smollm2 smollm2-nested --text sample.txt --granularities 0.25,0.5,1 --targets ffn
    """
    from dataclasses import replace

    import torch

    from resilin.cli.export import READ_BACK, tell_files
    from resilin.nested.granularities import budget_at
    from resilin.nested.importance import importance, put_in_order
    from resilin.nested.record import NestRecord
    from resilin.run.export import check_output, export_model
    from resilin.run.open_model import open_model

    check_output(output, force=force)
    opened = open_model(model, step=step, tokenizer=tokenizer, device="cpu")
    if sizes.granularities is None:
        sizes = replace(sizes, granularities="0.125,0.25,0.5,1")
    record = sizes.record(model, opened)
    assert isinstance(record, NestRecord)  # granularities are given
    for one in record.granularities:
        budget_at(opened.model.settings, one, record.targets)  # what does not come out even is told now
    batches = reading.batches(opened, own=True)
    put_in_order(opened.model, importance(opened.model, batches), heads=heads)
    files = export_model(opened.model, opened.tokenizer, output, dtype=getattr(torch, dtype), force=force)
    ordering = "weight" if batches is None else "activation"
    files.append(NestRecord(record.granularities, record.targets, ordering=ordering).write(output))
    tell_files(f"{opened.description} -> {output}, in order of importance by {ordering}", files)
    typer.echo(READ_BACK)
    listed = ", ".join(f"{one:g}" for one in record.granularities)
    typer.echo(
        "Train it on with:\n"
        f'  [model]\n  use = "resilin.models.pretrained:Pretrained"\n  path = "{output}"\n'
        f'  [objective]\n  use = "resilin.nested.objective:Nested"\n  granularities = [{listed}]\n'
        f"  targets = [{', '.join(repr(one) for one in record.targets)}]".replace("'", '"')
    )
