"""Video files decoded once, with PyAV, into memory-mapped frames.

Legend: T frames, H height, W width.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resilin.data.errors import DataError


@dataclass(frozen=True, slots=True)
class Frames:
    """All frames of one file.

    Attributes:
        pixels_THWC: uint8, RGB, memory-mapped.
        rate: frames a second.
    """

    pixels_THWC: NDArray[np.uint8]
    rate: float


def cache_name(path: Path, short_side: int) -> str:
    """A name that changes with the file and with the size its frames are kept at."""
    stat = path.stat()
    facts = [str(path.resolve()), stat.st_size, stat.st_mtime_ns, short_side]
    return "frames-" + hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def scaled_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Height and width with the short side at most `short_side`; 0 keeps them."""
    short = min(height, width)
    if not short_side or short <= short_side:
        return height, width
    return max(1, round(height * short_side / short)), max(1, round(width * short_side / short))


def decode_video(path: Path, short_side: int, cache: Path) -> Frames:
    """The frames of a video file, from the cache where they are there.

    Args:
        path: any file that FFmpeg decodes.
        short_side: frames larger than this are scaled down before they are kept; 0 keeps them as they are.
        cache: folder of decoded files.

    Raises:
        DataError: when the file cannot be opened or decoded, or has no frame.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    data = cache / f"{cache_name(path, short_side)}.npy"
    facts = data.with_suffix(".json")
    if not facts.exists():
        _write(path, short_side, data, facts)
    return Frames(np.load(data, mmap_mode="r", allow_pickle=False), json.loads(facts.read_text())["rate"])


def _write(path: Path, short_side: int, data: Path, facts: Path) -> None:
    data.parent.mkdir(parents=True, exist_ok=True)
    # Written aside and renamed: several processes may want the same file, and a kill must not leave half of it.
    handle, name = tempfile.mkstemp(prefix=data.stem, suffix=".raw", dir=data.parent)
    raw = Path(name)
    try:
        with os.fdopen(handle, "wb") as out:
            shape, rate = _decode_into(path, short_side, out)
        aside = raw.with_suffix(".npy")
        mapped = np.lib.format.open_memmap(aside, mode="w+", dtype=np.uint8, shape=shape)
        source = np.memmap(raw, np.uint8, "r", shape=shape)
        for start in range(0, shape[0], 64):
            mapped[start : start + 64] = source[start : start + 64]
        mapped.flush()
        del source, mapped
        aside.replace(data)
        words = raw.with_suffix(".json")
        words.write_text(json.dumps({"rate": rate, "file": str(path)}), encoding="utf-8")
        words.replace(facts)
    finally:
        raw.unlink(missing_ok=True)


def _decode_into(path: Path, short_side: int, out: Any) -> tuple[tuple[int, int, int, int], float]:
    import av

    count, size = 0, (0, 0)
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DataError(f"{path}: has no video stream")
            stream = container.streams.video[0]
            rate = float(stream.average_rate or stream.guessed_rate or 0)
            for frame in container.decode(stream):
                size = size if count else scaled_size(frame.height, frame.width, short_side)
                pixels = frame.reformat(width=size[1], height=size[0], format="rgb24", interpolation="AREA")
                out.write(np.ascontiguousarray(pixels.to_ndarray()).data)
                count += 1
    except (av.error.FFmpegError, OSError, ValueError, IndexError) as error:
        raise DataError(f"{path}: cannot be decoded after {count} frames: {error}") from None
    if not count:
        raise DataError(f"{path}: has no frame")
    return (count, *size, 3), rate or 25.0
