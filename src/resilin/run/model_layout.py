"""The parameters of whatever model lies at a path, laid out over a mesh: nothing is loaded."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from resilin.checkpoint.index import INDEX_NAME
from resilin.checkpoint.reader import CheckpointReader
from resilin.config import UserError, load_settings
from resilin.data.tokenizer import TOKENIZER_FILE, Tokenizer
from resilin.data.tokenizer_settings import TokenizerSettings
from resilin.data.train_tokenizer import byte_tokenizer
from resilin.layout import Layout, Mesh, layout_of
from resilin.layout.dealing import deal, redeal, virtual_shards
from resilin.models.decoder import Decoder
from resilin.models.pretrained import Pretrained
from resilin.models.settings import ModelContext
from resilin.parallel.decoder_specs import Sharding, decoder_specs
from resilin.parallel.local_model import shapes_of
from resilin.run.folder import RunFolder
from resilin.run.settings import RunSettings


def outline_at(path: Path, overrides: list[str]) -> Decoder:
    """The decoder at a path, on the meta device.

    Args:
        path: a run's settings, its folder, a Hugging Face folder, or a .gguf file.
        overrides: of the settings, `model.layers=80`.

    Raises:
        UserError: when nothing known lies there, or the model is no decoder.
    """
    if path.suffix == ".toml":
        model = _outline_of(load_settings(RunSettings, path, overrides), path)
    elif overrides:
        raise UserError(f"{path}: overrides ({overrides[0]}) go with a settings file only")
    elif (path / "settings.toml").exists():
        model = _outline_of(RunFolder(path).settings(), path)
    elif path.suffix == ".gguf" or (path / "config.json").exists():
        model = Pretrained(path=path).outline(ModelContext(0, None))
    else:
        raise UserError(f"{path}: is no settings file, run, Hugging Face folder or .gguf file")
    decoder = next((module for module in model.modules() if isinstance(module, Decoder)), None)
    if decoder is None:
        raise UserError(f"{path}: its model is a {type(model).__name__}; a layout is known for a Decoder")
    return decoder


def _outline_of(settings: RunSettings, path: Path) -> nn.Module:
    try:
        model = settings.model.outline(ModelContext(settings.seed, None))
    except ValueError:  # the model has as many tokens as the source's tokenizer
        model = settings.model.outline(ModelContext(settings.seed, vocabulary_of(settings, path)))
    if model is None:
        raise UserError(f"{path}: a {type(settings.model).__name__} cannot be outlined without building it")
    return model


def vocabulary_of(settings: RunSettings, path: Path) -> int:
    """How many tokens the source's tokenizer has, or will have; no data is opened to learn it."""
    stored = RunFolder(path).tokenizer
    if path.is_dir() and (stored / TOKENIZER_FILE).is_file():
        return Tokenizer.load(stored).vocab_size
    tokenizer = getattr(settings.source, "tokenizer", None)
    if isinstance(tokenizer, TokenizerSettings):
        if tokenizer.path is not None:
            return Tokenizer.load(tokenizer.path).vocab_size
        if tokenizer.kind != "characters":
            return byte_tokenizer().vocab_size if tokenizer.kind == "bytes" else tokenizer.vocab_size
    raise UserError(f"{path}: its data would have to be opened to learn the vocabulary: say model.vocab_size=...")


def checkpoint_layout(path: Path) -> Layout | None:
    """Which files of a checkpoint hold which regions; None where no checkpoint lies at the path.

    Raises:
        CheckpointError: for one that is damaged.
    """
    if not (path / INDEX_NAME).is_file():
        return None
    with CheckpointReader(path) as saved:
        return saved.layout()


def lay_out(
    model: Decoder,
    mesh: Mesh,
    sharding: Sharding,
    vocabulary_multiple: int = 1,
    owners: tuple[int, ...] | None = None,
) -> Layout:
    """The layout of a decoder's parameters on a mesh; the options are those of `decoder_specs`."""
    specs = decoder_specs(shapes_of(model), model.settings, mesh, sharding, vocabulary_multiple, owners)
    return layout_of(specs, mesh)


def owners_after(before: Mesh, after: Mesh) -> tuple[int, ...]:
    """The table of "dealt" after the data axis has changed: the fewest virtual shards change hands."""
    old = before.axis("dp")
    return redeal(deal(virtual_shards(old), old), after.axis("dp"))
