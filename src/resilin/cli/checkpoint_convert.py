"""`resilin checkpoint convert`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resilin.cli.model_options import DTypeName
from resilin.config.errors import UserError

if TYPE_CHECKING:
    from resilin.checkpoint.foreign.convert import Report


def convert(
    source: Annotated[Path, typer.Argument(help="A checkpoint's folder, of any format.")],
    target: Annotated[Path, typer.Argument(help="The folder to write.")],
    to: Annotated[
        str, typer.Option(help="resilin, huggingface, dcp, deepspeed, universal (DeepSpeed) or megatron.")
    ] = "resilin",
    source_format: Annotated[
        str | None, typer.Option("--from", help="The source's format. Default: told by its files.")
    ] = None,
    weights_only: Annotated[bool, typer.Option(help="Take the model alone.")] = False,
    leave_out: Annotated[
        list[str] | None, typer.Option(help="Leave out what has this name; * is any text. Can be given again.")
    ] = None,
    tie: Annotated[list[str] | None, typer.Option(help="NAME=OTHER: NAME has the values of OTHER.")] = None,
    dtype: Annotated[
        DTypeName | None,
        typer.Option(help="Of the written weights; what a deepspeed target's model computes in. Default: as they are."),
    ] = None,
    files: Annotated[
        Path | None, typer.Option(help="A folder whose config.json and tokenizer go with the model.")
    ] = None,
    rules: Annotated[
        Path | None,
        typer.Option(help="JSON or TOML: how tensor-parallel shards make up parameters (also in a universal target)."),
    ] = None,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="Tensor ranks of a Megatron target.")] = 1,
    pipeline_parallel: Annotated[int, typer.Option(min=1, help="Pipeline ranks of a Megatron target.")] = 1,
    zero_stage: Annotated[int, typer.Option(min=1, max=3, help="ZeRO stage of a deepspeed target.")] = 1,
    data_parallel: Annotated[int, typer.Option(min=1, help="Data-parallel ranks of a deepspeed target.")] = 1,
    sub_group_size: Annotated[
        int, typer.Option(min=1, help="DeepSpeed's setting of this name (a deepspeed target of stage 3).")
    ] = 1_000_000_000,
    groups: Annotated[
        Path | None,
        typer.Option(help="JSON or TOML: parameter groups with learning rates and the like, in place of the source's."),
    ] = None,
    zero_states: Annotated[
        bool, typer.Option(help="Begin with the states of a new AdamW, where the source has none; with --groups.")
    ] = False,
    frozen: Annotated[
        list[str] | None,
        typer.Option(help="Parameters that are not trained, where the source does not say; * is any text, '' is none."),
    ] = None,
    allow: Annotated[
        list[str] | None, typer.Option(help="A class in the source's pickles to take as plain data.")
    ] = None,
) -> None:
    """Write a checkpoint of one tool as that of another.

    Reads folders of Resilin, Hugging Face, torch.distributed.checkpoint, DeepSpeed (ZeRO 1 to 3, universal) and
    Megatron. Nothing is dropped silently: what the target has no place for is named, and left out when told so.

    \b
    resilin checkpoint convert deepspeed-run/ checkpoints
    resilin checkpoint convert deepspeed-run/ my-model --to huggingface --weights-only --files base-model
    resilin checkpoint convert runs/chat/checkpoints for-torch --to dcp
    resilin checkpoint convert deepspeed-run/ on-8-ranks --to deepspeed --zero-stage 3 --data-parallel 8
    """
    import torch

    from resilin.checkpoint.foreign.convert import Options
    from resilin.checkpoint.foreign.convert import convert as carry_out
    from resilin.checkpoint.foreign.deepspeed_write import Zero
    from resilin.checkpoint.foreign.formats import ReadOptions, WriteOptions
    from resilin.checkpoint.foreign.groups import load_groups
    from resilin.checkpoint.foreign.rules import load_rules

    pairs = [one.partition("=") for one in tie or ()]
    wrong = [name for name, equals, other in pairs if not (name and equals and other)]
    if wrong:
        raise UserError(f"--tie {wrong[0]!r}: expected NAME=OTHER")
    table = None if rules is None else load_rules(rules)
    options = Options(
        source_format=source_format,
        target_format=to,
        weights_only=weights_only,
        leave_out=leave_out or (),
        ties={name: other for name, _, other in pairs},
        dtype=None if dtype is None else getattr(torch, dtype),
        groups=None if groups is None else load_groups(groups),
        zero_states=zero_states,
        frozen=frozen,
        files=files,
        read=ReadOptions(table, tuple(allow or ())),
        write=WriteOptions(tensor_parallel, pipeline_parallel, Zero(zero_stage, data_parallel, sub_group_size), table),
    )
    _tell(source, target, carry_out(source, target, options))


def _tell(source: Path, target: Path, report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    typer.echo(f"{source}: {report.source} -> {target}: {report.target}")
    table = Table(show_header=False, box=None)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(justify="right")
    table.add_column(justify="right")
    for kind, (count, size) in report.tensors.items():
        table.add_row(kind, f"{count:,} {'tensor' if count == 1 else 'tensors'}", f"{size:,} bytes")
    table.add_row("written", "", f"{report.written:,} bytes")
    console = Console(highlight=False)
    console.print(table)
    for alias, name in report.ties.items():
        typer.echo(f"tied: {alias} is {name}")
    for one in report.left_out:
        typer.echo(f"left out: {one.name} ({one.why})")
