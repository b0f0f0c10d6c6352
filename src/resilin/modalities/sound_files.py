"""Sound from wave files (PCM), as mono float32."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resilin.data.errors import DataError


def wave_files(paths: tuple[Path, ...]) -> list[Path]:
    """The .wav files that paths name, or that lie in folders they name, by name.

    Raises:
        DataError: there is none.
    """
    found: list[Path] = []
    for path in paths:
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() == ".wav") if path.is_dir() else [path]
        found += inside
    if not found:
        raise DataError(f"{', '.join(map(str, paths)) or 'no path'}: no .wav file; give files, or folders with some")
    return found


def read_wave(path: Path, rate: int) -> Tensor:
    """(L,) float32 in [-1, 1]: a file's sound, its channels averaged, at `rate` samples a second (by linear
    interpolation where the file has another rate).

    Raises:
        DataError: it is no PCM file of 8, 16 or 32 bits.
    """
    try:
        with wave.open(str(path), "rb") as file:
            channels, width, own = file.getnchannels(), file.getsampwidth(), file.getframerate()
            raw = file.readframes(file.getnframes())
    except (wave.Error, OSError, EOFError) as error:
        raise DataError(f"{path}: is not a readable wave file of PCM samples: {error}") from None
    kinds: dict[int, np.dtype[Any]] = {1: np.dtype("u1"), 2: np.dtype("<i2"), 4: np.dtype("<i4")}
    if width not in kinds:
        raise DataError(f"{path}: has samples of {8 * width} bits; 8, 16 and 32 are read")
    raw = raw[: len(raw) // (width * channels) * width * channels]
    values = np.frombuffer(raw, kinds[width]).astype(np.float32)
    values = (values - np.float32(128)) / np.float32(128) if width == 1 else values / np.float32(2 ** (8 * width - 1))
    sound_L = torch.from_numpy(values.reshape(-1, channels).mean(1))
    if own == rate or not len(sound_L):
        return sound_L
    length = max(1, round(len(sound_L) * rate / own))
    return torch.nn.functional.interpolate(sound_L[None, None], length, mode="linear", align_corners=False)[0, 0]
