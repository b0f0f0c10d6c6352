"""A decoder's projections as Megatron and most fast kernels store them: queries, keys and values in one tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from resilin.layout import Part, Shard, SpecRule
from resilin.models.decoder_settings import DecoderSettings

_PARTS = {"attention.qkv": ("attention.q", "attention.k", "attention.v"), "mlp.gate_up": ("mlp.gate", "mlp.up")}
_MEMBER = re.compile(r"(blocks\.\d+\.)(attention\.[qkv]|mlp\.gate|mlp\.up)\.(weight|bias)")


@dataclass(frozen=True)
class Fused:
    """The names of a decoder's parameters, and those under which they are stored.

    Attributes:
        members: stored name -> the parameters it is made of, one below the other; most are one.
    """

    members: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, names: Sequence[str]) -> Fused:
        """Of a decoder's parameters, in order."""
        members: dict[str, tuple[str, ...]] = {}
        for name in names:
            match = _MEMBER.fullmatch(name)
            stored: str = name
            parts: tuple[str, ...] = (name,)
            if match:
                fused = next(fused for fused, inner in _PARTS.items() if match[2] in inner)
                stored = f"{match[1]}{fused}.{match[3]}"
                parts = tuple(f"{match[1]}{inner}.{match[3]}" for inner in _PARTS[fused])
            members[stored] = tuple(part for part in parts if part in names)
        return cls(members)

    def join(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Stored tensors from parameters; the single ones are not copied."""
        return {
            stored: values[parts[0]] if len(parts) == 1 else torch.cat([values[part] for part in parts])
            for stored, parts in self.members.items()
        }

    def split(self, stored: Mapping[str, Tensor], rows: Mapping[str, int]) -> dict[str, Tensor]:
        """Parameters (views) from stored tensors; `rows` is the first dimension of each parameter."""
        found: dict[str, Tensor] = {}
        for name, parts in self.members.items():
            pieces = stored[name].split([rows[part] for part in parts]) if len(parts) > 1 else [stored[name]]
            found.update(zip(parts, pieces, strict=True))
        return found


def fused_rules(settings: DecoderSettings, vocabulary_multiple: int, *, naive: bool = False) -> list[SpecRule]:
    """How tensor parallelism cuts a decoder that is stored fused.

    Args:
        settings: of the decoder.
        vocabulary_multiple: rows of embedding and head are padded to a multiple of this.
        naive: take fused tensors for plain ones: a rank's rows for the rows at its place in the whole tensor. Wrong:
            it is what joining shards in the order of ranks amounts to.
    """
    width, wide = settings.head_width, settings.feed_forward_size
    keys = Part(settings.key_heads * width, unit=width, spare="copy")
    heads = (Part(settings.heads * width, unit=width), keys, keys)
    gates = (Part(wide), Part(wide))
    pad = ((0, vocabulary_multiple),) if vocabulary_multiple > 1 else ()
    return [
        SpecRule(r"(embed|head)\.weight", (Shard("tp", 0),), pad),
        SpecRule(r"blocks\.\d+\.attention\.qkv\.(weight|bias)", (Shard("tp", 0, () if naive else heads),)),
        SpecRule(r"blocks\.\d+\.mlp\.gate_up\.(weight|bias)", (Shard("tp", 0, () if naive else gates),)),
        SpecRule(r"blocks\.\d+\.(attention\.o|mlp\.down)\.weight", (Shard("tp", 1),)),
    ]
