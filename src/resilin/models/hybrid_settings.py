"""The settings of a hybrid decoder: layers of Mamba-2, of attention and of feed-forwards in any order (Nemotron-H)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from resilin.config import Settings
from resilin.models.decoder_settings import (
    DecoderSettings,
    LayerSizes,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

if TYPE_CHECKING:
    from resilin.models.hybrid import HybridDecoder

Kind = Literal["mamba", "attention", "mlp"]
KINDS: dict[str, Kind] = {"M": "mamba", "*": "attention", "-": "mlp"}
"""What each sign of a pattern stands for, as in Hugging Face's `hybrid_override_pattern`."""


class MambaSettings(Settings):
    """A Mamba-2 layer (Dao and Gu, "Transformers are SSMs", 2024)."""

    heads: PositiveInt = 8
    """Heads of the state space; each has its own step and decay."""
    head_size: PositiveInt = 32
    """Channels of a head."""
    groups: PositiveInt = 1
    """Groups of heads; those of a group share B and C, and are normed together."""
    state_size: PositiveInt = 64
    """Numbers that the state has for each channel."""
    conv_size: Annotated[int, Field(ge=2)] = 4
    """Tokens that the causal convolution reads, the present one included."""
    conv_bias: bool = True
    """Bias of the convolution."""
    chunk: PositiveInt = 128
    """Tokens computed side by side; the state goes from chunk to chunk. It changes no number but for rounding."""
    dt_min: PositiveFloat = 0.001
    """No step is smaller. First steps lie between this and `dt_max`."""
    dt_max: PositiveFloat = 0.1
    """See `dt_min`; later steps may be larger."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.heads % self.groups:
            raise ValueError(
                f"mamba.heads ({self.heads}) is not divisible by mamba.groups ({self.groups}): groups have equally "
                "many heads"
            )
        if self.dt_min > self.dt_max:
            raise ValueError(f"mamba.dt_min ({self.dt_min}) is larger than mamba.dt_max ({self.dt_max})")
        return self

    @property
    def width(self) -> int:
        """Channels of all heads."""
        return self.heads * self.head_size

    @property
    def state_width(self) -> int:
        """Numbers of B (or C) of a token."""
        return self.groups * self.state_size


class HybridLayerSizes(LayerSizes):
    """As `LayerSizes`; 0: as the decoder has it."""

    mamba_heads: NonNegativeInt = 0
    """Heads of a Mamba-2 layer, equally many of each group."""
    mamba_head_size: NonNegativeInt = 0
    """Their channels."""
    state_size: NonNegativeInt = 0
    """Of a Mamba-2 layer."""


class HybridSettings(DecoderSettings):
    """A decoder whose layers are one thing each, Mamba-2, attention without positions, or a feed-forward, in an order
    given by a pattern. Its other settings are those of a `DecoderSettings`.
    """

    pattern: Annotated[str, Field(min_length=1)] = "M-M*-M-M-"
    """A sign for each layer: M Mamba-2, * attention, - feed-forward."""
    layers: NonNegativeInt = 0
    """As many as the pattern has signs; left out: that."""
    mamba: MambaSettings = MambaSettings()
    """Of the Mamba-2 layers."""
    activation: Literal["silu", "gelu", "gelu_tanh", "relu2"] = "relu2"
    """Non-linearity of the feed-forward; relu2 is `max(x, 0)**2`."""
    gated: bool = False
    """Whether the feed-forward is gated; Nemotron-H's is not."""
    layer_sizes: tuple[HybridLayerSizes, ...] = ()
    """Layers of different sizes: one entry for each layer, in order; empty: all of a kind are alike."""

    @model_validator(mode="before")
    @classmethod
    def _count_layers(cls, tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        pattern = tree.get("pattern", cls.model_fields["pattern"].default)
        if isinstance(pattern, str) and not tree.get("layers"):
            return {**tree, "layers": len(pattern)}
        return tree

    @model_validator(mode="after")
    def _check_pattern(self) -> Self:
        unknown = sorted(set(self.pattern) - set(KINDS))
        if unknown:
            more = ": layers of experts are not supported" if unknown[0] == "E" else ""
            raise ValueError(
                f"pattern has {unknown[0]!r}{more}; known are M (Mamba-2), * (attention) and - (feed-forward)"
            )
        if self.layers != len(self.pattern):
            raise ValueError(
                f"layers is {self.layers} and the pattern {self.pattern!r} has {len(self.pattern)} signs: leave layers "
                "out"
            )
        for name in ("moe", "loop", "chains", "rope_scaling", "sliding_window"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name}: a hybrid decoder has none; leave it out")
        if self.norm_place != "before":
            raise ValueError("norm_place: a hybrid decoder norms what its layers read; leave it out")
        if self.mlp_tiles != 1:
            raise ValueError("mlp_tiles: a hybrid decoder computes its feed-forwards whole; leave it out")
        for layer, own in enumerate(self.layer_sizes):
            if own.mamba_heads % self.mamba.groups:
                raise ValueError(
                    f"layer_sizes: layer {layer} has {own.mamba_heads} mamba_heads, not divisible by "
                    f"{self.mamba.groups} groups"
                )
        return self

    def kind_of(self, layer: int) -> Kind:
        """What a layer is."""
        return KINDS[self.pattern[layer]]

    def layers_of(self, kind: Kind) -> tuple[int, ...]:
        """The numbers of all layers of a kind."""
        return tuple(layer for layer in range(self.layers) if self.kind_of(layer) == kind)

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """The numbers of the layers that have attention."""
        return self.layers_of("attention")

    def at(self, layer: int) -> HybridSettings:
        """The settings of a decoder all of whose layers have the sizes of layer `layer`."""
        if not self.layer_sizes:
            return self
        own = self.layer_sizes[layer]
        base = super().at(layer)
        sizes = {"heads": own.mamba_heads, "head_size": own.mamba_head_size, "state_size": own.state_size}
        mamba = self.mamba.model_copy(update={name: size for name, size in sizes.items() if size})
        found: HybridSettings = base.model_copy(update={"mamba": mamba})  # type: ignore[assignment]
        return found

    def _decoder(self) -> type[HybridDecoder]:
        from resilin.models.hybrid import HybridDecoder  # the module imports these settings

        return HybridDecoder
