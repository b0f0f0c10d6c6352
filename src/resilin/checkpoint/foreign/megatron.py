"""Reading Megatron's folders: `iter_0000100/mp_rank_XX[_YYY][_ZZZ]/model_optim_rng.pt`, a file for each tensor,
pipeline and expert rank, with layers and experts numbered anew in each.

The model is read. Its optimizer keeps states by position in buffers that name no parameter, so they are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from resilin.checkpoint.errors import CheckpointError, DamagedError
from resilin.checkpoint.foreign.buffers import Gathered
from resilin.checkpoint.foreign.megatron_names import (
    EMBEDDING,
    expert_of,
    is_head,
    layer_of,
    rules_table,
    with_expert,
    with_layer,
)
from resilin.checkpoint.foreign.pickles import leaves, load_pickle, plain
from resilin.checkpoint.foreign.rules import Rules
from resilin.checkpoint.foreign.stored import Stored, dtype_name, weight

TRACKER = "latest_checkpointed_iteration.txt"
FILE = "model_optim_rng.pt"
_RANK = re.compile(r"mp_rank_(\d+)(?:_(\d{3}))?(?:_(\d{3}))?")
_BY_POSITION = "its states lie by position in buffers that do not name the parameters they are of"
_UNREAD = {
    "optimizer": _BY_POSITION,
    "rng_state": "the random states of single ranks mean nothing on other ranks",
    "rerun_state_machine": "it belongs to the ranks of the run that wrote it",
}
_MODEL = re.compile(r"model\d*")


@dataclass(frozen=True)
class _Rank:
    """One file: its ranks, and what it holds."""

    tensor: int
    pipeline: int
    expert: int
    where: str
    content: Mapping[str, Any]


def iteration_folder(folder: Path) -> Path:
    """The folder of an iteration: `folder` itself, or the one that the tracker file names."""
    path = folder / TRACKER
    if not path.is_file():
        return folder
    text = path.read_text().strip()
    if text != "release" and not text.isdigit():
        raise DamagedError(f"{path}: should hold an iteration's number or 'release', and holds {text!r}")
    return folder / ("release" if text == "release" else f"iter_{int(text):07d}")


def is_megatron(folder: Path) -> bool:
    """Whether a folder holds a Megatron checkpoint in its `torch` format."""
    return (folder / TRACKER).is_file() or any(folder.glob(f"mp_rank_*/{FILE}"))


def read_megatron(folder: Path, rules: Mapping[str, Any] | None = None, allow: Iterable[str] = ()) -> Stored:
    """Open a Megatron checkpoint.

    Args:
        folder: of one iteration, or with the tracker file.
        rules: how tensor-parallel shards make up parameters, in place of those for Megatron's own models.
        allow: classes in its pickles to take as plain data.

    Raises:
        CheckpointError: a rank's file is missing or damaged, copies of a parameter differ in shape, or no rule says how
            shards make up a parameter.
    """
    folder = iteration_folder(folder)
    if any(folder.glob("*.distcp")):
        raise CheckpointError(
            f"{folder}: is in Megatron's torch_dist format, with transformed shards of its own; write it with "
            "--ckpt-format torch (or Megatron's tools/checkpoint/convert.py) first"
        )
    ranks = _ranks(folder, tuple(allow))
    args = plain(ranks[0].content.get("args") or {}, "args")
    _check_args(folder, args, ranks)
    table = Rules(rules if rules is not None else rules_table(args), "--rules" if rules is not None else str(folder))
    tensors = 1 + max(rank.tensor for rank in ranks)
    gathered = Gathered()
    averages: dict[str, tuple[str, ...]] = {}
    shards, unread = _shards(ranks, args)
    for name, sets in shards.items():
        first = next(iter(sets.values()))
        missing = [tp for tp in range(tensors) if tp not in first]
        if missing:
            raise DamagedError(f"{folder}: tensor rank {missing[0]} has no part of {name!r}, which others have")
        union = table.union(name, [tuple(first[tp][1].shape) for tp in range(tensors)])
        copies = len(sets) * union.copies
        if union.average:
            sets = dict(list(sets.items())[:1])
            averages[weight(name)] = tuple(f"{weight(name)} (tensor rank {tp})" for tp in range(tensors))
        for held in sets.values():
            for tp, (where, tensor) in held.items():
                tensor_name = f"{weight(name)} (tensor rank {tp})" if union.average else weight(name)
                dtype = dtype_name(tensor, where)
                gathered.builder.tensor(tensor_name, union.shape, dtype, 1 if union.average else copies)
                gathered.keep(tensor_name, where, name, tensor, union.slices[tp])
    other, step = _values(ranks[0], args)
    other = gathered.marked(other, ranks[0].where)
    for key, why in _UNREAD.items():
        if ranks[0].content.get(key) is not None:
            unread[key] = why
    if any(folder.glob("mp_rank_*/distrib_optim.pt")):
        unread["distrib_optim"] = _BY_POSITION
    pipeline, experts = 1 + max(r.pipeline for r in ranks), 1 + max(r.expert for r in ranks)
    padded = "" if "original_vocab_size" in table.table else ", vocabulary with its padding"
    return Stored(
        f"Megatron checkpoint ({tensors} tensor, {pipeline} pipeline, {experts} expert ranks{padded})",
        gathered.builder.layout(folder),
        gathered.read,
        step,
        other=other,
        averages=averages,
        unread=unread,
    )


def _ranks(folder: Path, allow: tuple[str, ...]) -> list[_Rank]:
    found = {}
    for path in sorted(folder.glob("mp_rank_*")):
        match = _RANK.fullmatch(path.name)
        if match is None:
            raise DamagedError(f"{path}: is no name of a rank's folder (mp_rank_XX[_YYY[_ZZZ]])")
        found[path.name] = match
    if not found:
        raise DamagedError(f"{folder}: has no mp_rank_*/{FILE}")
    ranks = []
    for name, match in found.items():
        content = load_pickle(folder / name / FILE, allow)
        args = content.get("args")
        pipelined = args is None or int(vars(args).get("pipeline_model_parallel_size", 1)) > 1
        numbers = [int(text) for text in match.groups()[1:] if text is not None]
        pipeline = numbers.pop(0) if numbers and pipelined else 0
        expert = numbers.pop(0) if numbers else 0
        ranks.append(_Rank(int(match[1]), pipeline, expert, f"{name}/{FILE}", content))
    there = {(rank.tensor, rank.pipeline, rank.expert) for rank in ranks}
    sizes = [1 + max(values) for values in zip(*there, strict=True)]
    for tp in range(sizes[0]):
        for pp in range(sizes[1]):
            for ep in range(sizes[2]):
                if (tp, pp, ep) not in there:
                    raise DamagedError(
                        f"{folder}: the file of tensor rank {tp}, pipeline rank {pp}, expert rank {ep} is missing"
                    )
    return sorted(ranks, key=lambda rank: (rank.pipeline, rank.expert, rank.tensor))


def _check_args(folder: Path, args: Mapping[str, Any], ranks: list[_Rank]) -> None:
    for key, have in (
        ("tensor_model_parallel_size", 1 + max(rank.tensor for rank in ranks)),
        ("pipeline_model_parallel_size", 1 + max(rank.pipeline for rank in ranks)),
        ("expert_model_parallel_size", 1 + max(rank.expert for rank in ranks)),
    ):
        if args.get(key) not in (None, have):
            raise DamagedError(f"{folder}: its {key} is {args[key]}, and there are files of {have} such ranks")
    tensors, groups = 1 + max(rank.tensor for rank in ranks), args.get("num_query_groups")
    if args.get("group_query_attention") and isinstance(groups, int) and groups < tensors:
        raise CheckpointError(
            f"{folder}: {groups} groups of keys and values are spread over {tensors} tensor ranks, so that some share "
            "one; how the fused projection is then cut is not known here"
        )
    if args.get("expert_tensor_parallel_size") not in (None, tensors) and args.get("num_experts"):
        raise CheckpointError(f"{folder}: its experts are cut over another number of ranks than the rest; not read")
    if args.get("moe_mlp_glu_interleave_size"):
        raise CheckpointError(f"{folder}: gate and up projections are interleaved; not read")


Shards = dict[str, dict[tuple[int, int, bool], dict[int, tuple[str, Tensor]]]]


def _shards(ranks: list[_Rank], args: Mapping[str, Any]) -> tuple[Shards, dict[str, str]]:
    """Name in the whole model -> (expert rank, pipeline rank, whether tied) of a copy -> tensor rank -> shard."""
    first_layer = _first_layers(ranks, args)
    untied = bool(args.get("untie_embeddings_and_output_weights"))
    experts = args.get("num_experts") or 0
    local_experts = experts // (1 + max(rank.expert for rank in ranks))
    embedding = _embedding(ranks)
    found: Shards = {}
    unread: dict[str, str] = {}
    for rank in ranks:
        for chunk, key in enumerate(_chunks(rank)):
            for name, tensor in _parameters(rank, key, unread):
                number, expert = layer_of(name), expert_of(name)
                if number is not None:
                    name = with_layer(name, number + first_layer[rank.pipeline, chunk])
                if expert is not None:
                    name = with_expert(name, expert + rank.expert * local_experts)
                copy = rank.expert, rank.pipeline, False
                if is_head(name) and not untied and embedding is not None:
                    name, copy = embedding, (rank.expert, rank.pipeline, True)  # the last stage's copy
                held = found.setdefault(name, {}).setdefault(copy, {})
                if rank.tensor in held:
                    raise DamagedError(f"{rank.where}: {name!r} is in {held[rank.tensor][0]} already")
                held[rank.tensor] = rank.where, tensor
    return found, unread


def _embedding(ranks: list[_Rank]) -> str | None:
    names = (name for rank in ranks for key in _chunks(rank) for name, _ in _parameters(rank, key, {}))
    return next((name for name in names if EMBEDDING.fullmatch(name)), None)


def _chunks(rank: _Rank) -> list[str]:
    keys = sorted(key for key in rank.content if _MODEL.fullmatch(key))
    if not keys:
        raise DamagedError(f"{rank.where}: has no 'model'")
    return keys


def _parameters(rank: _Rank, key: str, unread: dict[str, str]) -> list[tuple[str, Tensor]]:
    found = []
    for path, value in leaves(rank.content[key]):
        name = ".".join(path)
        if path[-1].endswith("_extra_state"):
            if value is not None and not (isinstance(value, Tensor) and value.numel() == 0):
                unread[weight(name)] = "the state of a Transformer Engine module (FP8 scales) has no meaning elsewhere"
        elif isinstance(value, Tensor):
            found.append((name, value))
        elif value is not None:
            unread[weight(name)] = f"it is a {type(value).__name__}, not a tensor"
    return found


def _first_layers(ranks: list[_Rank], args: Mapping[str, Any]) -> dict[tuple[int, int], int]:
    """(pipeline rank, chunk) -> the number of its first layer: all stages' first chunks come before the second ones."""
    counts: dict[tuple[int, int], int] = {}
    for rank in ranks:
        for chunk, key in enumerate(_chunks(rank)):
            numbers = {layer_of(name) for name, _ in _parameters(rank, key, {})} - {None}
            counts[chunk, rank.pipeline] = len(numbers)
    firsts, reached = {}, 0
    for (chunk, pipeline), count in sorted(counts.items()):
        firsts[pipeline, chunk] = reached
        reached += count
    if isinstance(args.get("num_layers"), int) and args["num_layers"] != reached:
        raise DamagedError(f"the files have {reached} layers, and num_layers is {args['num_layers']}")
    return firsts


def _values(rank: _Rank, args: Mapping[str, Any]) -> tuple[dict[str, Any], int | None]:
    other: dict[str, Any] = {"megatron": {"args": dict(args)}}
    for key, value in rank.content.items():
        if key not in _UNREAD and key not in ("args", "iteration") and not _MODEL.fullmatch(key):
            other["megatron"][key] = plain(value, key)
    iteration = rank.content.get("iteration")
    return other, iteration if isinstance(iteration, int) else None
