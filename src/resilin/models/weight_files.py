"""Reading and writing the safetensors files of a Hugging Face folder, one file or several with an index."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from resilin.config import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class ModelFolderError(UserError):
    """A model folder or file that cannot be read or written; the text says what and why."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelFolderError: missing, not JSON (with the line), or not an object.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFolderError(f"{path}: no such file; is {path.parent} a Hugging Face model folder?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelFolderError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ModelFolderError(f"{path}: should hold a JSON object, holds a {type(tree).__name__}")
    return tree


def _files_of_index(folder: Path) -> dict[Path, set[str]]:
    """The shard files an index names, and the tensors it promises in each."""
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFolderError(f"{folder / INDEX}: has no 'weight_map' table")
    files: dict[Path, set[str]] = {}
    for tensor, name in weight_map.items():
        # An index may come from anywhere: it must not make us open a file elsewhere.
        plain = isinstance(name, str) and name == Path(name).name and "\\" not in name
        if not plain or not name.endswith(".safetensors"):
            raise ModelFolderError(
                f"{folder / INDEX}: tensor {tensor!r} is said to lie in {name!r}; expected the name of a "
                ".safetensors file in the same folder"
            )
        files.setdefault(folder / name, set()).add(tensor)
    return files


def weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """The safetensors files of a folder with the tensors to expect in each (None: whatever is there).

    Raises:
        ModelFolderError: there are none; pickled weights are refused with an explanation.
    """
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: None}
    if (folder / INDEX).is_file():
        return dict(_files_of_index(folder))
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        raise ModelFolderError(
            f"{folder}: holds only {pickles[0]}, a pickle; opening one runs the code inside it, so Resilin reads "
            "safetensors only. Convert it where you trust it: transformers' "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...) writes safetensors"
        )
    raise ModelFolderError(f"{folder}: has neither {SINGLE} nor {INDEX}")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of an open file, of which nothing is read until it is asked for.

    Attributes:
        name: in the file.
        shape: of all of it.
    """

    name: str
    shape: tuple[int, ...]
    _file: Any

    def part(self, place: tuple[slice, ...]) -> Tensor:
        """Some of it: a slice for every dimension. Only these bytes are read."""
        if [(s.start, s.stop) for s in place] == [(0, size) for size in self.shape]:
            whole: Tensor = self._file.get_tensor(self.name)
            return whole
        part: Tensor = self._file.get_slice(self.name)[place]
        return part


def open_tensors(folder: Path) -> Iterator[StoredTensor]:
    """Every tensor of a folder's safetensors files, one at a time; it can be read until the next is asked for.

    Raises:
        ModelFolderError: a file is missing, broken or cut short, or lacks a tensor that the index promises.
    """
    for path, promised in weight_files(folder).items():
        try:
            with safe_open(path, framework="pt") as file:
                names = set(file.keys())
                absent = sorted((promised or set()) - names)
                if absent:
                    raise ModelFolderError(f"{path}: lacks {absent[0]!r}, which {INDEX} promises")
                for name in sorted(names):
                    yield StoredTensor(name, tuple(file.get_slice(name).get_shape()), file)
        except FileNotFoundError:
            raise ModelFolderError(f"{path}: no such file, though {INDEX} names it") from None
        except SafetensorError as error:
            raise ModelFolderError(f"{path}: not a whole safetensors file: {error}") from None


@dataclass(frozen=True, slots=True)
class Pending:
    """A tensor that is made when it is written, so that a model need not be in memory to be written.

    Attributes:
        nbytes: its size.
        make: gives it, contiguous and on the CPU.
    """

    nbytes: int
    make: Callable[[], Tensor]


Writable = Tensor | Pending


def _shards(tensors: Mapping[str, Writable], most_bytes: int) -> list[dict[str, Writable]]:
    shards: list[dict[str, Writable]] = [{}]
    used = 0
    for name, tensor in tensors.items():
        if shards[-1] and used + tensor.nbytes > most_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += tensor.nbytes
    return shards


def write_atomically(path: Path, text: str) -> None:
    """A text file that is either the old one or the whole new one."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_tensors(folder: Path, tensors: Mapping[str, Writable], max_shard_bytes: int) -> list[Path]:
    """Write tensors as one safetensors file, or as numbered ones with an index where they exceed the limit.

    Tensors that are pending are made file by file.

    Weight files of an earlier export that the new set does not use are removed: `transformers` would prefer them.
    """
    shards = _shards(tensors, max_shard_bytes)
    count = len(shards)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)] if count > 1 else [SINGLE]
    weight_map: dict[str, str] = {}
    for name, shard in zip(names, shards, strict=True):
        temporary = folder / (name + ".part")
        made = {one: tensor.make() if isinstance(tensor, Pending) else tensor for one, tensor in shard.items()}
        save_file(made, temporary, metadata={"format": "pt"})
        temporary.replace(folder / name)
        weight_map.update(dict.fromkeys(shard, name))
    written = [folder / name for name in names]
    if count > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_atomically(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
        written.append(folder / INDEX)
    stale = [folder / SINGLE, folder / INDEX, *folder.glob("model-[0-9]*-of-[0-9]*.safetensors")]
    for path in stale:
        if path not in written:
            path.unlink(missing_ok=True)
    return written
