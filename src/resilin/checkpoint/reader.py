"""One checkpoint opened for reading: any region of any tensor, each by the byte ranges that hold it."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor

from resilin.checkpoint.errors import CheckpointError, DamagedError
from resilin.checkpoint.index import INDEX_NAME, Index, read_index
from resilin.checkpoint.storage import Location, folder_at, join
from resilin.checkpoint.tensor_read import TensorFile
from resilin.checkpoint.tensor_record import DTYPES, TensorRecord
from resilin.checkpoint.tree import Json, put_together
from resilin.layout import Boxes, Layout, Region
from resilin.layout.boxes import overlaps

_MOST_OPEN = 128  # files at once: a checkpoint of a thousand ranks has more than a process may open


class CheckpointReader:
    """A checkpoint whose tensors can be read one by one, from several threads.

        with CheckpointReader("runs/gpt/checkpoints/step-00000100") as saved:
            saved.tensor("model/embed.weight")
            saved.tensor("model/embed.weight", region=Region((0, 0), (128, 64)))  # reads these rows only

    Args:
        location: folder or URL of one step.

    Attributes:
        location: where it is.
        index: what it holds.

    Raises:
        DamagedError: when its index is missing or damaged.
        CheckpointError: when it is of a newer version.
    """

    def __init__(self, location: Location) -> None:
        self.folder = folder_at(location)
        self.location = self.folder.location
        self.index: Index = read_index(self.folder)
        self._open: dict[int, TensorFile] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close its files; tensors that were read, mapped ones too, stay."""
        with self._lock:
            for file in self._open.values():
                file.close()
            self._open.clear()

    def layout(self) -> Layout:
        """Which file holds which region of which tensor."""
        return self.index.layout()

    def record(self, name: str) -> TensorRecord:
        """What the index says of a tensor.

        Raises:
            CheckpointError: there is none of this name.
        """
        if name not in self.index.tensors:
            raise CheckpointError(f"{self.location}: holds no tensor {name!r}")
        return self.index.tensors[name]

    @contextmanager
    def file(self, number: int) -> Iterator[TensorFile]:
        """A file by its number in the index, its header checked against the index."""
        record = self.index.files[number]
        with self._lock:
            file = self._open.get(number)
            if file is None and len(self._open) < _MOST_OPEN:
                file = self._open[number] = TensorFile(self.folder, record.name, record)
        if file is not None:
            yield file
            return
        file = TensorFile(self.folder, record.name, record)
        try:
            yield file
        finally:
            file.close()

    def tensor(
        self,
        name: str,
        device: torch.device | str = "cpu",
        *,
        region: Region | None = None,
        mapped: bool = False,
        verify: bool = True,
    ) -> Tensor:
        """A tensor, or a region of it.

        Args:
            name: its place in the tree, keys joined by `/`.
            device: where it should be.
            region: which elements; None: all. Only the byte ranges that hold them are read.
            mapped: on the CPU, where the tensor lies in one piece on a local disk, a view of the file's pages: nothing
                is read before it is used, with `verify=False`. Writing into it does not change the file.
            verify: compare the checksums of all blocks that are read.

        Raises:
            CheckpointError: naming the file and the tensor that is missing, cut short, changed, or unknown here.
        """
        record, device = self.record(name), torch.device(device)
        wanted = Region.whole(record.shape) if region is None else region
        if len(wanted.sizes) != len(record.shape) or wanted not in Region.whole(record.shape):
            raise CheckpointError(f"{self.location}: tensor {name!r} {list(record.shape)} has no region {wanted}")
        if region is None and record.is_whole and (mapped or device.type != "cpu"):
            with self.file(int(record.files[0])) as file:
                found = file.mapped(record, 0, verify=verify)
            if found is not None:
                return found.to(device)
        # Own memory is aligned as torch likes it, so kernels take the same path as before the save; and reading into
        # it is faster than copying out of a mapping, which would fault in every page once more.
        made = torch.empty(wanted.sizes, dtype=DTYPES[record.dtype])
        self.fill(name, [(wanted, made)], verify=verify)
        return made.to(device)

    def fill(self, name: str, wanted: Sequence[tuple[Region, Tensor]], *, verify: bool = True) -> None:
        """Read regions of one tensor into memory that exists: the last step of every load.

        Args:
            name: of the tensor.
            wanted: region -> CPU tensor of its sizes and the checkpoint's dtype, with any strides.
            verify: compare checksums.
        """
        record = self.record(name)
        pieces, which, boxes = overlaps(record.boxes, Boxes.of([region for region, _ in wanted], len(record.shape)))
        if not record.bytes and len(record):  # no element overlaps; the header is still compared
            with self.file(int(record.files[0])) as file:
                file.begin(record, 0)
        for piece, number, shared in zip(pieces.tolist(), which.tolist(), boxes, strict=True):
            region, target = wanted[number]
            with self.file(int(record.files[piece])) as file:
                view = target[shared.inside(region).slices] if target.dim() else target
                inside = shared.inside(record.boxes.region(piece))
                file.read(record, piece, inside, view, verify=verify)

    def tree(self, parts: Collection[str] | None = None) -> dict[str, Any]:
        """The saved tree as JSON with marks for tensors; with `parts`, only these of its top-level keys.

        Raises:
            CheckpointError: it has no such part, or names a tensor that the index does not list.
        """
        tree: Json = self.index.tree
        if not isinstance(tree, dict):
            raise DamagedError(f"{join(self.location, INDEX_NAME)}: its tree is not a dict")
        chosen: dict[str, Any] = dict(tree) if parts is None else {}
        for part in parts or ():
            key = f"${part}" if part.startswith("$") else part
            if key not in tree:
                have = ", ".join(tree) or "nothing"
                raise CheckpointError(f"{self.location}: has no part {part!r}; it holds: {have}")
            chosen[key] = tree[key]
        return chosen

    def names_in(self, tree: dict[str, Any]) -> list[str]:
        """The tensors that a part of the tree names, each once.

        Raises:
            DamagedError: the index does not list one of them.
        """
        names: dict[str, None] = {}

        def note(name: str) -> None:
            if name not in self.index.tensors:
                where = join(self.location, INDEX_NAME)
                raise DamagedError(f"{where}: its tree names tensor {name!r}, which it does not list")
            names[name] = None

        put_together(tree, note)
        return list(names)
