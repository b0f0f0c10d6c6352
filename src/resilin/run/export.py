"""Write a model as a Hugging Face folder and make sure that it reads back as the same model."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from resilin.config.errors import UserError
from resilin.data.tokenizer import Tokenizer
from resilin.inference.scoring import evaluating
from resilin.models.decoder import Decoder
from resilin.models.huggingface import load_pretrained, save_pretrained
from resilin.models.weight_files import ModelFolderError

_PROBE_TOKENS = 32


class ExportError(UserError):
    """A model that cannot be written there; the text says why."""


def special_ids(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """Begin, end and padding token as config.json names them."""
    if tokenizer is None:
        return {}
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}


def _probe_logits(model: Decoder) -> Tensor:
    """Logits of a few tokens from all over the vocabulary."""
    count = min(_PROBE_TOKENS, model.settings.max_positions)
    tokens = torch.arange(count) * 7919 % model.settings.vocab_size
    with evaluating(model):
        return model.logits(model(tokens[None].to(model.embed.weight.device)).hidden_BTD)


def _check(model: Decoder, folder: Path, dtype: torch.dtype) -> None:
    """Read the folder back: every parameter and the logits must be those of `model` rounded to `dtype`.

    Raises:
        ExportError: something differs.
    """
    again = load_pretrained(folder)
    written = dict(again.named_parameters())
    rounded = {name: p.detach().cpu().to(dtype).float() for name, p in model.named_parameters()}
    for name, parameter in rounded.items():
        if not torch.equal(written[name].detach(), parameter):
            raise ExportError(f"{folder}: {name} reads back differently from what was written; is the disk sound?")
    meant = model.settings.on_meta()
    meant.load_state_dict(rounded, assign=True)
    if not torch.equal(_probe_logits(meant), _probe_logits(again)):
        raise ExportError(f"{folder}: the settings read back differently: the model gives other logits")


def put_in_place(staged: Path, output: Path) -> list[Path]:
    """Move the staged files over those of an earlier export; other files there are left alone."""
    output.mkdir(parents=True, exist_ok=True)
    for old in (*output.glob("model*.safetensors"), *output.glob("model*.safetensors.index.json")):
        old.unlink()
    # The library that writes safetensors makes them readable by their owner only; the others follow the umask.
    mode = (staged / "config.json").stat().st_mode
    for file in staged.iterdir():
        file.chmod(mode)
    return [Path(shutil.move(file, output / file.name)) for file in sorted(staged.iterdir())]


def check_output(output: Path, *, force: bool) -> None:
    """Refuse a folder that is in use, before any work.

    Raises:
        ExportError: it is a file, or is not empty and `force` is not set.
    """
    if output.exists() and not output.is_dir():
        raise ExportError(f"{output}: is a file; a folder was expected")
    if output.is_dir() and any(output.iterdir()) and not force:
        raise ExportError(f"{output}: is not empty; name another folder, or write into it with --force")


def export_model(
    model: Decoder,
    tokenizer: Tokenizer | None,
    output: Path,
    *,
    dtype: torch.dtype = torch.float32,
    force: bool = False,
) -> list[Path]:
    """Write config.json, generation_config.json, safetensors and the tokenizer's files.

    Everything is written beside `output` first, read back, compared, and only then put in place.

    Args:
        model: whose settings fit a Hugging Face family.
        tokenizer: saved with it, so that AutoTokenizer opens the folder too; None: weights only.
        output: a new or empty folder, unless `force`.
        dtype: of the stored weights.
        force: replace the files of an earlier export.

    Returns:
        The files written, in `output`.

    Raises:
        ExportError: `output` is in use, cannot be written, or no family fits the model.
    """
    check_output(output, force=force)
    ids = special_ids(tokenizer)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as temporary:
            staged = Path(temporary)
            save_pretrained(model, staged, dtype=dtype, special_ids=ids)
            known = {key: value for key, value in ids.items() if value is not None}
            generation = {"_from_model_config": True, **known}
            (staged / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
            if tokenizer is not None:
                tokenizer.save(staged)
            _check(model, staged, dtype)
            return put_in_place(staged, output)
    except ModelFolderError as error:
        raise ExportError(f"{output}: cannot be written as a Hugging Face folder: {error}") from None
    except OSError as error:
        raise ExportError(f"{output}: cannot be written: {error.strerror}") from None
