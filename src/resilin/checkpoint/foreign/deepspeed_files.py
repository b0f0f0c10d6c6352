"""The files of a DeepSpeed checkpoint: which ranks wrote them, and what each says."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from resilin.checkpoint.errors import CheckpointError, DamagedError
from resilin.checkpoint.foreign.deepspeed_experts import check_experts
from resilin.checkpoint.foreign.pickles import inside, load_pickle

_MODEL = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_MODEL_3 = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_EXPERT = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_00_model_states\.pt")
_BY_POSITION = re.compile(r"expp_rank_\d+_mp_rank_\d+_optim_states\.pt")
_LAYER = re.compile(r"layer_(\d+)-model(?:_(\d+))?(?:-model)?_states\.pt")


def tag_folder(folder: Path, pointer: str = "latest") -> Path:
    """The folder of a checkpoint: `folder` itself, or the one that its pointer file names."""
    path = folder / pointer
    if not path.is_file():
        return folder
    named = inside(folder, path.read_text().strip(), path)
    if not named.is_dir():
        raise DamagedError(f"{path}: names {named.name!r}, and there is no such folder")
    return named


def is_deepspeed(folder: Path) -> bool:
    """Whether a folder holds a DeepSpeed checkpoint of any ZeRO stage."""
    return any(tag_folder(folder).glob("*mp_rank_*_model_states.pt")) and not (tag_folder(folder) / "zero").is_dir()


@dataclass(frozen=True)
class DeepSpeedFiles:
    """Everything of one checkpoint folder, loaded lazily (tensors are mapped).

    Attributes:
        folder: of the tag.
        models: (dp, mp) -> (file name, content); stages below 3 have dp 0 only.
        optimizers: (dp, mp) -> (file name, content); empty without ZeRO.
        layers: (layer, tp) -> (file name, content), of pipelines.
        experts: (MoE layer, expert) -> (file name, content).
        by_position: files of optimizer states that name no parameter (experts without ZeRO).
        pipeline, tensor: degrees.
        partitioned: whether the model files are of stage 3, which cuts parameters over the data ranks.
    """

    folder: Path
    models: dict[tuple[int, int], tuple[str, dict[str, Any]]]
    optimizers: dict[tuple[int, int], tuple[str, dict[str, Any]]]
    layers: dict[tuple[int, int], tuple[str, dict[str, Any]]]
    pipeline: int
    tensor: int
    partitioned: bool = False
    experts: dict[tuple[int, int], tuple[str, dict[str, Any]]] = field(default_factory=dict)
    by_position: tuple[str, ...] = ()

    @property
    def data(self) -> int:
        """Ranks over which ZeRO cut the states."""
        return 1 + max((dp for dp, _ in self.optimizers), default=0)

    def model(self, mp: int, dp: int = 0) -> tuple[str, dict[str, Any]]:
        """The model file of a rank."""
        return self.models[dp, mp]


def open_files(folder: Path, allow: Iterable[str] = ()) -> DeepSpeedFiles:
    """Open every file of a checkpoint.

    Raises:
        CheckpointError: a rank's file is missing, unreadable, or of a kind that is not read.
    """
    folder = tag_folder(folder)
    names = sorted(path.name for path in folder.iterdir())
    allow = tuple(allow)

    def load(pattern: re.Pattern[str]) -> dict[tuple[int, int], tuple[str, dict[str, Any]]]:
        found: dict[tuple[int, int], tuple[str, dict[str, Any]]] = {}
        for name in names:
            match = pattern.fullmatch(name)
            if match:
                numbers = [int(text or 0) for text in match.groups()]
                key = (0, numbers[0]) if len(numbers) == 1 else (numbers[0], numbers[1])
                if key in found:
                    raise CheckpointError(f"{folder}: both {found[key][0]} and {name} are of rank {key}: remove one")
                content = load_pickle(folder / name, allow)
                if not isinstance(content, dict):
                    raise DamagedError(f"{folder / name}: holds a {type(content).__name__}, not a dict")
                found[key] = name, content
        return found

    optimizers, layers, experts = load(_OPTIMIZER), load(_LAYER), load(_EXPERT)
    by_position = [name for name in names if _BY_POSITION.fullmatch(name)]
    whole = load(_MODEL)
    models = whole or load(_MODEL_3)
    known = {name for table in (models, optimizers, layers, experts) for name, _ in table.values()}
    known.update(by_position)
    strange = [name for name in names if name.endswith("_states.pt") and name not in known]
    if strange and models:
        raise CheckpointError(f"{folder / strange[0]}: is a file of states, but of no kind that is known here")
    if not models:
        raise DamagedError(f"{folder}: has no mp_rank_*_model_states.pt")
    _complete(folder, "model_states", models)
    _complete(folder, "optim_states", optimizers)
    mp = 1 + max(rank for _, rank in models)
    if optimizers and 1 + max(rank for _, rank in optimizers) != mp:
        raise DamagedError(f"{folder}: has model files of {mp} ranks, and optimizer files of another number")
    dimensions = models[0, 0][1].get("checkpoint_parallel_dimensions") or {}
    pipeline = dimensions.get("pp_degree") or (mp // (1 + max(tp for _, tp in layers)) if layers else 1)
    files = DeepSpeedFiles(folder, models, optimizers, layers, int(pipeline), mp // int(pipeline), not whole)
    files = replace(files, experts=experts, by_position=tuple(by_position))
    check_experts(folder, models[0, 0][1], experts)
    if mp > 1 and (experts or by_position):
        raise CheckpointError(f"{folder}: experts together with tensor or pipeline ranks are not read")
    _check_counts(files)
    return files


def _complete(folder: Path, kind: str, files: dict[tuple[int, int], tuple[str, dict[str, Any]]]) -> None:
    if not files:
        return
    for dp in range(1 + max(dp for dp, _ in files)):
        for mp in range(1 + max(mp for _, mp in files)):
            if (dp, mp) not in files:
                have = ", ".join(name for name, _ in list(files.values())[:3])
                raise DamagedError(
                    f"{folder}: the {kind} file of data rank {dp}, model rank {mp:02d} is missing (there are {have})"
                )


def _check_counts(files: DeepSpeedFiles) -> None:
    for (_, mp), (name, content) in files.optimizers.items():
        state = content.get("optimizer_state_dict")
        if not isinstance(state, dict):
            raise DamagedError(f"{files.folder / name}: has no 'optimizer_state_dict'")
        counts = state.get("partition_count", files.data)
        counts = counts if isinstance(counts, list) else [counts]
        if any(max(counts) % count for count in counts):
            raise CheckpointError(f"{files.folder / name}: its parameter groups are cut over {counts} ranks")
        if max(counts) != files.data:
            raise DamagedError(
                f"{files.folder}: {name} says that {max(counts)} data ranks wrote it, and there are files of "
                f"{files.data} for model rank {mp:02d}: some are missing, or of an earlier checkpoint"
            )
