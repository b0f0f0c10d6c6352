"""Small real files: pictures written by Pillow, a video written by PyAV."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest


def picture(seed: int, height: int = 20, width: int = 24) -> np.ndarray:
    """A smooth colour picture, uint8."""
    rows, columns = np.mgrid[0:height, 0:width]
    phases = np.random.default_rng(seed).uniform(0, 6, 3)
    return np.stack([127 + 100 * np.sin(rows / 4 + p) * np.cos(columns / 5 + p) for p in phases], axis=-1).astype(
        np.uint8
    )


def write_video(path: Path, frames: int = 20, height: int = 32, width: int = 48) -> np.ndarray:
    """A video whose brightness grows with time, without loss; returns its frames."""
    import av

    base = picture(0, height, width).astype(np.int64) // 2
    shown = np.stack([(base + 5 * t).clip(0, 255).astype(np.uint8) for t in range(frames)])
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb", rate=10, options={"crf": "0"})
        stream.width, stream.height, stream.pix_fmt = width, height, "rgb24"
        for pixels in shown:
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)
    return shown


@pytest.fixture
def make_video() -> Callable[..., np.ndarray]:
    return write_video


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Three classes of six pictures of different sizes."""
    from PIL import Image

    root = tmp_path / "images"
    for c, name in enumerate(("bird", "cat", "dog")):
        (root / name).mkdir(parents=True)
        for n in range(6):
            ending = "png" if n % 2 else "jpg"
            Image.fromarray(picture(10 * c + n, 20 + n, 24)).save(root / name / f"{n}.{ending}")
    return root
