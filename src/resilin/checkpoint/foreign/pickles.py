"""Foreign pickles, read as data: nothing that a file names is ever imported or run.

`torch.load(weights_only=True)` builds tensors and plain values. Where a tool puts objects of its own beside them
(DeepSpeed's fragment addresses, Megatron's arguments), a `Record` takes their place: it has the object's fields and no
behaviour. Only names known to be such data are let through; any other is refused by name.
"""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from io import RawIOBase
from pathlib import Path
from typing import IO, Any, ClassVar

import torch
from torch import Tensor

from resilin.checkpoint.errors import CheckpointError, DamagedError

KNOWN_DATA = (
    "_io.BytesIO",
    "argparse.Namespace",
    "types.SimpleNamespace",
    "deepspeed.checkpoint.universal_checkpoint.SubparamShape",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "megatron.core.enums.ModelType",
    "megatron.core.transformer.enums.AttnBackend",
    "megatron.core.transformer.enums.CudaGraphScope",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray._reconstruct",
    "numpy.dtype",
    "numpy.ndarray",
)
_METADATA = (
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.distributed.checkpoint.metadata.BytesStorageMetadata",
    "torch.distributed.checkpoint.metadata.ChunkStorageMetadata",
    "torch.distributed.checkpoint.metadata.Metadata",
    "torch.distributed.checkpoint.metadata.MetadataIndex",
    "torch.distributed.checkpoint.metadata.StorageMeta",
    "torch.distributed.checkpoint.metadata.TensorProperties",
    "torch.distributed.checkpoint.metadata.TensorStorageMetadata",
    "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
    "torch.serialization._get_layout",
)


class Record:
    """An object of a foreign class, as data: `args` it was made with, and its fields."""

    foreign = ""
    args: tuple[Any, ...] = ()

    def __new__(cls, *args: Any) -> Record:
        """What a pickle calls to make the object."""
        made = super().__new__(cls)
        made.args = args
        return made

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.__dict__["state"] = state

    def __getattr__(self, name: str) -> Any:
        raise CheckpointError(f"a {type(self).foreign} without {name!r}: it was written by a version not known here")


def record_class(name: str) -> type[Record]:
    """What stands in for the class or function of this full name."""
    return type(name.rpartition(".")[2], (Record,), {"foreign": name})


def load_pickle(path: Path, allow: Iterable[str] = ()) -> Any:
    """What `torch.save` wrote, its tensors mapped: nothing of them is read before it is used.

    Args:
        path: the file.
        allow: full names of further classes to take as data.

    Raises:
        DamagedError: the file is missing, cut short or no such file.
        CheckpointError: it holds objects of classes that are not known to be plain data.
    """
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
    except FileNotFoundError:
        raise DamagedError(f"{path}: the file is missing") from None
    except OSError as error:
        raise DamagedError(f"{path}: cannot be opened: {error.strerror}") from None
    return _load(path, allow, path, mmap=zipped)


def load_stream(stream: IO[bytes] | RawIOBase, where: str, map_location: str = "cpu") -> Any:
    """What `torch.save` wrote into a stream.

    Args:
        stream: at its beginning.
        where: what to call it in a message.
        map_location: "meta" gives tensors without data.

    Raises:
        CheckpointError: as `load_pickle`.
    """
    return _load(stream, (), where, map_location=map_location)


def _load(source: Any, allow: Iterable[str], where: object, map_location: str = "cpu", **options: Any) -> Any:
    known: list[Any] = [(record_class(name), name) for name in (*KNOWN_DATA, *allow)]
    try:
        with torch.serialization.safe_globals(known):
            return torch.load(source, map_location=map_location, weights_only=True, **options)
    except pickle.UnpicklingError as error:
        match = re.search(r"GLOBAL (\S+) was not an allowed|GLOBAL (\S+) whose module", str(error))
        if match is None:
            raise DamagedError(f"{where}: cannot be read as a torch file ({_first_line(error)})") from None
        name = match[1] or match[2]
        raise CheckpointError(refusal(where, name if "." in name else f"builtins.{name}")) from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise DamagedError(f"{where}: is cut short or damaged ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].partition(". ")[0]


def refusal(where: object, name: str) -> str:
    """Why a file with an object of this class is not read, and what to do."""
    return (
        f"{where}: holds a {name}, which is neither a tensor nor a plain value; building one could run code, so it is "
        f"not read. If it is only data, let it be taken as its bare fields with --allow {name} (nothing is imported "
        "or run); or save the checkpoint again without it"
    )


class _MetadataUnpickler(pickle.Unpickler):
    """Reads the index of a distributed checkpoint, which is a plain pickle and no torch file."""

    _real: ClassVar[Mapping[str, Any]] = {
        "torch.Size": torch.Size,
        "torch.strided": torch.strided,
        "collections.OrderedDict": OrderedDict,
        "builtins.set": set,
        **{str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)},
    }
    _records: ClassVar = {name: record_class(name) for name in _METADATA}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        found = self._real.get(full) or self._records.get(full)
        if found is None:
            raise CheckpointError(full)
        return found


def load_metadata(path: Path) -> Any:
    """The `.metadata` of a torch distributed checkpoint, its objects as records.

    Raises:
        DamagedError: the file is missing or damaged.
        CheckpointError: it names something that such an index has no need of.
    """
    try:
        with path.open("rb") as file:
            return _MetadataUnpickler(file).load()
    except CheckpointError as error:
        raise CheckpointError(
            f"{path}: names {error}, which the index of a distributed checkpoint has no need of; it is not read"
        ) from None
    except FileNotFoundError:
        raise DamagedError(f"{path}: the file is missing") from None
    except Exception as error:  # a damaged pickle can fail in any way
        raise DamagedError(f"{path}: is cut short or damaged ({_first_line(error)})") from None


def plain(value: Any, where: str) -> Any:
    """A value as a tree that a checkpoint can hold: tuples become lists, records dicts of their fields.

    Raises:
        CheckpointError: for anything else, by its place.
    """
    if value is None or isinstance(value, (bool, int, float, str, Tensor)):
        return value
    if isinstance(value, Mapping):
        made = {str(key): plain(item, f"{where}/{key}") for key, item in value.items()}
        if len(made) < len(value):
            raise CheckpointError(f"{where}: has keys that differ by their type alone (1 and '1'); leave it out")
        return made
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value) if isinstance(value, (set, frozenset)) else value
        return [plain(item, f"{where}/{number}") for number, item in enumerate(items)]
    if isinstance(value, Record):
        fields = {name: item for name, item in vars(value).items() if name != "args"}
        if value.args and not fields:
            return plain(value.args[0] if len(value.args) == 1 else value.args, where)
        return plain(fields, where)
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value)
    raise CheckpointError(
        f"{where}: a {type(value).__module__}.{type(value).__name__} has no place in another format; "
        f"leave it out with --leave-out {where!r}"
    )


def inside(folder: Path, name: str, where: Path) -> Path:
    """A file that foreign metadata names, if it lies in the checkpoint's folder.

    Raises:
        DamagedError: when it leads out of it.
    """
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts or "\\" in name or "\0" in name:
        raise DamagedError(f"{where}: names the file {name!r}, which leads out of {folder}; expected one inside it")
    return folder / name


def buffer_of(tensor: Tensor) -> Tensor:
    """All the memory that a tensor is a view of, as one row of its elements."""
    count = tensor.untyped_storage().nbytes() // max(tensor.element_size(), 1)
    return tensor.as_strided((count,), (1,), 0)


def leaves(tree: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Everything in nested dicts and lists that is neither, with the keys that lead to it."""
    if isinstance(tree, Mapping):
        for key, item in tree.items():
            yield from leaves(item, (*prefix, str(key)))
    elif isinstance(tree, (list, tuple)):
        for number, item in enumerate(tree):
            yield from leaves(item, (*prefix, str(number)))
    else:
        yield prefix, tree
