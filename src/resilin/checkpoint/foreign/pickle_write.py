"""Files of `torch.save` with objects of foreign classes in them, whose classes need not be there.

The counterpart of `pickles.py`: a `Record` is written under the name of what it stands for, with its fields as the
object's. Only the tool that opens the file imports anything.
"""

from __future__ import annotations

import copyreg
import io
import pickle
from pathlib import Path
from typing import Any

import torch

from resilin.checkpoint.foreign.pickles import Record, record_class


class _Pickler(pickle._Pickler):
    """Python's own pickler, which does not look up the class of a record."""

    def save_global(self, obj: Any, name: str | None = None) -> None:
        """A class by its name; that of a record by the name of what it stands for."""
        if isinstance(obj, type) and issubclass(obj, Record) and obj.foreign:
            module, _, own = obj.foreign.rpartition(".")
            self.write(pickle.GLOBAL + f"{module}\n{own}\n".encode())  # type: ignore[attr-defined]
            self.memoize(obj)  # type: ignore[attr-defined]
        else:
            super().save_global(obj, name)  # type: ignore[misc]

    def reducer_override(self, obj: Any) -> Any:
        """A record as an object made without a call of its class, then given its fields."""
        if not isinstance(obj, Record):
            return NotImplemented
        fields = {name: value for name, value in vars(obj).items() if name != "args"}
        return copyreg.__newobj__, (type(obj), *obj.args), fields  # type: ignore[attr-defined]


class _Module:
    """What `torch.save` takes of a pickle module."""

    Pickler = _Pickler


def record(name: str, **fields: Any) -> Record:
    """An object of the foreign class of this full name, with these fields."""
    made = record_class(name)()
    made.__dict__.update(fields)
    return made


def save_pickle(path: Path, content: Any) -> int:
    """Write a new file as `torch.save` does.

    Returns:
        Its bytes.
    """
    with path.open("xb") as handle:
        torch.save(content, handle, pickle_module=_Module)
        handle.seek(0, io.SEEK_END)
        return handle.tell()
