"""How many parameters a decoder has and how many floating-point operations a token costs.

Counted are matrix products only, a multiply-add as two operations: 2N per token in the forward pass for N weights
that meet the token, and in attention 4 * heads * head_size per key seen (q.k and the mix of values), where a token
sees on average (T + 1) / 2 keys of a text of T tokens (causal), or fewer inside a window. A Mamba-2 layer costs its
matrices, its convolution, and 4 * heads * head_size * state_size, to change its state and to read it (that it is
computed in chunks, which takes more, is no work that the model asks for). The backward pass costs
twice the forward pass; recomputation is not counted, so that a ratio to the peak is MFU (PaLM, appendix B); nor are
products that cost the same for any number of tokens, such as those of what looped blocks are told.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

from resilin.models.decoder_settings import DecoderSettings
from resilin.models.hybrid_settings import HybridSettings, MambaSettings


class ParameterCounts(NamedTuple):
    """Parameters of a decoder.

    Attributes:
        total: all of them; tied matrices once.
        active: those that a token meets: with experts, the chosen ones only.
        non_embedding: `total` without the embedding and the head.
    """

    total: int
    active: int
    non_embedding: int


def chain_weights(inputs: tuple[int, ...], outputs: tuple[int, ...]) -> int:
    """Weights of a linear map each of whose chains reads those before it too: sum of o_i (i_1 + ... + i_i)."""
    return sum(size * width for size, width in zip(outputs, accumulate(inputs), strict=True))


def _attention_matrices(settings: DecoderSettings) -> int:
    hidden, queries, keys, _ = settings.widths
    read = hidden[:1] if settings.shares_keys else hidden
    return chain_weights(hidden, queries) + 2 * chain_weights(read, keys) + chain_weights(queries, hidden)


def _attention_vectors(settings: DecoderSettings) -> int:
    query, key = settings.heads * settings.head_width, settings.key_heads * settings.head_width
    count = (query + 2 * key) * settings.qkv_bias + settings.hidden_size * settings.out_bias
    if settings.qk_norm in ("rms", "layer") and settings.chains is not None:
        chains = len(settings.chains.sizes)
        count += (chains + (1 if settings.shares_keys else chains)) * settings.head_width
    elif settings.qk_norm in ("rms", "layer"):
        count += query + key if settings.qk_norm_over == "width" else 2 * settings.head_width
    return count


def _mlp_matrices(settings: DecoderSettings, size: int) -> int:
    if settings.chains is not None:
        hidden, _, _, neurons = settings.widths
        up, down = chain_weights(hidden, neurons), chain_weights(neurons, hidden)
        return (2 if settings.gated else 1) * up + down
    return settings.hidden_size * size * (3 if settings.gated else 2)


def _mlp_vectors(settings: DecoderSettings) -> int:
    if not settings.mlp_bias:
        return 0
    return settings.feed_forward_size * (2 if settings.gated else 1) + settings.hidden_size


def _moe_matrices(settings: DecoderSettings, experts: int) -> int:
    """Weights of one mixture layer of which a token meets `experts`."""
    moe = settings.moe
    assert moe is not None
    router = settings.hidden_size * (moe.experts + moe.shared_gate)
    shared = _mlp_matrices(settings, moe.shared_size) if moe.shared_size else 0
    return router + shared + experts * _mlp_matrices(settings, moe.expert_size)


def mamba_matrices(mamba: MambaSettings, hidden_size: int) -> int:
    """Weights of a Mamba-2 layer that meet a token: its maps, and its convolution."""
    maps = 3 * mamba.width + 2 * mamba.state_width + mamba.heads
    return hidden_size * maps + mamba.conv_size * (mamba.width + 2 * mamba.state_width)


def state_products(mamba: MambaSettings) -> int:
    """Operations with which a token changes the state of a Mamba-2 layer and reads it."""
    return 4 * mamba.width * mamba.state_size


def _mamba_vectors(mamba: MambaSettings) -> int:
    return 3 * mamba.heads + mamba.width + (mamba.width + 2 * mamba.state_width) * mamba.conv_bias


def _block_matrices(settings: DecoderSettings, layer: int, *, active: bool) -> int:
    settings = settings.at(layer)
    if isinstance(settings, HybridSettings):
        kind = settings.kind_of(layer)
        if kind == "mamba":
            return mamba_matrices(settings.mamba, settings.hidden_size)
        if kind == "attention":
            return _attention_matrices(settings)
        return _mlp_matrices(settings, settings.feed_forward_size)
    if not settings.is_moe_layer(layer):
        return _attention_matrices(settings) + _mlp_matrices(settings, settings.feed_forward_size)
    assert settings.moe is not None
    experts = settings.moe.experts_per_token if active else settings.moe.experts
    return _attention_matrices(settings) + _moe_matrices(settings, experts)


def _block_vectors(settings: DecoderSettings, layer: int) -> int:
    settings = settings.at(layer)
    if isinstance(settings, HybridSettings):
        kind = settings.kind_of(layer)
        own = _mamba_vectors(settings.mamba) if kind == "mamba" else _attention_vectors(settings)
        return settings.hidden_size + (_mlp_vectors(settings) if kind == "mlp" else own)
    mlp = _mlp_vectors(settings)
    if settings.moe is not None and settings.is_moe_layer(layer):
        mlp = settings.moe.experts * (settings.moe.router_bias + (settings.moe.balance == "bias"))
    # The map of what a block is told is no matrix that tokens meet: one vector passes it in each loop.
    width = settings.hidden_size
    scales = 4 * width * (width + 1) if settings.told else 2 * width
    return scales + _attention_vectors(settings) + mlp


def _condition(settings: DecoderSettings) -> int:
    """Parameters that embed the times and steps of loops."""
    if settings.loop is None or not settings.told:
        return 0
    width = settings.hidden_size
    one = width * (settings.loop.frequencies + width + 2)
    return one * (2 if settings.loop.condition == "time_and_step" else 1)


def parameter_counts(settings: DecoderSettings) -> ParameterCounts:
    """Parameters without building the model."""
    layers = range(settings.layers)
    vectors = sum(_block_vectors(settings, layer) for layer in layers) + settings.hidden_size
    vectors += _condition(settings)
    total = sum(_block_matrices(settings, layer, active=False) for layer in layers) + vectors
    active = sum(_block_matrices(settings, layer, active=True) for layer in layers) + vectors
    embedding = settings.vocab_size * settings.hidden_size * (1 if settings.tie_embeddings else 2)
    return ParameterCounts(total + embedding, active + embedding, total)


def keys_seen(sequence_length: int, window: int | None) -> float:
    """Keys a token sees, averaged over a text: (T + 1) / 2, or less within a window."""
    if window is None or window >= sequence_length:
        return (sequence_length + 1) / 2
    return window - window * (window - 1) / (2 * sequence_length)


def block_flops_per_token(settings: DecoderSettings, layer: int, sequence_length: int) -> float:
    """Operations of one block's forward pass, run once, averaged over the tokens of a text."""
    if layer not in settings.attention_layers:
        assert isinstance(settings, HybridSettings)
        own = state_products(settings.at(layer).mamba) if settings.kind_of(layer) == "mamba" else 0
        return 2 * _block_matrices(settings, layer, active=True) + own
    seen = keys_seen(sequence_length, settings.window_of(layer))
    attention = 4 * settings.at(layer).heads * settings.head_width * seen
    return 2 * _block_matrices(settings, layer, active=True) + attention


def head_flops_per_token(settings: DecoderSettings) -> float:
    """Operations of the head's forward pass; looking up an embedding is no product."""
    return 2.0 * settings.vocab_size * settings.hidden_size


def forward_flops_per_token(settings: DecoderSettings, sequence_length: int) -> float:
    """Operations of the forward pass, the head included, averaged over the tokens of a text; a looped decoder's
    blocks are counted as often as they are run.
    """
    blocks = sum(block_flops_per_token(settings, layer, sequence_length) for layer in range(settings.layers))
    return len(settings.trajectory) * blocks + head_flops_per_token(settings)


def train_flops_per_token(settings: DecoderSettings, sequence_length: int) -> float:
    """Operations of one forward and backward pass with everything trained: three times the forward pass."""
    return 3 * forward_flops_per_token(settings, sequence_length)
