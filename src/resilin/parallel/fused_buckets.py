"""Many tensors in few messages: gradients summed, and parameters gathered, by slices of packed buckets.

A table says where each tensor lies in which bucket, the same on all ranks. A bucket of gradients is sent when its last
tensor has come, buckets in order; every rank adds up one slice of each, rank after rank, so a sum does not depend on
how tensors are packed: it is that of every tensor sent by itself, to the bit (SE-MoE, Shen et al., 2022, first version,
"fusion communication"). A bucket of parameters is put together from the ranks' slices; tensors are views of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from resilin.layout.dealing import ALIGN
from resilin.parallel.errors import ParallelError
from resilin.parallel.exchange import Wait, share, swap
from resilin.parallel.group import Group


@dataclass(frozen=True, slots=True)
class Packed:
    """Where a tensor lies.

    Attributes:
        bucket: its number.
        offset: the first element.
        shape: of the tensor.
    """

    bucket: int
    offset: int
    shape: tuple[int, ...]

    def view(self, bucket: Tensor) -> Tensor:
        """The tensor in a whole bucket."""
        return bucket[self.offset : self.offset + math.prod(self.shape)].view(self.shape)


@dataclass(frozen=True)
class PackingTable:
    """Where tensors lie in buckets.

    Attributes:
        places: by name, in order.
        lengths: elements of each bucket: a multiple of the number of ranks, and each slice of one of 16 elements.
    """

    places: Mapping[str, Packed]
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]], ranks: int, elements: int) -> PackingTable:
        """Tensors in the order given; a bucket is closed when the next one would make it larger than asked for.

        Args:
            shapes: by name.
            ranks: among which buckets are cut.
            elements: of a bucket, about; a larger tensor has one by itself.
        """
        places: dict[str, Packed] = {}
        lengths: list[int] = []
        used = 0
        for name, shape in shapes.items():
            size = math.prod(shape)
            if used and used + size > elements:
                lengths.append(used)
                used = 0
            places[name] = Packed(len(lengths), used, tuple(shape))
            used += size
        if places:
            lengths.append(used)
        multiple = ranks * ALIGN
        return cls(places, tuple(-(-length // multiple) * multiple for length in lengths))

    def names(self, bucket: int) -> list[str]:
        """Of the tensors in a bucket, in order."""
        return [name for name, place in self.places.items() if place.bucket == bucket]


class FusedBuckets:
    """Buckets of one format on one device, and what is under way with them.

        buckets = FusedBuckets(shapes, group)
        for name, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: buckets.put(name, p.grad))
        loss.backward()
        slices = buckets.reduced()  # of every bucket this rank's slice, summed over the ranks
        ...                         # an optimizer that works element by element updates slices of parameters
        tensors = buckets.gathered(updated)

    Args:
        shapes: of the tensors, by name: the order in which they are expected.
        group: all of its ranks have the same shapes.
        bucket_bytes: of one bucket, about.
        dtype: of all tensors.
        device: of all tensors.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        group: Group,
        bucket_bytes: int = 25 << 20,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.table = PackingTable.of(shapes, group.size, bucket_bytes // dtype.itemsize)
        self.group, self._dtype, self._device = group, dtype, device
        self._buffers = [torch.zeros(length, dtype=dtype, device=device) for length in self.table.lengths]
        self._came = [torch.empty_like(buffer) for buffer in self._buffers]
        self._missing: list[set[str]] = []
        self._waits: list[Wait] = []
        self._begin()

    def put(self, name: str, tensor: Tensor) -> None:
        """Copy a gradient into its bucket, and send what is complete, in the order of buckets.

        Raises:
            ParallelError: there is no such tensor, it has another shape, or it came already.
        """
        place = self.table.places.get(name)
        if place is None or place.shape != tuple(tensor.shape):
            known = "no such tensor" if place is None else f"shape {list(place.shape)}"
            raise ParallelError(f"{name} of shape {list(tensor.shape)} is put into buckets that have {known}")
        if name not in self._missing[place.bucket]:
            raise ParallelError(f"{name} is put a second time before `reduced` was called")
        self._missing[place.bucket].discard(name)
        place.view(self._buffers[place.bucket]).copy_(tensor)
        while len(self._waits) < len(self._missing) and not self._missing[len(self._waits)]:
            self._send()

    def reduced(self) -> list[Tensor]:
        """This rank's slice of every bucket, summed over the ranks; all ranks call together, once a step.

        What was not put counts as zeros.
        """
        for bucket, missing in enumerate(self._missing):
            for name in missing:
                self.table.places[name].view(self._buffers[bucket]).zero_()
        while len(self._waits) < len(self._missing):
            self._send()
        slices = []
        for wait, came in zip(self._waits, self._came, strict=True):
            wait()
            parts = came.view(self.group.size, -1)
            total = parts[0].clone()
            for part in parts[1:]:
                total += part
            slices.append(total)
        self._begin()
        return slices

    def slices(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """This rank's slice of every bucket, of tensors that it has in whole; copies.

        Args:
            tensors: by name, such as all parameters.
        """
        found = []
        for bucket, length in enumerate(self.table.lengths):
            whole = torch.zeros(length, dtype=self._dtype, device=self._device)
            for name in self.table.names(bucket):
                self.table.places[name].view(whole).copy_(tensors[name])
            found.append(whole.view(self.group.size, -1)[self.group.index].clone())
        return found

    def start(self, bucket: int, part: Tensor) -> Gathering:
        """Begin to put a bucket together from all ranks' slices; all ranks call together.

        Args:
            bucket: its number.
            part: this rank's slice.
        """
        whole = torch.empty(self.table.lengths[bucket], dtype=part.dtype, device=part.device)
        parts = list(whole.view(self.group.size, -1))
        parts[self.group.index].copy_(part)
        return Gathering(self.table, bucket, whole, share(parts, self.group))

    def gathered(self, slices: Sequence[Tensor]) -> dict[str, Tensor]:
        """All tensors, as views of whole buckets; all ranks call together."""
        under_way = [self.start(bucket, part) for bucket, part in enumerate(slices)]
        return {name: tensor for one in under_way for name, tensor in one.wait().items()}

    def _begin(self) -> None:
        self._missing = [set(self.table.names(bucket)) for bucket in range(len(self.table.lengths))]
        self._waits = []

    def _send(self) -> None:
        bucket = len(self._waits)
        sent, came = self._buffers[bucket], self._came[bucket]
        sizes = [len(sent) // self.group.size] * self.group.size
        self._waits.append(swap(came, sent, sizes, sizes, self.group))


@dataclass(frozen=True)
class Gathering:
    """A bucket that is being put together.

    Attributes:
        table: of its tensors.
        bucket: its number.
        whole: all of its elements, once they are there.
        done: waits for that.
    """

    table: PackingTable
    bucket: int
    whole: Tensor
    done: Wait

    def wait(self) -> dict[str, Tensor]:
        """The bucket's tensors by name, as views of it."""
        self.done()
        return {name: self.table.places[name].view(self.whole) for name in self.table.names(self.bucket)}
