"""Open a trained model, wherever it came from: a run, one of its checkpoints, a Hugging Face folder, a GGUF file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.folder import CheckpointFolder
from resilin.config.errors import UserError
from resilin.config.settings import closest
from resilin.data.stored_tokenizer import gguf_tokenizer
from resilin.data.tokenizer import TOKENIZER_FILE, Tokenizer
from resilin.models.decoder import Decoder
from resilin.models.plain import HasPlainForm, make_plain
from resilin.models.settings import ModelContext
from resilin.models.weight_files import ModelFolderError, read_json
from resilin.nouns import State
from resilin.run.device import choose_device
from resilin.run.folder import RunFolder
from resilin.run.frozen import joined
from resilin.run.settings import RunSettings

CHECKPOINT_INDEX = "index.json"


class OpenModelError(UserError):
    """A path that cannot be opened as a model; the text lists what was looked for."""


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A model ready to use.

    Attributes:
        model: in evaluation mode, on its device.
        tokenizer: its tokenizer, or None where none is stored with it.
        description: for people: what was opened.
        end_ids: tokens that end a text: the tokenizer's, and those of generation_config.json.
        run: the run's folder, where the model came from one.
        step: the steps it was trained for, where that is known.
    """

    model: Decoder
    tokenizer: Tokenizer | None
    description: str
    end_ids: frozenset[int] = frozenset()
    run: RunFolder | None = None
    step: int | None = None

    def needed_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            OpenModelError: there is none.
        """
        if self.tokenizer is None:
            raise OpenModelError(f"{self.description}: has no {TOKENIZER_FILE}; name one with --tokenizer")
        return self.tokenizer


def _missing(path: Path) -> OpenModelError:
    neighbours = [str(other) for other in path.parent.iterdir()] if path.parent.is_dir() else []
    runs = [str(file.parent) for file in sorted(Path("runs").glob("*/settings.toml"))]
    near = closest(str(path), [*neighbours, *runs])
    hint = f"\n  did you mean {near}?" if near else f"\n  runs here: {', '.join(runs)}" if runs else ""
    return OpenModelError(f"{path}: there is no such file or folder{hint}")


def _unknown(path: Path) -> OpenModelError:
    if path.is_file():
        return OpenModelError(
            f"{path}: is not a model; of single files only .gguf is read. Give one of these:\n" + _FORMS
        )
    inside = sorted(item.name for item in path.iterdir())
    shown = ", ".join(inside[:8]) + (", ..." if len(inside) > 8 else "") if inside else "nothing"
    return OpenModelError(f"{path}: is not a model; it holds {shown}. Looked for:\n{_FORMS}")


_FORMS = """\
  settings.toml and checkpoints/         a folder that `resilin train` made
  index.json in a folder named step-...  one checkpoint inside such a folder
  config.json                            a Hugging Face folder with safetensors
  a file ending in .gguf                 weights and tokenizer in one file"""


def _no_decoder(model: nn.Module, run: Path) -> OpenModelError:
    return OpenModelError(
        f"{run}: its model is a {type(model).__name__}; text can be generated and scored only with a Decoder"
    )


def _stored(run_settings: RunSettings, state: State, run: Path, plain: bool) -> nn.Module:
    """The model of these settings with the weights of a checkpoint; without making or reading initial ones where its
    outline suffices, as it does for a model that is made plain next.
    """
    settings = run_settings.model
    # A model that holds a decoder (a policy beside its value model) holds its embedding under a longer name.
    ends = (".embed.weight", ".embed.chains.0.weight")
    embedding = next((t for name, t in state.items() if f".{name}".endswith(ends)), None)
    vocabulary = None if embedding is None else int(embedding.shape[0])
    context = ModelContext(run_settings.seed, vocabulary)
    outline = settings.outline(context) if plain and vocabulary is not None else None
    model = settings.build(context) if outline is None else outline
    if not isinstance(model, Decoder | HasPlainForm):
        raise _no_decoder(model, run)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise OpenModelError(f"{run}: the checkpoint does not fit the model of settings.toml: {error}") from None
    return model


def _open_run(path: Path, step: int | None, plain: bool) -> tuple[Decoder, Tokenizer | None, int]:
    folder = RunFolder(path)
    settings = folder.settings()
    store = CheckpointFolder(folder.checkpoints_of(settings))
    if step is None:
        step = store.latest()
    if step is None:
        raise OpenModelError(f"{path}: the run has no checkpoint yet (looked in {store.path})")
    state = joined(store.load(step, parts=["model", *store.parts_of(step, "frozen")]))
    tokenizer = Tokenizer.load(folder.tokenizer) if (folder.tokenizer / TOKENIZER_FILE).is_file() else None
    model = _stored(settings, state, path, plain)
    if plain or not isinstance(model, Decoder):
        model = make_plain(model.to(torch.float32))  # a base stored in fewer bytes does not round what is merged
    if not isinstance(model, Decoder):
        raise _no_decoder(model, path)
    return model, tokenizer, step


def open_trained(path: Path | str, step: int | None = None) -> nn.Module:
    """The model of a run as it was trained, with whatever it has around its decoder; float32, on the CPU, evaluating.

    Args:
        path: the run's folder.
        step: which checkpoint; None: the newest.

    Raises:
        OpenModelError: there is no such run, or it has no checkpoint yet.
    """
    path = Path(path)
    if not RunFolder(path).holds_run():
        raise _unknown(path) if path.exists() else _missing(path)
    folder = RunFolder(path)
    settings = folder.settings()
    store = CheckpointFolder(folder.checkpoints_of(settings))
    step = store.latest() if step is None else step
    if step is None:
        raise OpenModelError(f"{path}: the run has no checkpoint yet (looked in {store.path})")
    state = joined(store.load(step, parts=["model", *store.parts_of(step, "frozen")]))
    return _stored(settings, state, path, plain=False).to(torch.float32).eval()


def _end_ids(file: Path) -> frozenset[int]:
    """The end tokens a generation_config.json names: some models end their turns and their texts differently."""
    named = read_json(file).get("eos_token_id") if file.is_file() else None
    return frozenset(named if isinstance(named, list) else [] if named is None else [named])


def _open(path: Path, step: int | None, own_tokenizer: bool, plain: bool) -> OpenedModel:
    if not path.exists():
        raise _missing(path)
    if path.is_dir() and path.name.startswith("step-") and (path / CHECKPOINT_INDEX).is_file():
        run, found = path.resolve().parent.parent, int(path.name.removeprefix("step-"))
        if not RunFolder(run).holds_run():
            raise OpenModelError(
                f"{path}: a checkpoint needs the settings of its run to be opened: looked for {run / 'settings.toml'}"
            )
        if step not in (None, found):
            raise OpenModelError(f"{path} is step {found}, yet --step asks for {step}: give the run's folder instead")
        path, step = run, found
    if RunFolder(path).holds_run():
        model, tokenizer, step = _open_run(path, step, plain)
        return OpenedModel(model, tokenizer, f"{path}, step {step}", run=RunFolder(path), step=step)
    if step is not None:
        raise OpenModelError(f"{path}: --step chooses among the checkpoints of a run, and this is none")
    if path.is_file() and path.suffix == ".gguf":
        from resilin.models.gguf import load_gguf

        return OpenedModel(load_gguf(path), gguf_tokenizer(path) if own_tokenizer else None, str(path))
    if path.is_dir() and (path / "config.json").is_file():
        from resilin.models.huggingface import load_pretrained

        own = Tokenizer.load(path) if (path / TOKENIZER_FILE).is_file() else None
        return OpenedModel(load_pretrained(path), own, str(path), _end_ids(path / "generation_config.json"))
    raise _unknown(path)


def open_model(
    path: Path | str,
    *,
    step: int | None = None,
    tokenizer: Path | str | None = None,
    dtype: torch.dtype = torch.float32,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    plain: bool = True,
) -> OpenedModel:
    """The model at a path.

    Args:
        path: a run's folder, a checkpoint's folder inside one, a Hugging Face folder, or a .gguf file.
        step: which checkpoint of a run; None: the newest.
        tokenizer: a tokenizer.json, or a folder with one, in place of the one stored with the model.
        dtype: of the parameters in memory.
        device: "auto": the GPU where there is one.
        plain: give the ordinary model that a run's method amounts to (`resilin.models.plain`); False: as it was
            trained.

    Raises:
        UserError: what was looked for and not found, or why it cannot be read.
    """
    path = Path(path)
    try:
        opened = _open(path, step, own_tokenizer=tokenizer is None, plain=plain)
    except (CheckpointError, ModelFolderError) as error:
        raise OpenModelError(str(error)) from None
    words = Tokenizer.load(tokenizer) if tokenizer is not None else opened.tokenizer
    model = opened.model.to(device=choose_device(device), dtype=dtype).eval()
    if words is not None and words.vocab_size > model.settings.vocab_size:
        raise OpenModelError(
            f"{path}: the tokenizer has {words.vocab_size} tokens, the model knows only {model.settings.vocab_size}: "
            "they do not belong together; name the right one with --tokenizer"
        )
    ends = opened.end_ids | ({words.eos_id} if words is not None and words.eos_id is not None else set())
    return OpenedModel(model, words, opened.description, frozenset(ends), opened.run, opened.step)


def open_outline(path: Path | str, tokenizer: Path | str | None = None) -> OpenedModel | None:
    """A Hugging Face folder of whose weights nothing is read: the model is on the meta device; None for other paths.

    Raises:
        UserError: its description, or the tokenizer, cannot be read.
    """
    from resilin.models.huggingface import folder_settings

    path = Path(path)
    if not path.is_dir() or RunFolder(path).holds_run() or not (path / "config.json").is_file():
        return None
    own = path if (path / TOKENIZER_FILE).is_file() else None
    words_at = tokenizer or own
    words = Tokenizer.load(words_at) if words_at else None
    try:
        model = folder_settings(path).on_meta().eval()
    except ModelFolderError as error:
        raise OpenModelError(str(error)) from None
    ends = _end_ids(path / "generation_config.json")
    ends |= {words.eos_id} if words is not None and words.eos_id is not None else set()
    return OpenedModel(model, words, str(path), ends)
