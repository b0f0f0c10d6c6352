"""Architectures of one shape at many sizes: what a planned number of parameters is rounded to.

A family keeps the proportions of one decoder: width a multiple of the head width, an even number of heads, depth
proportional to width, feed-forward proportional to width. Parameters are counted without the embedding and the head
wherever a rule says P; the total is reported beside it.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from resilin.models.decoder_settings import DecoderSettings
from resilin.models.flops import parameter_counts, train_flops_per_token

MOST_HEADS = 512  # widths beyond 512 heads are outside any family worth listing


@dataclass(frozen=True, slots=True)
class Architecture:
    """One member of a family.

    Attributes:
        settings: the decoder.
        parameters: P, without embedding and head.
        total: with them.
    """

    settings: DecoderSettings
    parameters: int
    total: int

    @staticmethod
    def of(settings: DecoderSettings) -> Architecture:
        """The architecture that some settings describe, in a family or not."""
        counts = parameter_counts(settings)
        return Architecture(settings, counts.non_embedding, counts.total)

    def flops_per_token(self, sequence_length: int) -> float:
        """Matrix products of a training step for one token, attention and head included (not the 6P of the rule)."""
        return train_flops_per_token(self.settings, sequence_length)

    def shape(self) -> str:
        """Layers x width / heads, for tables."""
        return f"{self.settings.layers}x{self.settings.hidden_size}/{self.settings.heads}"

    def overrides(self) -> tuple[str, ...]:
        """The settings that make this member out of its family's base."""
        s = self.settings
        named = {"layers": s.layers, "hidden_size": s.hidden_size, "heads": s.heads}
        named |= {"kv_heads": s.kv_heads} if s.kv_heads else {}
        named |= {"mlp_size": s.mlp_size} if s.mlp_size else {}
        return tuple(f"model.{key}={value}" for key, value in named.items())


def _key_heads(base: DecoderSettings, heads: int) -> int:
    """Key and value heads that divide `heads` and share as nearly as the base does; 0 where it does not share."""
    if base.key_heads == base.heads:
        return 0
    group = base.heads / base.key_heads
    divisors = [n for n in range(1, heads + 1) if heads % n == 0]
    return min(divisors, key=lambda n: abs(math.log(heads / n / group)))


@dataclass(frozen=True)
class Family:
    """Decoders with the proportions of `base`.

    Attributes:
        base: gives head width, layers per width, feed-forward ratio, key-value sharing and everything else. Its
            vocabulary counts in totals only.
        largest: no member has more parameters than this.
    """

    base: DecoderSettings
    largest: float = 2e12
    _heads: range = field(default=range(2, MOST_HEADS + 1, 2), repr=False)

    def member(self, heads: int) -> Architecture:
        """The member of so many heads.

        Raises:
            ValueError: for an odd number of heads, or none.
        """
        if heads < 2 or heads % 2:
            raise ValueError(f"a member of a family has an even number of heads, not {heads}")
        base, scale = self.base, heads / self.base.heads
        # Width stays a multiple of the head width even where the base's width per head is not one head (Qwen3).
        width = max(1, round(base.hidden_size * scale / base.head_width)) * base.head_width
        layers = max(1, round(base.layers * width / base.hidden_size))
        changes: dict[str, object] = {"heads": heads, "hidden_size": width, "layers": layers}
        changes["kv_heads"] = _key_heads(base, heads)
        if base.mlp_size:
            changes["mlp_size"] = max(8, round(base.mlp_size * width / base.hidden_size / 8) * 8)
        if base.window_layers is not None:
            changes["window_layers"] = tuple(layer for layer in base.window_layers if layer < layers)
        if base.moe is not None:
            expert_size = max(8, round(base.moe.expert_size * width / base.hidden_size / 8) * 8)
            dense = tuple(layer for layer in base.moe.dense_layers if layer < layers)
            moe = base.moe.model_copy(update={"expert_size": expert_size, "dense_layers": dense})
            changes["moe"] = moe.model_dump()
        return Architecture.of(DecoderSettings.model_validate({**base.model_dump(), **changes}))

    @cached_property
    def members(self) -> tuple[Architecture, ...]:
        """All members up to `largest`, by size."""

        def grow() -> Iterator[Architecture]:
            for heads in self._heads:
                member = self.member(heads)
                if member.parameters > self.largest:
                    return
                yield member

        found = tuple(grow())
        if not found:
            smallest = self.member(2).parameters
            raise ValueError(f"the family's smallest member has {smallest:,} parameters, above {self.largest:g}")
        return found

    def nearest(self, parameters: float, keep: Architecture | None = None, slack: float = 0.0) -> Architecture:
        """The member whose log P is nearest to a target.

        Args:
            parameters: the target P.
            keep: a member that wins unless another is nearer by more than `slack`, so that planning again from a
                plan that was rounded to whole iterations does not hop to a neighbour.
            slack: in log P.
        """
        sizes = [member.parameters for member in self.members]
        place = bisect.bisect_left(sizes, parameters)
        around = self.members[max(0, place - 1) : place + 1]

        def distance(member: Architecture) -> float:
            return abs(math.log(member.parameters / parameters))

        best = min(around, key=distance)
        if keep is not None and keep in self.members and distance(keep) <= distance(best) + slack:
            return keep
        return best


@dataclass(frozen=True, slots=True)
class FamilyCost:
    """What models of several sizes cost: each trained alone, or cut out of one nested model.

    Attributes:
        sizes: P of every member, ascending; the largest holds the others.
        tokens: T of a run.
    """

    sizes: tuple[float, ...]
    tokens: float

    def __post_init__(self) -> None:
        if not self.sizes or min(*self.sizes, self.tokens) <= 0 or list(self.sizes) != sorted(self.sizes):
            raise ValueError(
                f"a family has members of ascending, positive sizes and is trained on tokens, unlike {self}"
            )

    @property
    def separate(self) -> float:
        """FLOPs of all members trained alone, 6 P T each; also of a nested model that runs all in every step."""
        return sum(6 * size * self.tokens for size in self.sizes)

    @property
    def nested(self) -> float:
        """FLOPs of one nested model that runs one member a step, drawn evenly (MatFormer), for a single run's steps.

        The weights of a member are trained in every step of it and of a larger one; its own size only in its share.
        """
        return self.separate / len(self.sizes)

    @property
    def largest(self) -> float:
        """FLOPs of the largest member alone."""
        return 6 * self.sizes[-1] * self.tokens

    @property
    def stored(self) -> float:
        """Parameters to keep, nested over separate."""
        return self.sizes[-1] / sum(self.sizes)
