"""`resilin adapter show | save | merge`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resilin.cli.model_options import DTypeName, ModelArgument, StepOption, TokenizerOption

if TYPE_CHECKING:
    from rich.table import Table

app = typer.Typer(
    name="adapter",
    help="Adapters: what a run or a PEFT folder holds, exchanged with PEFT, merged into a model.",
    no_args_is_help=True,
)

FolderArgument = Annotated[Path, typer.Argument(metavar="ADAPTER", help="A PEFT folder.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace the files of an earlier export in OUTPUT.")]


def _table(title: str, rows: list[tuple[str, str]]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False, box=None)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def _words(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


@app.command()
def show(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A run's folder, or a PEFT folder.")],
    step: StepOption = None,
) -> None:
    """Say which adapters there are, of which method and size, and where they go.

    \b
    resilin adapter show runs/chat
    resilin adapter show my-adapter
    """
    from rich.console import Console

    from resilin.adapt.attach import adapted_maps, adapter_parameters, attached_to
    from resilin.adapt.peft_config import CONFIG_FILE
    from resilin.adapt.peft_folder import read_folder
    from resilin.adapt.settings import facts
    from resilin.run.open_model import open_model

    console = Console()
    if (path / CONFIG_FILE).is_file():
        settings, config, tensors = read_folder(path)
        told = {k: v for k, v in facts(settings).items() if k != "targets"}
        told |= {"base": config.get("base_model_name_or_path") or "not named", "targets": config.get("target_modules")}
        count = sum(tensor.numel() for tensor in tensors.values())
        told |= {"tensors": len(tensors), "numbers": f"{count:,}"}
        console.print(_table(str(path), [(name, _words(value)) for name, value in told.items()]))
        return
    opened = open_model(path, step=step, device="cpu", plain=False)
    attached = attached_to(opened.model)
    for name, settings in attached.settings.items():
        maps = [p for p, m in adapted_maps(opened.model).items() if name in m.adapters]
        count = sum(p.numel() for _, p in adapter_parameters(opened.model, name))
        told = {**facts(settings), "in use": name in attached.active, "maps": len(maps), "numbers": f"{count:,}"}
        console.print(_table(f"{opened.description}: {name}", [(key, _words(value)) for key, value in told.items()]))


@app.command()
def save(
    model: ModelArgument,
    output: Annotated[Path, typer.Argument(help="The folder to write.")],
    adapter: Annotated[str | None, typer.Option(help="Which adapter. Default: the only one.")] = None,
    base: Annotated[
        str | None, typer.Option(help="The base's folder or hub name, for PEFT. Default: the one it was trained on.")
    ] = None,
    step: StepOption = None,
    force: ForceOption = False,
) -> None:
    """Write an adapter of a run as a PEFT folder, without its base.

    \b
    resilin adapter save runs/chat my-adapter
    """
    from rich.console import Console

    from resilin.adapt.attach import attached_to
    from resilin.adapt.peft_folder import save_adapter
    from resilin.adapt.targets import AdapterError
    from resilin.run.export import check_output
    from resilin.run.open_model import open_model

    check_output(output, force=force)
    opened = open_model(model, step=step, device="cpu", plain=False)
    names = list(attached_to(opened.model).settings)
    if adapter is None and len(names) > 1:
        raise AdapterError(f"{opened.description}: has several adapters: name one with --adapter: {', '.join(names)}")
    if base is None and opened.run is not None:
        path = getattr(getattr(opened.run.settings().model, "model", None), "path", None)
        base = str(path.resolve()) if isinstance(path, Path) and path.is_dir() else None
    files = save_adapter(opened.model, output, adapter or names[0], base=base)
    told = [(str(file), f"{file.stat().st_size / 1e3:,.1f} kB") for file in files]
    console = Console()
    console.print(_table(f"{opened.description} -> {output}", told))
    if base is None:
        console.print("No base is named in it: open it with PeftModel.from_pretrained(base_model, folder).")


@app.command()
def merge(
    model: ModelArgument,
    adapter: FolderArgument,
    output: Annotated[Path, typer.Argument(help="The folder to write.")],
    dtype: Annotated[DTypeName, typer.Option(help="Of the stored weights.")] = "float32",
    tokenizer: TokenizerOption = None,
    step: StepOption = None,
    force: ForceOption = False,
) -> None:
    """Merge the adapter of a PEFT folder into its base, and write the model as a Hugging Face folder.

    A run's own adapters are merged by `resilin export`.

    \b
    resilin adapter merge SmolLM2.gguf my-adapter my-model
    """
    import torch
    from rich.console import Console

    from resilin.adapt.peft_folder import load_adapter
    from resilin.models.decoder import Decoder
    from resilin.models.plain import make_plain
    from resilin.run.export import check_output, export_model
    from resilin.run.open_model import open_model

    check_output(output, force=force)
    opened = open_model(model, step=step, tokenizer=tokenizer, device="cpu")
    load_adapter(opened.model, adapter, "merged")
    merged = make_plain(opened.model)
    assert isinstance(merged, Decoder)
    files = export_model(merged, opened.tokenizer, output, dtype=getattr(torch, dtype), force=force)
    told = [(str(file), f"{file.stat().st_size / 1e6:,.1f} MB") for file in files]
    Console().print(_table(f"{opened.description} + {adapter} -> {output}", told))
