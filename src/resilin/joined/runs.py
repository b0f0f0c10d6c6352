"""What comes out of runs: an expert to hand over, and the tuned router of a joined model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resilin import __version__
from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.folder import CheckpointFolder
from resilin.data.tokenizer import TOKENIZER_FILE, Tokenizer
from resilin.joined.errors import JoinError
from resilin.joined.expert import Expert, expert_of
from resilin.joined.join import open_base
from resilin.joined.seed import Seed
from resilin.joined.training import NewExpert, TunedRouter
from resilin.joined.write import write_joined
from resilin.models.decoder import Decoder
from resilin.models.settings import ModelContext
from resilin.run.folder import RunFolder
from resilin.run.frozen import joined
from resilin.run.settings import RunSettings


def _opened(path: Path, step: int | None, kind: type) -> tuple[RunSettings, CheckpointFolder, int]:
    folder = RunFolder(path)
    if not folder.holds_run():
        raise JoinError(f"{path}: holds no run; give the folder that `resilin train` wrote")
    settings = folder.settings()
    if not isinstance(settings.model, kind):
        raise JoinError(
            f"{path}: its model is a {type(settings.model).__name__}; expected model.use = "
            f"'resilin.joined.training:{kind.__name__}'"
        )
    store = CheckpointFolder(folder.checkpoints_of(settings))
    step = store.latest() if step is None else step
    if step is None:
        raise JoinError(f"{path}: the run has no checkpoint yet")
    return settings, store, step


def pack(path: Path, *, step: int | None = None, card: Mapping[str, Any] | None = None) -> Expert:
    """The expert that a run has trained.

    What was frozen is compared with the anchor, digest by digest: if anything touched it, the expert would be one of
    another model.

    Args:
        path: the run's folder.
        step: which checkpoint; None: the newest.
        card: what its owner says of it; the run adds its steps.

    Raises:
        JoinError: the run trains no expert, its anchor is not as it was, or its weights are not finite.
        CheckpointError: the checkpoint cannot be read.
    """
    settings, store, step = _opened(path, step, NewExpert)
    assert isinstance(settings.model, NewExpert)
    seed = Seed.read(settings.model.seed)
    state = joined(store.load(step, parts=["model", *store.parts_of(step, "frozen")], mapped=True))
    vocabulary = int(state["embed.weight"].shape[0])
    model = settings.model.outline(ModelContext(settings.seed, vocabulary))
    assert isinstance(model, Decoder)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: the checkpoint does not fit the model of settings.toml: {error}") from None
    tokenizer = RunFolder(path).tokenizer
    digest = Tokenizer.load(tokenizer).digest if (tokenizer / TOKENIZER_FILE).is_file() else None
    told = {"steps": step, "batch_size": settings.train.batch_size, "resilin": __version__, **(card or {})}
    expert = expert_of(model, seed.name, tokenizer=digest, card=told)
    if expert.anchor != seed.anchor:
        raise JoinError(
            f"{path}: what should be frozen is not the anchor's any more ({expert.anchor}, not {seed.anchor}): train "
            "the expert anew, with nothing but model.use = 'resilin.joined.training:NewExpert' deciding what is trained"
        )
    bad = [name for name, tensor in expert.tensors.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise JoinError(f"{path}, step {step}: {bad[0]} of the expert is not finite: take an earlier --step")
    return expert


def retuned(
    path: Path, output: Path, *, step: int | None = None, tuned_on: str = "", force: bool = False
) -> list[Path]:
    """Write a joined model with the router that a run has tuned; the rows as they were joined are kept beside it.

    Args:
        path: the run's folder.
        output: the folder to write.
        step: which checkpoint; None: the newest.
        tuned_on: what the router was tuned on, for the cards of its experts.
        force: replace the files of an earlier export.

    Raises:
        JoinError: the run tunes no router, or the joined model is another one than it started from.
        CheckpointError: the checkpoint cannot be read.
    """
    settings, store, step = _opened(path, step, TunedRouter)
    assert isinstance(settings.model, TunedRouter)
    base = open_base(settings.model.path)
    state = store.load(step, parts=["model"])["model"]  # what was trained, and nothing else
    layers = range(base.dense.layers)
    tuned_ELD = torch.stack([state[f"blocks.{layer}.moe.router.weight"] for layer in layers], 1)
    if tuned_ELD.shape != base.parts.rows_ELD.shape:
        raise JoinError(f"{settings.model.path}: has other experts than when the run {path} started")
    record = replace(base.record, router="tuned")
    if tuned_on:
        entries = (replace(one, card={**one.card, "router_tuned_on": tuned_on}) for one in record.experts)
        record = replace(record, experts=tuple(entries))
    untuned: dict[str, Tensor] = dict(zip(record.names, base.parts.rows_ELD, strict=True))
    parts = replace(base.parts, rows_ELD=tuned_ELD.float())
    dtype = base.stored.dtype
    return write_joined(parts, base.stored.folder, output, record, dtype, untuned=untuned, force=force)
