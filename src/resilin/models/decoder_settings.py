"""The settings of a Llama-family decoder; every combination they admit can be built."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from resilin.config import Settings
from resilin.models.chain_settings import ChainSettings, Widths, chain_widths, check_chains
from resilin.models.loop_settings import LoopSettings
from resilin.models.rope_scaling import LongRopeScaling, RopeScaling
from resilin.models.settings import ModelContext, ModelSettings

if TYPE_CHECKING:
    from resilin.models.decoder import Decoder

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]


class MoESettings(Settings):
    """Mixture-of-experts feed-forward: a router sends every token to a few of many small experts; none is dropped."""

    experts: PositiveInt = 8
    """How many experts a layer has."""
    experts_per_token: PositiveInt = 2
    """How many of them a token visits."""
    expert_size: PositiveInt = 512
    """Hidden width of one expert."""
    routing: Literal["softmax_topk", "topk_softmax", "sigmoid_topk"] = "softmax_topk"
    """Weights of the chosen experts: from a softmax over all experts, or over the chosen ones only, or each by itself,
    a sigmoid."""
    normalise_weights: bool = True
    """Whether the chosen experts' weights are made to sum to 1 (with `topk_softmax` they always do)."""
    router_bias: bool = False
    """Whether each expert has an offset that is added to its logit."""
    balance: Literal["none", "bias"] = "none"
    """none: balance is left to the objective's losses. bias: each expert has an offset that is added to what it is
    chosen by, not to its weight; each step moves it by `balance_rate`, up where the expert had less than the mean load
    and down where it had more (no loss is needed: set objective.load_balance = 0)."""
    balance_rate: PositiveFloat = 1e-4
    """How far those offsets move in a step; the schedule of the learning rate does not change it."""
    shared_size: NonNegativeInt = 0
    """Hidden width of an expert that every token visits; 0: none."""
    shared_gate: bool = False
    """Whether the shared expert's output is multiplied by a learned sigmoid gate (Qwen2-MoE)."""
    dense_layers: tuple[NonNegativeInt, ...] = ()
    """Layers (from 0) that keep the ordinary feed-forward of width `mlp_size`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.experts_per_token > self.experts:
            raise ValueError(
                f"experts_per_token ({self.experts_per_token}) is larger than the number of experts ({self.experts})"
            )
        if self.shared_gate and not self.shared_size:
            raise ValueError("shared_gate needs a shared expert: set shared_size to its hidden width")
        return self


class LayerSizes(Settings):
    """Sizes of one block where they are not the decoder's own; 0: as the decoder has it."""

    heads: NonNegativeInt = 0
    """Query heads."""
    kv_heads: NonNegativeInt = 0
    """Key and value heads."""
    mlp_size: NonNegativeInt = 0
    """Hidden width of the feed-forward; where the block has experts, of each of them."""
    experts: NonNegativeInt = 0
    """How many experts the block has."""
    experts_per_token: NonNegativeInt = 0
    """How many of them a token visits."""


def _multiples_near(value: int, divisor: int) -> str:
    below = value // divisor * divisor
    return f"{below} or {below + divisor}" if below else str(divisor)


class DecoderSettings(ModelSettings):
    """A decoder-only transformer: pre-norm blocks of rotary grouped-query attention and a (gated) feed-forward."""

    vocab_size: NonNegativeInt = 0
    """Number of token ids; 0: as many as the source's tokenizer has."""
    hidden_size: PositiveInt = 256
    """Width of the residual stream."""
    layers: PositiveInt = 6
    """Number of blocks."""
    heads: PositiveInt = 4
    """Query heads."""
    kv_heads: NonNegativeInt = 0
    """Key and value heads, each shared by heads / kv_heads query heads; 0: as many as `heads`."""
    head_size: PositiveInt | None = None
    """Width of one head; None: hidden_size / heads."""
    mlp_size: NonNegativeInt = 0
    """Hidden width of the feed-forward; 0: 8/3 of hidden_size when gated, else 4 times, rounded up to 8s."""
    activation: Literal["silu", "gelu", "gelu_tanh", "relu2"] = "silu"
    """Non-linearity of the feed-forward; relu2 is `max(x, 0)**2`."""
    gated: bool = True
    """Whether the feed-forward is `down(act(gate(x)) * up(x))` (SwiGLU with silu) or `down(act(up(x)))`."""
    norm: Literal["rms", "layer"] = "rms"
    """Root-mean-square norm, or layer norm without bias."""
    norm_place: Literal["before", "after"] = "before"
    """Whether a branch's input is normed, or its output (OLMo 2: `x + norm(attention(x))`)."""
    norm_eps: PositiveFloat = 1e-5
    """Added to the mean square (variance) inside the norms."""
    qk_norm: Literal["none", "rms", "layer", "transplant"] = "none"
    """Norm of queries and keys before rotation; over each head it has one scale of head_size shared by the heads.
    `transplant`: sqrt(kappa) * x / RMS(x), without a scale (Wortsman et al., 2023)."""
    qk_norm_over: Literal["head", "width"] = "head"
    """What `qk_norm` is taken over: each head, or all heads of a token at once with a scale for every value."""
    qk_norm_kappa: PositiveFloat = 1.0
    """The kappa of `transplant`."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections."""
    out_bias: bool = False
    """Bias on the attention's output projection."""
    mlp_bias: bool = False
    """Biases in the feed-forward."""
    tie_embeddings: bool = False
    """Whether the head is the embedding matrix."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary speeds."""
    rope_scaling: RopeScaling | None = None
    """How rotary positions are stretched: a table with `kind` linear, dynamic, llama3, yarn or longrope."""
    max_positions: PositiveInt = 2048
    """Longest text the model is meant for (not a limit of the code)."""
    attention_softcap: PositiveFloat | None = None
    """c of `c * tanh(logit / c)` on attention logits (Gemma 2)."""
    logit_softcap: PositiveFloat | None = None
    """The same on the output logits."""
    attention_scale: PositiveFloat | None = None
    """Factor of q.k; None: 1 / sqrt(head_size). muP uses 1 / head_size."""
    sliding_window: PositiveInt | None = None
    """Each token sees itself and the window - 1 tokens before it; None: all before it."""
    window_layers: tuple[NonNegativeInt, ...] | None = None
    """Layers (from 0) the window applies to; None: all."""
    moe: MoESettings | None = None
    """Mixture of experts in place of the feed-forward."""
    layer_sizes: tuple[LayerSizes, ...] = ()
    """Blocks of different sizes: one entry for each block, in order; empty: all are alike."""
    loop: LoopSettings | None = None
    """A looped decoder: its blocks are run several times, with the same weights."""
    chains: ChainSettings | None = None
    """Chain-of-Model: every width is an ordered list of chains, and the first ones are a model of their own."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of embedded values and of each branch's outputs set to zero in training."""
    init: Literal["normal", "fan_in"] = "normal"
    """All matrices N(0, init_std**2); or embeddings N(0, 1 / hidden_size) and matrices truncated normal with
    standard deviation 1 / sqrt(fan_in)."""
    init_std: PositiveFloat = 0.02
    """Of `init = "normal"`."""
    mup_base_size: PositiveInt | None = None
    """muP: a fan-in at which the head's initial standard deviation, sqrt(base) / fan_in, is the usual one."""
    zero_query_init: bool = False
    """muP: query projections start at zero."""
    attention_backend: Literal["sdpa", "flex", "eager"] = "sdpa"
    """torch's scaled_dot_product_attention; flex attention (training with it needs a GPU; a CPU takes another way to
    the same numbers); or plain matrix products."""
    recompute: Literal["none", "block", "selective"] = "none"
    """Activation checkpointing: whole blocks, or everything but matrix products and attention, is computed again
    in the backward pass."""
    offload: Literal["none", "host", "disk"] = "none"
    """Where the inputs of blocks wait for the backward pass under `recompute = "block"`: on the device, in pinned host
    memory (of GPUs; a CPU has no other memory), or in a file in the folder for temporary files (TMPDIR)."""
    mlp_tiles: PositiveInt | Literal["auto"] = 1
    """Tiles of tokens that the feed-forward (or the experts) takes one after another, keeping only its input and
    computing again in the backward pass; auto: about as many tokens in a tile as hidden_size, at least 256."""

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.head_size or self.hidden_size // self.heads

    @property
    def key_heads(self) -> int:
        """Number of key and value heads."""
        return self.kv_heads or self.heads

    @property
    def feed_forward_size(self) -> int:
        """Hidden width of the feed-forward."""
        if self.mlp_size:
            return self.mlp_size
        width = self.hidden_size * 8 / 3 if self.gated else self.hidden_size * 4
        return int(-(-width // 8) * 8)

    def is_moe_layer(self, layer: int) -> bool:
        """Whether block `layer` has experts."""
        return self.moe is not None and layer not in self.moe.dense_layers

    def at(self, layer: int) -> DecoderSettings:
        """The settings of a decoder all of whose blocks have the sizes of block `layer`."""
        if not self.layer_sizes:
            return self
        own = self.layer_sizes[layer]
        changes: dict[str, object] = {"layer_sizes": (), "head_size": self.head_width}
        changes["heads"] = own.heads or self.heads
        changes["kv_heads"] = own.kv_heads or self.key_heads
        if self.is_moe_layer(layer):
            assert self.moe is not None
            sizes = {"experts": own.experts, "experts_per_token": own.experts_per_token, "expert_size": own.mlp_size}
            changes["moe"] = self.moe.model_copy(update={name: size for name, size in sizes.items() if size})
        else:
            changes["mlp_size"] = own.mlp_size or self.feed_forward_size
        return self.model_copy(update=changes)

    @property
    def sizes_differ(self) -> bool:
        """Whether some blocks have sizes of their own."""
        return any(own != type(own)() for own in self.layer_sizes)

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """The numbers of the blocks that have attention."""
        return tuple(range(self.layers))

    @property
    def trajectory(self) -> tuple[int, ...]:
        """The steps of its loops, in any proportion; (1,) where it is not looped."""
        return (1,) if self.loop is None else self.loop.trajectory

    @property
    def told(self) -> bool:
        """Whether its blocks are told which loop they are in."""
        return self.loop is not None and self.loop.condition != "none"

    @property
    def widths(self) -> Widths:
        """The width of each chain; of a decoder without chains, of one."""
        return chain_widths(self)

    @property
    def shares_keys(self) -> bool:
        """Whether all chains read the keys and values that the first one makes (CoLM-Air)."""
        return self.chains is not None and self.chains.share_keys

    def window_of(self, layer: int) -> int | None:
        """The sliding window of block `layer`, or None."""
        applies = self.window_layers is None or layer in self.window_layers
        return self.sliding_window if applies else None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.head_size is None and self.hidden_size % self.heads:
            near = _multiples_near(self.hidden_size, self.heads)
            raise ValueError(
                f"hidden_size ({self.hidden_size}) is not divisible by heads ({self.heads}): use {near}, "
                "or set head_size"
            )
        if self.head_width % 2:
            raise ValueError(f"the width of a head ({self.head_width}) should be even: rotary positions turn pairs")
        if self.heads % self.key_heads:
            options = ", ".join(str(n) for n in range(1, self.heads + 1) if self.heads % n == 0)
            raise ValueError(f"heads ({self.heads}) is not divisible by kv_heads ({self.kv_heads}): use {options}")
        if self.attention_softcap is not None and self.attention_backend == "sdpa":
            raise ValueError("attention_softcap cannot be computed by attention_backend 'sdpa': use 'flex' or 'eager'")
        if self.offload != "none" and self.recompute != "block":
            raise ValueError(
                f"offload ({self.offload!r}) says where the inputs of recomputed blocks wait: set recompute = 'block'"
            )
        if self.qk_norm_over == "width" and self.qk_norm == "none":
            raise ValueError("qk_norm_over = 'width' says how queries and keys are normed: set qk_norm as well")
        if self.window_layers is not None and self.sliding_window is None:
            raise ValueError("window_layers names layers of a window: set sliding_window to its size")
        named = {
            "window_layers": self.window_layers or (),
            "moe.dense_layers": self.moe.dense_layers if self.moe else (),
        }
        for name, layers in named.items():
            beyond = [layer for layer in layers if layer >= self.layers]
            if beyond:
                raise ValueError(f"{name} names layer {beyond[0]}, but layers count from 0 to {self.layers - 1}")
        scaling = self.rope_scaling
        if isinstance(scaling, LongRopeScaling):
            for name, divisors in (("short_factor", scaling.short_factor), ("long_factor", scaling.long_factor)):
                if len(divisors) != self.head_width // 2:
                    raise ValueError(
                        f"rope_scaling.{name} has {len(divisors)} values; half a head needs {self.head_width // 2}"
                    )
        if self.norm_place == "after" and self.told:
            raise ValueError("norm_place = 'after': blocks that are told of loops are normed before: leave it out")
        if self.moe is not None and self.mlp_bias:
            raise ValueError("mlp_bias: experts have no biases; set it to false")
        self._check_layer_sizes()
        check_chains(self)
        return self

    def _check_layer_sizes(self) -> None:
        if self.layer_sizes and len(self.layer_sizes) != self.layers:
            raise ValueError(
                f"layer_sizes has {len(self.layer_sizes)} entries; give one for each of {self.layers} layers"
            )
        for layer, own in enumerate(self.layer_sizes):
            heads, keys = own.heads or self.heads, own.kv_heads or self.key_heads
            if heads % keys:
                raise ValueError(f"layer_sizes: layer {layer} has {heads} heads, not divisible by {keys} kv_heads")
            if self.head_size is None and heads != self.heads:
                raise ValueError(f"layer_sizes: layer {layer} has {heads} heads: set head_size, which all blocks share")
            if not self.is_moe_layer(layer):
                if own.experts or own.experts_per_token:
                    raise ValueError(
                        f"layer_sizes: layer {layer} has no experts: leave experts and experts_per_token 0"
                    )
                continue
            assert self.moe is not None
            experts, visited = own.experts or self.moe.experts, own.experts_per_token or self.moe.experts_per_token
            if visited > experts:
                raise ValueError(f"layer_sizes: layer {layer}: a token cannot visit {visited} of {experts} experts")

    def build(self, context: ModelContext) -> Decoder:
        """The decoder on the CPU with weights drawn from the seed.

        Raises:
            ValueError: neither these settings nor the context say how large the vocabulary is.
        """
        return self._decoder()(self._with_vocabulary(context), seed=context.seed)

    def outline(self, context: ModelContext) -> Decoder:
        """The decoder on the meta device.

        Raises:
            ValueError: as `build`.
        """
        return self._with_vocabulary(context).on_meta()

    def on_meta(self) -> Decoder:
        """The decoder of exactly these settings on the meta device, for a loader to fill."""
        return self._decoder()(self, seed=None, device="meta")

    def _decoder(self) -> type[Decoder]:
        from resilin.models.decoder import Decoder  # the module imports these settings

        return Decoder

    def _with_vocabulary(self, context: ModelContext) -> Self:
        if self.vocab_size:
            if context.vocab_size is not None and context.vocab_size > self.vocab_size:
                raise ValueError(
                    f"model.vocab_size ({self.vocab_size}) is smaller than the tokenizer's ({context.vocab_size}): "
                    f"leave it 0, or use {context.vocab_size} or more"
                )
            return self
        if not context.vocab_size:
            raise ValueError("model.vocab_size is 0 and no tokenizer gives it: set it to the number of token ids")
        return self.model_copy(update={"vocab_size": context.vocab_size})
