"""Mixtures of experts in DeepSpeed's folders.

With E experts in a layer over P of W ranks, rank r has the experts from (r mod P) * E / P on, and calls its first one
0. Its ZeRO row of them is cut only over the ranks that have the same ones: every P-th. (Where the settings say
`use_data_before_expert_parallelism`, those are W / P ranks that follow each other.) Files `layer_L_expert_I_...` hold
the weights of one expert each, under its number in the whole; so do names here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from resilin.checkpoint.errors import CheckpointError, DamagedError

Shape = tuple[int, ...]
_EXPERT = re.compile(r"(.*\.deepspeed_moe\.experts\.deepspeed_experts\.)(\d+)(\..*)")


def is_expert(name: str) -> bool:
    """Whether a parameter is of an expert of `deepspeed.moe.layer.MoE`."""
    return _EXPERT.fullmatch(name) is not None


class ExpertNames:
    """The names of a group of experts that ranks share out.

    Args:
        shapes: name -> shape of what each rank has, by its own numbers.
        ranks: P, that all experts are spread over.
        same: W / P, ranks that have the same experts.
        consecutive: whether these follow each other.
        where: the file that says so.

    Raises:
        CheckpointError: a parameter is of no expert.
    """

    def __init__(self, shapes: Mapping[str, Shape], ranks: int, same: int, consecutive: bool, where: object) -> None:
        self.shapes, self.ranks, self.same, self.consecutive = shapes, ranks, same, consecutive
        self._local: dict[str, int] = {}  # layer -> experts on each rank
        for name in shapes:
            match = _EXPERT.fullmatch(name)
            if match is None:
                raise CheckpointError(
                    f"{where}: {name!r} is in a group that is cut over a part of the ranks, and is no expert of "
                    "deepspeed.moe.layer.MoE: there is no rule for it"
                )
            self._local[match[1]] = max(self._local.get(match[1], 0), int(match[2]) + 1)

    def whole(self, name: str, rank: int) -> str:
        """What a parameter of a data-parallel rank is called in the whole."""
        match = _EXPERT.fullmatch(name)
        if match is None or match[1] not in self._local:
            return name
        part = rank // self.same if self.consecutive else rank % self.ranks
        return f"{match[1]}{part * self._local[match[1]] + int(match[2])}{match[3]}"

    def all_shapes(self) -> dict[str, Shape]:
        """Name in the whole -> shape, of the experts of all ranks."""
        firsts = range(0, self.ranks * self.same, self.same) if self.consecutive else range(self.ranks)
        return {self.whole(name, rank): shape for rank in firsts for name, shape in self.shapes.items()}


def check_experts(folder: object, content: Mapping[str, Any], found: Iterable[tuple[int, int]]) -> None:
    """That there is a file of every expert.

    Args:
        folder: for messages.
        content: of the model file.
        found: (layer, expert) of the files that there are.

    Raises:
        CheckpointError: one is missing, or the experts are of a kind that is not read.
    """
    have = set(found)
    if content.get("ds_autoep_layers") or content.get("autoep_layers"):
        raise CheckpointError(
            f"{folder}: has AutoEP layers, whose experts DeepSpeed keeps in another form, which is not read; convert "
            "it with DeepSpeed's ds_to_universal first, and read its folder"
        )
    counts = content.get("num_experts")
    if have and not isinstance(counts, (list, tuple)):
        raise CheckpointError(
            f"{folder}: has files of experts, and the model file does not say how many ('num_experts')"
        )
    for layer, count in enumerate(counts if isinstance(counts, (list, tuple)) else ()):
        for expert in range(int(count)):
            if (layer, expert) not in have:
                raise DamagedError(f"{folder}: the file of expert {expert} of MoE layer {layer} is missing")
