"""The handwritten digits that scikit-learn comes with, as a source of labelled images.

1,797 pictures of 8 x 8 pixels by 43 people (Alpaydin and Kaynak, 1998).
"""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from resilin.data.errors import DataError
from resilin.data.settings import SourceContext
from resilin.vision.augment import Normal, Views
from resilin.vision.grid import Grid
from resilin.vision.images import ImageSettings, ImagesInMemory
from resilin.vision.labelled import LabelledSource


def digits_file() -> Path:
    """Where scikit-learn keeps the digits; nothing of it is imported, which is slow.

    Raises:
        DataError: it is not installed.
    """
    spec = importlib.util.find_spec("sklearn")
    path = Path(spec.origin or "").parent / "datasets" / "data" / "digits.csv.gz" if spec is not None else Path()
    if not path.is_file():
        raise DataError("the digits come with scikit-learn, which is not installed: pip install scikit-learn")
    return path


def digit_pixels() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(N, 8, 8) grey values from 0 to 16, and the digit of each.

    Raises:
        DataError: scikit-learn is not installed.
    """
    lines = gzip.decompress(digits_file().read_bytes()).decode().splitlines()
    table = np.loadtxt(lines, delimiter=",", dtype=np.int64)
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1]


class Digits(ImageSettings):
    """Pictures of digits; their classes are called 0 to 9."""

    size: Literal[8] = 8
    """Height and width."""
    channels: Literal[1, 3] = 1
    """3: the grey value three times, beside pictures in colour."""
    views: Views = Views(flip=False)
    """How training views are drawn; a mirrored digit is none."""
    normal: Normal = Normal()
    """How pixel values are shifted and scaled."""

    def build(self, context: SourceContext) -> LabelledSource:
        """The source of one split.

        Raises:
            DataError: scikit-learn is not installed.
        """
        grey_NHW, labels_N = digit_pixels()
        pixels_NHWC = np.repeat((grey_NHW * (255 / 16)).round().astype(np.uint8)[..., None], self.channels, -1)
        classes = tuple(str(digit) for digit in range(10))
        samples = ImagesInMemory(pixels_NHWC, labels_N, classes, self)
        return self.source(samples, Grid(size=self.size), context)
