"""The formats there are: how each is recognised, read and written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resilin.checkpoint.errors import CheckpointError, DamagedError
from resilin.checkpoint.foreign.dcp import is_dcp, read_dcp
from resilin.checkpoint.foreign.dcp_write import write_dcp
from resilin.checkpoint.foreign.deepspeed import read_deepspeed
from resilin.checkpoint.foreign.deepspeed_files import is_deepspeed
from resilin.checkpoint.foreign.deepspeed_write import Zero, write_deepspeed
from resilin.checkpoint.foreign.huggingface import is_huggingface, read_huggingface, write_huggingface
from resilin.checkpoint.foreign.megatron import is_megatron, read_megatron
from resilin.checkpoint.foreign.megatron_write import write_megatron
from resilin.checkpoint.foreign.resilin_format import is_resilin, read_resilin, write_resilin
from resilin.checkpoint.foreign.stored import FILES, OPTIMIZER, OTHER, Stored
from resilin.checkpoint.foreign.universal import is_universal, read_universal
from resilin.checkpoint.foreign.universal_write import write_universal


@dataclass(frozen=True)
class ReadOptions:
    """What a user may say about a source.

    Attributes:
        rules: how tensor-parallel shards make up parameters; see `rules.py`.
        allow: classes in its pickles to take as plain data.
    """

    rules: dict[str, Any] | None = None
    allow: tuple[str, ...] = ()


@dataclass(frozen=True)
class WriteOptions:
    """What a user may say about a target.

    Attributes:
        tensor, pipeline: ranks that Megatron's shards are for.
        zero: the engine that a DeepSpeed folder is for.
        rules: how tensor-parallel ranks will cut the parameters of a universal folder; see `rules.py`.
    """

    tensor: int = 1
    pipeline: int = 1
    zero: Zero = field(default_factory=Zero)
    rules: dict[str, Any] | None = None


Write = Callable[[Stored, Path, WriteOptions], int]


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        name: for the command line.
        is_one: whether a folder is of it.
        read: opens it.
        write: writes it into an empty folder.
        cannot_hold: kinds of names it has no place for.
        own_commit: its writer makes folders of its own inside the target, each whole or absent.
        own_dtype: its writer rounds the weights itself, and keeps what they were beside them.
    """

    name: str
    is_one: Callable[[Path], bool]
    read: Callable[[Path, ReadOptions], Stored]
    write: Write
    cannot_hold: tuple[str, ...] = ()
    own_commit: bool = False
    own_dtype: bool = False


FORMATS = (
    Format("resilin", is_resilin, lambda at, _: read_resilin(at), lambda s, to, _: write_resilin(s, to), (), True),
    Format("dcp", is_dcp, lambda at, _: read_dcp(at), lambda s, to, _: write_dcp(s, to)),
    Format(
        "universal",
        is_universal,
        lambda at, o: read_universal(at, o.allow),
        lambda s, to, o: write_universal(s, to, o.rules),
        (FILES,),
    ),
    Format(
        "deepspeed",
        is_deepspeed,
        lambda at, o: read_deepspeed(at, o.rules, o.allow),
        lambda s, to, o: write_deepspeed(s, to, o.zero),
        (FILES,),
        own_dtype=True,
    ),
    Format(
        "megatron",
        is_megatron,
        lambda at, o: read_megatron(at, o.rules, o.allow),
        lambda s, to, o: write_megatron(s, to, o.tensor, o.pipeline),
        (OPTIMIZER, FILES),
    ),
    Format(
        "huggingface",
        is_huggingface,
        lambda at, o: read_huggingface(at, o.allow),
        lambda s, to, _: write_huggingface(s, to),
        (OPTIMIZER, OTHER),
    ),
)


def format_of(folder: Path) -> Format:
    """Which format a folder is of.

    Raises:
        CheckpointError: none, or there is no such folder.
    """
    if not folder.is_dir():
        raise DamagedError(f"{folder}: there is no such folder")
    for one in FORMATS:
        if one.is_one(folder):
            return one
    raise CheckpointError(
        f"{folder}: is no checkpoint of a format known here: {', '.join(one.name for one in FORMATS)}"
    )


def format_named(name: str) -> Format:
    """A format by its name.

    Raises:
        CheckpointError: there is none of this name.
    """
    for one in FORMATS:
        if one.name == name:
            return one
    raise CheckpointError(f"there is no format {name!r}; there are {', '.join(one.name for one in FORMATS)}")
