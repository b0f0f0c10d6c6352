"""From any format to any other: n readers and m writers, and nothing that knows both ends.

Tensors are put together one by one from mapped files, so that memory holds at most the largest and a constant. The
target appears at once, when everything is on disk.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

from resilin.checkpoint.atomic import sync_folder
from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.folder import CheckpointFolder
from resilin.checkpoint.foreign.beside import with_files
from resilin.checkpoint.foreign.cast import with_dtype
from resilin.checkpoint.foreign.formats import Format, ReadOptions, WriteOptions, format_named, format_of
from resilin.checkpoint.foreign.groups import with_groups
from resilin.checkpoint.foreign.resilin_format import TITLE as RUN_TITLE
from resilin.checkpoint.foreign.stored import FILES, MODEL, OPTIMIZER, OTHER, LeftOut, Stored


@dataclass(frozen=True)
class Options:
    """How to convert.

    Attributes:
        source_format, target_format: names; None: told by the source's files, "resilin" for the target.
        weights_only: take the model alone, and the files that go with it.
        leave_out: names to leave out, with `*` for any text.
        ties: name without values -> the parameter it is tied to.
        dtype: of the floating-point weights in the target (of a DeepSpeed folder: what its model computes in, beside
            float32 masters); None: as they are.
        groups: parameter groups in place of the source's; see `groups.py`.
        zero_states: begin with the states of a new AdamW, where the source has none.
        frozen: names of parameters that are not trained, with `*` for any text; None: as the source says.
        files: a folder whose config.json, tokenizer and the like go with the model.
        read: about the source.
        write: about the target.
    """

    source_format: str | None = None
    target_format: str = "resilin"
    weights_only: bool = False
    leave_out: Sequence[str] = ()
    ties: Mapping[str, str] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    groups: Sequence[Mapping[str, Any]] | None = None
    zero_states: bool = False
    frozen: Sequence[str] | None = None
    files: Path | None = None
    read: ReadOptions = field(default_factory=ReadOptions)
    write: WriteOptions = field(default_factory=WriteOptions)


@dataclass(frozen=True)
class Report:
    """What was read and written.

    Attributes:
        source, target: titles of the two.
        tensors: kind -> (number, bytes) of the tensors that were written.
        written: bytes of the target.
        left_out: what the target did not get, and why.
        ties: names that share another one's values.
    """

    source: str
    target: str
    tensors: Mapping[str, tuple[int, int]]
    written: int
    left_out: tuple[LeftOut, ...]
    ties: Mapping[str, str]


def open_stored(path: Path, format_name: str | None = None, options: ReadOptions | None = None) -> Stored:
    """Open a checkpoint of any format.

    Raises:
        CheckpointError: it is of none, or damaged.
    """
    form = format_of(path) if format_name is None else format_named(format_name)
    return form.read(path, options or ReadOptions())


def convert(source: Path, target: Path, options: Options | None = None) -> Report:
    """Write the checkpoint in `source` as another format.

    Args:
        source: a folder of any format that is known.
        target: a folder that does not exist or is empty (for "resilin": a folder of checkpoints, which gets one more).
        options: how.

    Raises:
        CheckpointError: the source is damaged, holds what the target has no place for (by name, with what to say to
            leave it out), or the target is in the way; nothing readable is left behind then.
    """
    options = options or Options()
    form = format_named(options.target_format)
    _check_target(target, form)
    stored = open_stored(source, options.source_format, options.read)
    if form.name == "huggingface" and stored.title == RUN_TITLE and "run" in stored.other:
        raise CheckpointError(
            f"{source}: is of a Resilin run, whose model has Resilin's names; `resilin export` writes it with those "
            "that Hugging Face knows"
        )
    stored = _chosen(stored, options)
    _check_rest(stored, form)
    write = options.write
    if options.dtype is not None and form.own_dtype:
        write = replace(write, zero=replace(write.zero, dtype=options.dtype))
    elif options.dtype is not None:
        stored = with_dtype(stored, options.dtype)
    if form.own_commit and (stored.step or 0) in CheckpointFolder(target).steps():
        raise CheckpointError(f"{target}: has a checkpoint of step {stored.step or 0} already; name another folder")
    written = _write(stored, target, form, write)
    kinds = {"model": MODEL, "optimizer": OPTIMIZER, "files": FILES, "other": OTHER}
    counts = {kind: stored.under(prefix) for kind, prefix in kinds.items()}
    tensors = {kind: (len(names), sum(map(stored.bytes, names))) for kind, names in counts.items() if names}
    return Report(stored.title, form.name, tensors, written, stored.left_out, stored.ties)


def _check_target(target: Path, form: Format) -> None:
    if target.exists() and not form.own_commit and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target}: is there already, and not an empty folder; name another, or remove it")


def _chosen(stored: Stored, options: Options) -> Stored:
    if options.ties:
        stored = stored.with_ties(options.ties)
    if options.weights_only:
        keep = options.target_format  # a tool's own values (Megatron's arguments) are part of a model of that tool
        values = [OTHER + key for key in stored.other if key != keep]
        prefixes = [OPTIMIZER, *(f"{value}/" for value in values)]
        names = [name for prefix in prefixes for name in stored.under(prefix)]
        names += ["optimizer/groups"] * bool(stored.groups) + values
        names += [name for name in stored.unread if not name.startswith(MODEL)]
        stored = stored.without(_escaped(dict.fromkeys(names)))
    stored = stored.without(options.leave_out)
    if options.groups is not None:
        stored = with_groups(stored, options.groups, options.zero_states)
    elif options.zero_states:
        raise CheckpointError("--zero-states: which parameters are trained, and how, is said with --groups FILE")
    if options.frozen is not None:
        stored = stored.with_frozen(options.frozen)
    if options.files is not None:
        stored = with_files(stored, options.files)
    return stored


def _escaped(names: Mapping[str, None]) -> list[str]:
    return [name.replace("[", "[[]").replace("*", "[*]").replace("?", "[?]") for name in names]


def _check_rest(stored: Stored, form: Format) -> None:
    if stored.unread:
        name, why = next(iter(stored.unread.items()))
        more = f" (and {len(stored.unread) - 1} more)" if len(stored.unread) > 1 else ""
        raise CheckpointError(f"{name}{more} cannot be converted: {why}; or go on without it: --leave-out {name!r}")
    homeless = [name for prefix in form.cannot_hold for name in stored.under(prefix)]
    if OPTIMIZER in form.cannot_hold and stored.groups:
        homeless.append("optimizer/groups")
    if form.name == "megatron":
        homeless += [OTHER + key for key in stored.other if key != "megatron"]
    if OTHER in form.cannot_hold:
        homeless += [OTHER + key for key in stored.other]
    if homeless:
        kinds = sorted({name.partition("/")[0] + "/*" for name in homeless})
        raise CheckpointError(
            f"the {form.name} format has no place for {homeless[0]!r}"
            + (f" and {len(homeless) - 1} more" if len(homeless) > 1 else "")
            + ": leave them out with "
            + " ".join(f"--leave-out {kind!r}" for kind in kinds)
            + (", or --weights-only" if form.cannot_hold != (FILES,) else "")
        )


def _write(stored: Stored, target: Path, form: Format, options: WriteOptions) -> int:
    target.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            work = Path(mkdtemp(prefix=f".converting-{target.name}-", dir=target.parent))
            stack.callback(shutil.rmtree, work, ignore_errors=True)
            if form.own_commit:
                return form.write(stored, target, options)
            whole = work / target.name
            whole.mkdir()
            written = form.write(stored, whole, options)
            _sync(whole)
            if target.exists():
                target.rmdir()
            whole.rename(target)
            sync_folder(target.parent)
            return written
        except OSError as error:
            raise CheckpointError(f"{target}: could not be written ({error}); nothing is left of it") from error


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
        else:
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    sync_folder(folder)
