"""Small real runs on clips, images and tokens, with and without multigrid."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from resilin.run.build import build_run
from resilin.run.folder import RunFolder
from resilin.run.run import Run
from resilin.run.settings import RunSettings

Tree = dict[str, Any]
EPOCHS, STAGES, BATCH = 24, (12, 18), 4


def write_clips(path: Path) -> Path:
    """Two videos of moving bars and a list of stretches of them, three classes."""
    import av

    for name, speed in (("a", 1), ("b", -2)):
        with av.open(str(path / f"{name}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=10, options={"crf": "10"})
            stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
            for t in range(24):
                columns = (np.arange(32) + speed * t) % 16 < 8
                pixels = np.where(columns[None, :, None], 200, 40).repeat(32, 0).repeat(3, 2).astype(np.uint8)
                for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                    container.mux(packet)
            for packet in stream.encode(None):
                container.mux(packet)
    lines = [
        f'{{"file": "{name}.mp4", "label": "{name}", "start": {k / 5}, "end": {k / 5 + 1.2}}}\n'
        for name in ("a", "b")
        for k in range(6)
    ]
    listed = path / "list.jsonl"
    listed.write_text("".join(lines), encoding="utf-8")
    return listed


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """Settings of a source of clips."""
    folder = tmp_path_factory.mktemp("clips")
    return {
        "use": "resilin.vision.videos:Videos",
        "path": str(write_clips(folder)),
        "cache": str(folder / "cache"),
        "frames": 4,
        "size": 16,
        "kept_side": 0,
        "views": {"scale": [16, 20]},
        "held_out": {"fraction": 0.34},
    }


def run_tree(source: Tree, **patches: Any) -> Tree:
    """Settings of a small run on clips: sub-batch norm over 2 samples, step decay, SGD."""
    tree: Tree = {
        "source": source,
        "model": {
            "use": "resilin.multigrid.norms:SubBatchNorms",
            "base": 2,
            "precise_batches": 2,
            "model": {
                "use": "resilin.vision.slowfast:SlowFast",
                "classes": 2,
                "stages": [1],
                "width": 8,
                "block": "basic",
                "stem": "small",
                "alpha": 2,
            },
        },
        "objective": {"use": "resilin.vision.classification:Classification"},
        "optimizer": {
            "use": "resilin.multigrid.rate:MultigridRate",
            "optimizer": {
                "lr": 0.05,
                "schedule": {"use": "resilin.optim.stepwise:Stepwise", "boundaries": [0.5, 0.75], "warmup": 4},
            },
        },
        "train": {"steps": EPOCHS, "batch_size": BATCH, "device": "cpu", "threads": 1},
        "precision": {"compute": "fp32"},
        "evaluation": {"every": 1000, "batches": 0},
        "checkpoint": {"every": 0},
        "log": {"tensorboard": False, "live": False},
    }
    return {**tree, **patches}


def multigrid(source: Tree, **more: Any) -> Tree:
    """Settings of a multigrid source: an epoch is a plain step."""
    return {
        "use": "resilin.multigrid.source:Multigrid",
        "source": source,
        "epochs": EPOCHS,
        "stages": list(STAGES),
        "steps_per_epoch": 1,
        "long_factors": [[0.5, 0.5**0.5], [1.0, 1.0]],
        **more,
    }


def build(tree: Tree, steps: int | None = None, folder: Path | None = None) -> Run:
    """The run of a tree, of as many steps as its grid schedule takes (or as named)."""
    from resilin.run.build import build_sources

    settings = RunSettings.model_validate(tree)
    if steps is None:
        schedule = getattr(build_sources(settings, validation=False).source, "grid_schedule", None)
        steps = schedule.total if schedule is not None else settings.train.steps
    settings = settings.model_copy(update={"train": settings.train.model_copy(update={"steps": steps})})
    return build_run(settings, RunFolder(folder) if folder is not None else None)


@pytest.fixture
def plain_tree(clips: Tree) -> Tree:
    """A run on clips without a grid schedule."""
    return run_tree(clips)


@pytest.fixture
def grid_tree(clips: Tree) -> Callable[..., Tree]:
    """The same run with one; keywords go to the multigrid source."""
    return lambda **more: run_tree(multigrid(clips, **more))


@pytest.fixture
def make_run() -> Callable[..., Run]:
    return build
