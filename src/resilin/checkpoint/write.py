"""Writing one checkpoint folder."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from resilin.checkpoint.atomic import new_file, sync_folder, write_all
from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.index import INDEX_NAME, Index, index_text, read_index
from resilin.checkpoint.link import link_unchanged
from resilin.checkpoint.tensor_record import FileRecord, TensorRecord
from resilin.checkpoint.tensor_write import write_tensor_file
from resilin.checkpoint.tree import TakenApart


def _files(apart: TakenApart) -> dict[str, dict[str, str]]:
    """Which tensor goes where: file name -> name in the file -> name in the tree."""
    groups: dict[str, dict[str, str]] = {}
    for name, part in apart.parts.items():
        alone = name == part  # a tensor at the top of the tree
        inner = name if alone else name[len(part) + 1 :]
        # "__metadata__" has a meaning of its own in the format; "~m" cannot be an escaped key.
        groups.setdefault("" if alone else part, {})["~m" if inner == "__metadata__" else inner] = name
    files: dict[str, dict[str, str]] = {}
    taken: set[str] = set()
    for number, (part, members) in enumerate(groups.items()):
        # Some file systems do not tell Model from model.
        plain = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", part) and part.lower() not in taken
        stem = part if plain else f"tensors~{number}"  # no part is called so
        taken.add(stem.lower())
        files[f"{stem}.safetensors"] = members
    return files


def _index_of(folder: Path | None) -> Index | None:
    try:
        return None if folder is None else read_index(folder)
    except CheckpointError:
        return None


def write_checkpoint(folder: Path, step: int, apart: TakenApart, earlier: Path | None = None) -> int:
    """Write tensor files and then the index into an empty folder, all of it on disk when this returns.

    A file that would be byte for byte one of the earlier checkpoint is linked to it instead: what a run does not
    change (a frozen base) is on the disk once.

    Args:
        folder: exists and is empty.
        step: steps committed.
        apart: the tree; its tensors have passed `check_tensor`.
        earlier: folder of a whole checkpoint on the same disk.

    Returns:
        Bytes of all files, linked ones too.

    Raises:
        OSError: whatever the system says; what was written until then is left behind.
    """
    files: dict[str, FileRecord] = {}
    records: dict[str, TensorRecord] = {}
    before = _index_of(earlier)
    with ThreadPoolExecutor(2) as pool:
        for file, members in _files(apart).items():
            tensors = {inner: apart.tensors[name] for inner, name in members.items()}
            linked = None if earlier is None else link_unchanged(earlier / file, before, folder / file, tensors)
            files[file], written = linked or write_tensor_file(folder / file, tensors, pool)
            records.update({members[inner]: record for inner, record in written.items()})
    ordered = {name: records[name] for name in apart.tensors}
    raw = index_text(Index(step, files, ordered, apart.json))
    with new_file(folder / INDEX_NAME) as handle:
        write_all(handle, raw)
    sync_folder(folder)
    return len(raw) + sum(record.bytes for record in files.values())
