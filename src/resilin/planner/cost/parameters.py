"""How many parameters of a decoder each rank has, from the specifications that the runtime cuts it by."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache

from resilin.layout import LayoutError, Mesh, ParamSpec, specs_of
from resilin.models.decoder import Decoder
from resilin.models.decoder_plan import decoder_rules
from resilin.models.decoder_settings import DecoderSettings
from resilin.parallel.errors import ParallelError
from resilin.parallel.local_model import shapes_of
from resilin.parallel.pipeline import Split

_BLOCK = re.compile(r"blocks\.(\d+)\.")


@dataclass(frozen=True)
class LocalParameters:
    """Parameters of the fullest rank of tensor and expert parallelism.

    Attributes:
        blocks: (L, 2) of each block: those that all data workers share, and those of its experts.
        embedding: of the embedding.
        head: of the head; 0 where it is the embedding.
        norm: of the final norm, and whatever else belongs to the last stage.
    """

    blocks: tuple[tuple[int, int], ...]
    embedding: int
    head: int
    norm: int

    def of_stage(self, split: Split, stage: int, tied: bool) -> tuple[int, int]:
        """(shared, experts') parameters of a stage."""
        dense = sum(self.blocks[layer][0] for layer in split.layers_of(stage))
        experts = sum(self.blocks[layer][1] for layer in split.layers_of(stage))
        first, last = stage == 0, stage == split.stages - 1
        dense += self.embedding if first or (last and tied) else 0
        dense += self.head + self.norm if last else 0
        return dense, experts


@lru_cache(maxsize=256)
def _fullest(spec: ParamSpec, tensor: int, expert: int) -> int:
    shapes = spec.local_shapes(Mesh((("ep", expert), ("tp", tensor))))
    counts = [0 if shape is None else math.prod(shape) for shape in shapes]
    if min(counts) == 0:
        raise ParallelError(
            f"a matrix of shape {list(spec.shape)} leaves a rank of {tensor * expert} without anything: use fewer"
        )
    return max(counts)


def local_parameters(outline: Decoder, tensor: int, expert: int) -> LocalParameters:
    """What the fullest rank has of every part of a decoder.

    Args:
        outline: the decoder, on any device.
        tensor: ranks that divide matrices.
        expert: ranks that divide experts.

    Raises:
        ParallelError: a matrix cannot be divided so.
    """
    settings = outline.settings
    if expert > 1 and (settings.moe is None or settings.moe.experts % expert):
        count = settings.moe.experts if settings.moe else 0
        raise ParallelError(f"parallel.expert is {expert}; it should divide the model's {count} experts")
    try:
        specs = specs_of(shapes_of(outline), decoder_rules(settings), strict=False)
        return _summed(specs, settings, tensor, expert)
    except LayoutError as error:
        raise ParallelError(str(error)) from None


def _summed(specs: dict[str, ParamSpec], settings: DecoderSettings, tensor: int, expert: int) -> LocalParameters:
    blocks = [[0, 0] for _ in range(settings.layers)]
    ends = {"embedding": 0, "head": 0, "norm": 0}
    for name, spec in specs.items():
        count = _fullest(spec, tensor, expert)
        found = _BLOCK.match(name)
        if found:
            of_experts = any(cut.axis == "ep" for cut in spec.cuts)
            blocks[int(found[1])][of_experts] += count
        elif name.startswith("embed."):
            ends["embedding"] += count
        elif name.startswith("head."):
            ends["head"] += count
        else:
            ends["norm"] += count
    return LocalParameters(tuple((dense, of_experts) for dense, of_experts in blocks), **ends)
