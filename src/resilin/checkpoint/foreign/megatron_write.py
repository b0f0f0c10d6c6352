"""Writing Megatron's folders: the model cut over tensor and pipeline ranks, a file for each.

Only a model with Megatron's names and arguments can be written, that is one that was read from such a folder (by
whatever way it came since). Shards are put into mapped files first, so that memory holds one whole tensor, and the
parts of a rank's file no more than the disk cache does.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resilin.checkpoint.atomic import write_file
from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.foreign.mapped import mapped_zeros
from resilin.checkpoint.foreign.megatron import FILE, TRACKER
from resilin.checkpoint.foreign.megatron_names import EMBEDDING, is_head, layer_of, rules_table, with_layer
from resilin.checkpoint.foreign.rules import VOCABULARY, Rules, Union
from resilin.checkpoint.foreign.stored import MODEL, Stored
from resilin.checkpoint.tree import put_together


def write_megatron(stored: Stored, target: Path, tensor: int = 1, pipeline: int = 1) -> int:
    """Write a model for so many tensor and pipeline ranks.

    Returns:
        Bytes written.

    Raises:
        CheckpointError: the model has no Megatron arguments or names, or does not divide.
    """
    own = put_together(stored.other.get("megatron", {}), stored.tensor)
    args = dict(own.pop("args", {}))
    if not args:
        raise CheckpointError(
            f"Megatron's folders hold the arguments of its models, and this {stored.title} has none (other/megatron): "
            "only a model that came from such a folder can be written as one"
        )
    stages = _stages(stored, args, pipeline)
    args.update(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        expert_model_parallel_size=1,
        virtual_pipeline_model_parallel_size=None,
    )
    rules = Rules(rules_table(args), "Megatron")
    folder = target / f"iter_{stored.step or 0:07d}"
    files: dict[tuple[int, int], dict[str, Tensor]] = {(tp, pp): {} for pp in range(pipeline) for tp in range(tensor)}
    for name in stored.under(MODEL):
        short = name.removeprefix(MODEL)
        whole = stored.tensor(name)
        union, padded = cut(rules, short, tuple(whole.shape), tensor, args)
        if EMBEDDING.fullmatch(short):
            args["padded_vocab_size"] = padded
        for pp, local in stages[short]:
            for tp in range(tensor):
                files[tp, pp][local] = _shard(whole, union, tp, target.parent)
    written = 0
    for (tp, pp), model in files.items():
        path = folder / (f"mp_rank_{tp:02d}" if pipeline == 1 else f"mp_rank_{tp:02d}_{pp:03d}") / FILE
        path.parent.mkdir(parents=True)
        content = {
            "checkpoint_version": 3.0,
            **own,
            "args": Namespace(**args),
            "model": model,
            **({} if stored.step is None else {"iteration": stored.step}),
        }
        torch.save(content, path)
        written += path.stat().st_size
    write_file(target / TRACKER, str(stored.step or 0))
    return written


def _stages(stored: Stored, args: Mapping[str, Any], pipeline: int) -> dict[str, list[tuple[int, str]]]:
    """Name in the whole model -> (pipeline rank, name there) of each of its copies."""
    names = [name.removeprefix(MODEL) for name in stored.under(MODEL)]
    layers = 1 + max((number for name in names if (number := layer_of(name)) is not None), default=-1)
    if layers % pipeline:
        raise CheckpointError(f"{layers} layers do not divide over {pipeline} pipeline ranks")
    each = layers // pipeline
    untied = bool(args.get("untie_embeddings_and_output_weights"))
    found: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        number = layer_of(name)
        if number is not None:
            found[name] = [(number // each, with_layer(name, number % each))]
        elif EMBEDDING.fullmatch(name):
            found[name] = [(0, name)]
            if pipeline > 1 and not untied:  # the output layer of the last stage has a copy of its own
                legacy = name.startswith("language_model.")
                found[name].append(
                    (pipeline - 1, "word_embeddings_for_head.weight" if legacy else "output_layer.weight")
                )
        elif "embedding" in name or "rotary_pos_emb" in name:
            found[name] = [(0, name)]
        elif "final_layernorm" in name or "final_norm" in name or is_head(name) or name.endswith("output_layer.bias"):
            found[name] = [(pipeline - 1, name)]
        elif pipeline == 1:
            found[name] = [(0, name)]
        else:
            raise CheckpointError(f"{name!r}: it is not known which pipeline stage of Megatron has it")
    return found


def cut(rules: Rules, name: str, shape: tuple[int, ...], ranks: int, args: Mapping[str, Any]) -> tuple[Union, int]:
    """How a parameter is cut over tensor ranks: the inverse of putting it together.

    Returns:
        What each rank's shard is of the whole, and the rows of all shards (more than the whole's with a padded
        vocabulary).

    Raises:
        CheckpointError: it does not divide.
    """
    dim = rules.dimension(name)
    if dim is None:
        return rules.union(name, [shape] * ranks), shape[0] if shape else 1
    rows = shape[dim]
    if rules.table.get(VOCABULARY) and rules.is_vocabulary(name):
        unit = int(args.get("make_vocab_size_divisible_by") or 128) * ranks
        rows = math.ceil(rows / unit) * unit
    if rows % ranks:
        raise CheckpointError(f"{name!r} {list(shape)} does not divide over {ranks} tensor ranks along dimension {dim}")
    local = (*shape[:dim], rows // ranks, *shape[dim + 1 :])
    union = rules.union(name, [local] * ranks)
    if union.shape != shape:
        raise CheckpointError(f"{name!r} is {list(shape)}, and its shards would make up {list(union.shape)}")
    return union, rows


def _shard(whole: Tensor, union: Union, rank: int, folder: Path) -> Tensor:
    slice_ = union.slices[rank]
    made = mapped_zeros(folder, slice_.shape, whole.dtype)
    for piece in slice_.pieces:
        ends = (slice(o, o + s) for o, s in zip(piece.offsets, piece.local.sizes, strict=True))
        made[piece.local.slices] = whole[tuple(ends)]
    return made
