"""`resilin adapter show | save | merge`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resilin.cli.export import READ_BACK, tell_files
from resilin.cli.model_options import DTypeName, ModelArgument, StepOption, TokenizerOption

if TYPE_CHECKING:
    from resilin.run.settings import RunSettings

app = typer.Typer(
    name="adapter",
    help="Adapters: what a run or a PEFT folder holds, exchanged with PEFT, merged into a model.",
    no_args_is_help=True,
)

FolderArgument = Annotated[Path, typer.Argument(metavar="ADAPTER", help="A PEFT folder.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace the files of an earlier export in OUTPUT.")]


def _tell(title: str, facts: dict[str, object]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, _words(value))
    typer.echo(title)
    Console().print(table)


def base_of(settings: RunSettings) -> str | None:
    """The folder of the model that a run's adapters were trained on, where it is one that PEFT can open."""
    path = getattr(getattr(settings.model, "model", None), "path", None)
    return str(path.resolve()) if isinstance(path, Path) and (path / "config.json").is_file() else None


def _words(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
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
    from resilin.adapt.attach import adapted_maps, adapter_parameters, attached_to
    from resilin.adapt.peft_config import CONFIG_FILE
    from resilin.adapt.peft_folder import read_folder
    from resilin.adapt.settings import facts
    from resilin.run.open_model import open_model

    if (path / CONFIG_FILE).is_file():
        settings, config, tensors = read_folder(path)
        told = {k: v for k, v in facts(settings).items() if k != "targets"}
        told |= {"base": config.get("base_model_name_or_path") or "not named", "targets": config.get("target_modules")}
        _tell(str(path), told | {"tensors": len(tensors), "numbers": sum(t.numel() for t in tensors.values())})
        return
    opened = open_model(path, step=step, device="cpu", plain=False)
    attached = attached_to(opened.model)
    for name, settings in attached.settings.items():
        maps = [p for p, m in adapted_maps(opened.model).items() if name in m.adapters]
        parameters = [p for _, p in adapter_parameters(opened.model, name)]
        told = {k: v for k, v in facts(settings).items() if k not in ("targets", "exclude")}
        told |= {"targets": sorted({p.rpartition(".")[2] for p in maps}), "maps": len(maps)}
        told |= {"in use": name in attached.active, "trained": any(p.requires_grad for p in parameters)}
        _tell(f"{opened.description}: {name}", told | {"numbers": sum(p.numel() for p in parameters)})


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
        base = base_of(opened.run.settings())
    files = save_adapter(opened.model, output, adapter or names[0], base=base)
    tell_files(f"{opened.description} -> {output}", files)
    if base is None:
        typer.echo(
            "No base is named in it, since no Hugging Face folder of it was found: write one with resilin export and "
            "name it with --base, or open the adapter with PeftModel.from_pretrained(base_model, folder)."
        )


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
    tell_files(f"{opened.description} + {adapter} -> {output}", files)
    typer.echo(READ_BACK)
