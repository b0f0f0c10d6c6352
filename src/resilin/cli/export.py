"""`resilin export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from resilin.cli.model_options import DTypeName, ModelArgument, StepOption, TokenizerOption

READ_BACK = "Read back and compared: the same weights and logits."


def export(
    model: ModelArgument,
    output: Annotated[Path, typer.Argument(help="The folder to write.")],
    dtype: Annotated[DTypeName, typer.Option(help="Of the stored weights.")] = "float32",
    force: Annotated[bool, typer.Option("--force", help="Replace the files of an earlier export in OUTPUT.")] = False,
    step: StepOption = None,
    tokenizer: TokenizerOption = None,
) -> None:
    """Write a trained model as a Hugging Face folder.

    The folder holds config.json, generation_config.json, safetensors and the tokenizer, and opens with
    AutoModelForCausalLM and AutoTokenizer of transformers, with vLLM, and with resilin itself. It is read back and
    compared, weights and logits, before it is put in place.

    \b
    resilin export runs/shakespeare my-model
    resilin export runs/shakespeare my-model --step 400 --dtype bfloat16
    resilin export SmolLM2.gguf smollm2
    """
    import torch

    from resilin.run.export import check_output, export_model
    from resilin.run.open_model import open_model

    check_output(output, force=force)
    opened = open_model(model, step=step, tokenizer=tokenizer, device="cpu")
    files = export_model(opened.model, opened.tokenizer, output, dtype=getattr(torch, dtype), force=force)
    tell_files(f"{opened.description} -> {output}", files)
    typer.echo(READ_BACK)
    if opened.tokenizer is None:
        typer.echo("No tokenizer was found: AutoTokenizer will not open this folder (see --tokenizer).")


def tell_files(title: str, files: list[Path]) -> None:
    """Print which files were written, with their sizes."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    table.add_column(overflow="fold")
    table.add_column(justify="right")
    for file in files:
        size = file.stat().st_size
        table.add_row(str(file), f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:,.1f} kB")
    typer.echo(title)
    Console().print(table)
