"""Sources of labelled images: folders of files, idx files, arrays.

Legend: N samples, C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from resilin.data.errors import DataError, Problem
from resilin.data.settings import SourceContext
from resilin.vision.arrays import labels_of, named, read_arrays
from resilin.vision.augment import Normal, Views, cut
from resilin.vision.files import LabelledFile, OnError, class_folders, number_classes, settle
from resilin.vision.grid import Grid
from resilin.vision.idx import read_idx
from resilin.vision.labelled import LabelledSettings, LabelledSource

ENDINGS = (".png", ".jpg", ".jpeg")


class ImageSettings(LabelledSettings):
    """What every source of images has in common."""

    size: Annotated[int, Field(ge=1)]
    """Height and width of the crop (S)."""
    views: Views = Views()
    """How training views are drawn."""
    normal: Normal = Normal()
    """How pixel values are shifted and scaled."""


class _Images(ABC):
    """Shared by the two kinds of stores: from pixels to a view."""

    def __init__(
        self, labels_N: NDArray[np.int64], classes: tuple[str, ...], digest: str, settings: ImageSettings
    ) -> None:
        self.labels_N, self.classes, self.digest = labels_N, classes, digest
        self.views, self.normal = settings.views, settings.normal

    @abstractmethod
    def pixels(self, index: int) -> Tensor:
        """(1, H, W, C) uint8."""

    @property
    def fixed_views(self) -> int:
        """See `resilin.vision.labelled.Samples`."""
        return self.views.validation_crops

    def view(self, index: int, grid: Grid, full: Grid, u: list[float] | None, number: int | None = None) -> Tensor:
        """(C, S, S); see `resilin.vision.labelled.Samples`."""
        pixels_1HWC = self.pixels(index)
        _, height, width, _ = pixels_1HWC.shape
        if u is None:
            box = self.views.validation_box(height, width, grid, full, number)
        else:
            box = self.views.training_box(height, width, grid, full, u)
        view_CHW = cut(pixels_1HWC[:, box.rows, box.columns], grid.size)[:, 0]
        return view_CHW if u is None else self.views.training_view(view_CHW, u)

    def batch(self, views: Sequence[Tensor]) -> Tensor:
        """(B, C, S, S) float32."""
        return self.normal(torch.stack(tuple(views)))


class ImagesInMemory(_Images):
    """Images of one size in an array (N, H, W, C) of uint8."""

    def __init__(
        self,
        pixels_NHWC: NDArray[np.uint8],
        labels_N: NDArray[np.int64],
        classes: tuple[str, ...],
        settings: ImageSettings,
    ) -> None:
        digest = hashlib.sha256(repr(pixels_NHWC.shape).encode())
        digest.update(np.ascontiguousarray(pixels_NHWC).data)
        digest.update(labels_N.tobytes())
        super().__init__(labels_N, classes, digest.hexdigest(), settings)
        self.pixels_NHWC = pixels_NHWC

    def pixels(self, index: int) -> Tensor:
        """(1, H, W, C) uint8."""
        return torch.from_numpy(np.array(self.pixels_NHWC[index : index + 1]))


def decode_image(path: Path, channels: int) -> NDArray[np.uint8]:
    """(H, W, C) pixels of a PNG or JPEG file.

    Raises:
        DataError: when it cannot be decoded.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=("PNG", "JPEG")) as image:
                array = np.asarray(image.convert("RGB" if channels == 3 else "L"))
    except Exception as error:  # a broken file makes Pillow raise almost anything
        raise DataError(f"{path}: is not a readable PNG or JPEG: {error}") from None
    return array if array.ndim == 3 else array[..., None]


class ImageFiles(_Images):
    """Images decoded when they are asked for."""

    def __init__(self, files: Sequence[LabelledFile], root: Path, settings: ImageFolder) -> None:
        classes, labels = number_classes([file.label for file in files])
        listing = [[f.path.relative_to(root).as_posix(), f.path.stat().st_size] for f in files]
        digest = hashlib.sha256(json.dumps(listing).encode()).hexdigest()
        super().__init__(np.array(labels, np.int64), classes, digest, settings)
        self.files, self.channels = files, settings.channels

    def pixels(self, index: int) -> Tensor:
        """(1, H, W, C) uint8."""
        return torch.from_numpy(decode_image(self.files[index].path, self.channels).copy())[None]


def check_images(files: Sequence[LabelledFile], settings: ImageFolder) -> list[LabelledFile]:
    """The files that can be decoded; what was found is kept, so that later runs need not look again.

    Raises:
        DataError: for a file that cannot, on `on_error = "stop"`; or if none can.
    """
    listing = [[str(f.path.resolve()), f.path.stat().st_size, f.path.stat().st_mtime_ns] for f in files]
    name = hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16]
    seen = settings.cache / f"images-{name}.json"
    if seen.exists():
        bad: dict[str, str] = dict(json.loads(seen.read_text(encoding="utf-8")))
    else:
        bad = {}
        for file in files:
            try:
                decode_image(file.path, settings.channels)
            except DataError as error:
                bad[str(file.path)] = str(error).removeprefix(f"{file.path}: ")
        settings.cache.mkdir(parents=True, exist_ok=True)
        aside = seen.with_suffix(".tmp")
        aside.write_text(json.dumps(list(bad.items())), encoding="utf-8")
        aside.replace(seen)
    problems = [Problem("broken", where, what) for where, what in bad.items()]
    settle(problems, len(files), settings.on_error, "images")
    return [file for file in files if str(file.path) not in bad]


class ImageFolder(ImageSettings):
    """PNG and JPEG files, a folder for each class."""

    path: Path
    """The folder of class folders."""
    validation_path: Path | None = None
    """Class folders of their own for validation, instead of `held_out`."""
    channels: Annotated[int, Field(ge=1, le=3)] = 3
    """3: colour; 1: grey."""
    on_error: OnError = "stop"
    """Stop at the first file that cannot be decoded, or leave such files out and count them."""
    cache: Path = Path(".cache/resilin")
    """Where it is kept which files could be decoded."""

    def build(self, context: SourceContext) -> LabelledSource:
        """The source of one split.

        Raises:
            DataError: naming a folder or file that cannot be used; or classes that differ between the two folders.
        """
        separate = self.validation_path is not None
        root = self.validation_path if separate and context.split == "validation" else self.path
        assert root is not None
        files = check_images(class_folders(root, ENDINGS), self)
        samples = ImageFiles(files, root, self)
        if separate:
            for other in (self.path, self.validation_path):
                assert other is not None
                names = tuple(sorted(p.name for p in other.iterdir() if p.is_dir() and not p.name.startswith(".")))
                if names != samples.classes:
                    raise DataError(
                        f"{other}: its classes ({', '.join(names)}) are not those of {root} "
                        f"({', '.join(samples.classes)})"
                    )
        return self.source(samples, Grid(size=self.size), context, split_known=separate)


class Idx(ImageSettings):
    """Images and labels in idx files, plain or gzipped, as Fashion-MNIST has them."""

    images: Path
    labels: Path
    validation_images: Path | None = None
    """Files of their own for validation (the test set), instead of `held_out`."""
    validation_labels: Path | None = None

    def build(self, context: SourceContext) -> LabelledSource:
        """The source of one split.

        Raises:
            DataError: naming the file and what is wrong with it.
        """
        if (self.validation_images is None) != (self.validation_labels is None):
            raise DataError("validation_images and validation_labels belong together: give both or neither")
        separate = self.validation_images is not None
        own = separate and context.split == "validation"
        images = self.validation_images if own else self.images
        labels = self.validation_labels if own else self.labels
        assert images is not None
        assert labels is not None
        pixels = as_pixels(read_idx(images), images)
        labels_N = labels_of(read_idx(labels), len(pixels), labels)
        classes = class_numbers(labels_N if not own else labels_of_file(self.labels))
        samples = ImagesInMemory(pixels, labels_N, classes, self)
        return self.source(samples, Grid(size=self.size), context, split_known=separate)


class Arrays(ImageSettings):
    """Images (N, H, W) or (N, H, W, C) of uint8, and labels, in a .npz file or two .npy files."""

    path: Path
    """The .npz file; or the .npy file of images."""
    labels_path: Path | None = None
    """The .npy file of labels, beside a .npy file of images."""
    images: str = "images"
    """The array of images in a .npz file."""
    labels: str = "labels"
    """The array of labels in a .npz file."""
    validation_images: str = ""
    """The array of validation images in a .npz file, instead of `held_out`."""
    validation_labels: str = ""

    def build(self, context: SourceContext) -> LabelledSource:
        """The source of one split.

        Raises:
            DataError: naming the file and what is wrong with it.
        """
        arrays = read_arrays(self.path)
        separate = bool(self.validation_images)
        if separate != bool(self.validation_labels):
            raise DataError("validation_images and validation_labels belong together: give both or neither")
        own = separate and context.split == "validation"
        if "" in arrays:
            if self.labels_path is None:
                raise DataError(f"{self.path}: holds images only: name the .npy file of labels as labels_path")
            images, labels = arrays[""], named(read_arrays(self.labels_path), "", self.labels_path)
        else:
            images = named(arrays, self.validation_images if own else self.images, self.path)
            labels = named(arrays, self.validation_labels if own else self.labels, self.path)
        pixels = as_pixels(images, self.path)
        labels_N = labels_of(labels, len(pixels), self.labels_path or self.path)
        trained = labels_N if not own else named(arrays, self.labels, self.path)
        samples = ImagesInMemory(pixels, labels_N, class_numbers(trained), self)
        return self.source(samples, Grid(size=self.size), context, split_known=separate)


def labels_of_file(path: Path) -> NDArray[np.int64]:
    """The labels of an idx file."""
    array = read_idx(path)
    return labels_of(array, array.shape[0], path)


def class_numbers(labels_N: NDArray[np.generic]) -> tuple[str, ...]:
    """Names of classes that are only numbered, up to the largest."""
    return tuple(str(n) for n in range(int(labels_N.max()) + 1)) if len(labels_N) else ()


def as_pixels(array: NDArray[np.generic], path: Path) -> NDArray[np.uint8]:
    """An array as (N, H, W, C) of uint8.

    Raises:
        DataError: for another type or shape.
    """
    if array.dtype != np.uint8 or array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[3] not in (1, 3)):
        raise DataError(
            f"{path}: images have shape {array.shape} of {array.dtype}; expected (N, H, W), (N, H, W, 1) or "
            "(N, H, W, 3) of uint8"
        )
    if 0 in array.shape:
        raise DataError(f"{path}: holds no image (shape {array.shape})")
    return array[..., None] if array.ndim == 3 else array  # type: ignore[return-value]
