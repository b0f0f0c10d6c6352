"""Arrays in .npy and .npz files, read without pickle."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from resilin.data.errors import DataError


def read_arrays(path: Path) -> dict[str, NDArray[np.generic]]:
    """The arrays of a .npz file by name; that of a .npy file as "".

    Raises:
        DataError: when it cannot be read, or holds pickled objects, which are never unpickled here.
    """
    try:
        loaded = np.load(path, allow_pickle=False, mmap_mode="r" if path.suffix == ".npy" else None)
        if isinstance(loaded, np.ndarray):
            return {"": loaded}
        with loaded:
            return {name: loaded[name] for name in loaded.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        hint = "; object arrays are not read: save numbers" if "pickle" in str(error).lower() else ""
        raise DataError(f"{path}: cannot be read as .npy or .npz: {error}{hint}") from None


def named(arrays: dict[str, NDArray[np.generic]], name: str, path: Path) -> NDArray[np.generic]:
    """One array by name.

    Raises:
        DataError: naming those there are.
    """
    if name in arrays:
        return arrays[name]
    have = ", ".join(sorted(arrays)) or "no array"
    raise DataError(f"{path}: has no array {name!r}; it holds {have}")


def labels_of(array: NDArray[np.generic], count: int, path: Path) -> NDArray[np.int64]:
    """Labels as int64, one for each of `count` samples.

    Raises:
        DataError: for another shape, numbers that are not whole, or negative ones.
    """
    if array.shape != (count,):
        raise DataError(f"{path}: labels have shape {array.shape}; expected ({count},), one for each sample")
    if not np.issubdtype(array.dtype, np.integer):
        raise DataError(f"{path}: labels are {array.dtype}; integers were expected")
    labels_N: NDArray[np.int64] = array.astype(np.int64)
    if count and labels_N.min() < 0:
        raise DataError(f"{path}: label {labels_N.min()} is negative")
    return labels_N
