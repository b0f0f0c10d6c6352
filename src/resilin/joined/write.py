"""Writing a joined model's folder tensor by tensor: no more of it is in memory than one file has."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from resilin.joined.parts import Parts
from resilin.joined.record import FILE, UNTUNED, JoinedRecord
from resilin.models.decoder import Decoder
from resilin.models.huggingface import folder_config
from resilin.models.huggingface_names import parts_of, stored_tensors
from resilin.models.weight_files import Pending, Writable, read_json, write_atomically, write_tensors
from resilin.run.export import check_output, put_in_place

_OURS = frozenset({"config.json", "anchor.json", FILE, "model.safetensors.index.json"})


def _side_files(folder: Path) -> list[Path]:
    """Tokenizer, generation settings and what else belongs to the model but is neither weights nor a record."""
    kinds = (".json", ".jinja", ".model", ".txt")
    return [file for file in sorted(folder.iterdir()) if file.suffix in kinds and file.name not in _OURS]


def write_joined(
    parts: Parts,
    base: Path,
    output: Path,
    record: JoinedRecord | None,
    dtype: torch.dtype,
    *,
    untuned: Mapping[str, Tensor] | None = None,
    max_shard_bytes: int = 5_000_000_000,
    force: bool = False,
) -> list[Path]:
    """Write the folder; it is made beside `output` and put in place whole.

    Args:
        parts: of the model.
        base: the folder whose tokenizer and other files go with it.
        output: a new or empty folder, unless `force`.
        record: of its experts; None: it is a dense model.
        dtype: of the stored tensors.
        untuned: where the router was tuned, (L, D) rows as they were joined, by expert.
        max_shard_bytes: larger models are split over files with an index; as much is in memory at once.
        force: replace the files of an earlier export.

    Returns:
        The files written, in `output`.

    Raises:
        ExportError: `output` is in use.
        ModelFolderError: no architecture fits the settings.
    """
    check_output(output, force=force)
    ids = {key: read_json(base / "config.json").get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = folder_config(parts.settings, dtype, ids)
    outline = Decoder(parts.settings, seed=None, device="meta")
    after = parts.settings.norm_place == "after"
    size = torch.empty((), dtype=dtype).element_size()
    tensors: dict[str, Writable] = {}
    for name, shape in stored_tensors(outline, config["model_type"]):
        found = parts_of(name, norms_after=after)
        assert found is not None
        (part,) = found
        make = partial(_made, parts, part.parameter, part.expert, dtype)
        tensors[name] = Pending(shape.numel() * size, make)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as temporary:
        staged = Path(temporary)
        write_tensors(staged, tensors, max_shard_bytes)
        for file in _side_files(base):
            shutil.copy2(file, staged / file.name)
        if untuned is not None:
            save_file({name: rows.contiguous() for name, rows in untuned.items()}, staged / UNTUNED)
        write_atomically(staged / "config.json", json.dumps(config, indent=2) + "\n")
        if record is not None:
            record.write(staged)
        if output.is_dir():
            for stale in (FILE, UNTUNED, "anchor.json", "anchor.safetensors"):
                (output / stale).unlink(missing_ok=True)
        return put_in_place(staged, output)


def _made(parts: Parts, name: str, expert: int | None, dtype: torch.dtype) -> Tensor:
    return parts.parameter(name, expert).to(dtype).contiguous().clone()
