"""Hugging Face folders: safetensors (or pickled weights), an index where there are several, and the files beside."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from resilin.checkpoint.atomic import write_file
from resilin.checkpoint.errors import CheckpointError, DamagedError
from resilin.checkpoint.foreign.beside import SUFFIXES, file_tensor
from resilin.checkpoint.foreign.buffers import Gathered
from resilin.checkpoint.foreign.pickles import inside, load_pickle
from resilin.checkpoint.foreign.stored import FILES, MODEL, LeftOut, Stored, weight
from resilin.checkpoint.share import Piece
from resilin.checkpoint.storage import folder_at
from resilin.checkpoint.tensor_read import TensorFile
from resilin.checkpoint.tensor_record import DTYPES, TensorRecord, shape_in_torch
from resilin.checkpoint.tensor_write import host_bytes, write_tensor_file
from resilin.layout import Region

_WHOLE = ("model.safetensors", "pytorch_model.bin")
_INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_TRAINER = ("optimizer.pt", "scheduler.pt", "optimizer.bin", "scaler.pt")
_MOST_SHARD_BYTES = 5_000_000_000


def is_huggingface(folder: Path) -> bool:
    """Whether a folder holds weights as Hugging Face writes them."""
    return any((folder / name).is_file() for name in (*_WHOLE, *_INDEX))


def _files(folder: Path) -> dict[str, set[str] | None]:
    """The weight files, with the tensors that the index promises in each."""
    for whole, index in zip(_WHOLE, _INDEX, strict=True):
        if (folder / whole).is_file():
            return {whole: None}
        path = folder / index
        if path.is_file():
            try:
                table = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            except (ValueError, KeyError, TypeError) as error:
                raise DamagedError(f"{path}: has no 'weight_map' that can be read ({error})") from None
            found: dict[str, set[str] | None] = {}
            for tensor, name in table.items():
                inside(folder, str(name), path)
                promised = found.setdefault(str(name), set())
                assert promised is not None
                promised.add(tensor)
            return found
    raise DamagedError(f"{folder}: has none of {', '.join((*_WHOLE, *_INDEX))}")


def read_huggingface(folder: Path, allow: Iterable[str] = ()) -> Stored:
    """Open a Hugging Face folder.

    Raises:
        CheckpointError: a file is missing, damaged, or lacks a tensor that the index promises.
    """
    gathered = Gathered()
    ties: dict[str, str] = {}
    files = _files(folder)
    for name, promised in files.items():
        tensors = _tensors(folder / name, allow)
        absent = sorted((promised or set()) - set(tensors))
        if absent:
            raise DamagedError(f"{folder / name}: tensor {absent[0]!r} is missing, which the index promises")
        memory: dict[object, str] = {}
        for tensor_name, tensor in tensors.items():
            key = tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()
            if tensor.numel() and key in memory:
                ties[weight(tensor_name)] = memory[key]
                continue
            memory[key] = weight(tensor_name)
            gathered.whole(weight(tensor_name), name, tensor_name, tensor)
    left, unread = [], {}
    for path in sorted(folder.iterdir()):
        if path.name in files or path.name in _INDEX or not path.is_file():
            if path.is_dir():
                left.append(LeftOut(f"{path.name}/", "a folder beside the weights"))
        elif path.name in _TRAINER:
            unread[f"files/{path.name}"] = "the Trainer keeps its states by position, without the parameters' names"
        elif path.suffix in SUFFIXES:
            gathered.whole(FILES + path.name, path.name, path.name, file_tensor(path.read_bytes()))
        else:
            left.append(LeftOut(f"files/{path.name}", "not a file of values"))
    title = f"Hugging Face folder ({len(files)} weight file{'s' if len(files) > 1 else ''})"
    layout = gathered.builder.layout(folder)
    return Stored(title, layout, gathered.read, ties=ties, left_out=tuple(left), unread=unread)


def _tensors(path: Path, allow: Iterable[str]) -> dict[str, Tensor]:
    if path.suffix != ".safetensors":
        content = load_pickle(path, allow)
        if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
            raise CheckpointError(f"{path}: should hold a dict of tensors")
        return dict(content)
    file = TensorFile(folder_at(path.parent), path.name)
    try:
        found = {}
        for name, entry in file.entries.items():
            shape = shape_in_torch(entry["dtype"], entry["shape"])
            tensor = file.mapped(TensorRecord.alone(entry["dtype"], shape, 0, name, -1, ()), 0, verify=False)
            found[name] = torch.empty(shape, dtype=DTYPES[entry["dtype"]]) if tensor is None else tensor
        return found
    finally:
        file.close()


def write_huggingface(stored: Stored, target: Path, most_shard_bytes: int = _MOST_SHARD_BYTES) -> int:
    """Write weights as safetensors, in several files where there is much, and the files that go with them.

    A tied weight is written once, as `save_pretrained` does; config.json says that it is tied.

    Returns:
        Bytes written.

    Raises:
        CheckpointError: there is no config.json among the files.
    """
    names = sorted(stored.under(MODEL))
    if FILES + "config.json" not in stored.names:
        raise CheckpointError(
            f"a Hugging Face folder needs a config.json, and this {stored.title} has none: name a folder that has it "
            "(and the tokenizer) with --files"
        )
    shards: list[list[str]] = [[]]
    used = 0
    for name in names:
        if shards[-1] and used + stored.bytes(name) > most_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += stored.bytes(name)
    written, table = 0, {}
    for number, shard in enumerate(shards, 1):
        file = _WHOLE[0] if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with ThreadPoolExecutor(2) as pool:
            written += _write_shard(target / file, stored, shard, pool)
        table.update({name.removeprefix(MODEL): file for name in shard})
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(map(stored.bytes, names))}, "weight_map": table}
        write_file(target / _INDEX[0], json.dumps(index, indent=2) + "\n")
    for name in stored.under(FILES):
        file = name.removeprefix(FILES)
        if Path(file).name != file or "\\" in file or (target / file).exists():
            raise CheckpointError(f"{name!r} is no name for a file beside the weights; leave it out with --leave-out")
        written += stored.bytes(name)
        write_file(target / file, bytes(host_bytes(stored.tensor(name))))
    return written


def _write_shard(path: Path, stored: Stored, names: list[str], pool: ThreadPoolExecutor) -> int:
    pieces = {}
    for name in names:
        held = stored.holdings(name)
        whole = Region.whole(held.shape)
        piece = Piece(name, DTYPES[held.dtype], held.shape, whole, partial(stored.tensor, name))
        pieces[name.removeprefix(MODEL)] = piece
    record, _ = write_tensor_file(folder_at(path.parent), path.name, pieces, pool)
    return record.bytes
