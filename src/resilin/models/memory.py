"""How much memory training a decoder takes, estimated without running it."""

from __future__ import annotations

from dataclasses import dataclass

from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.hybrid_settings import HybridSettings
from resilin.models.tiled import tile_count


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes, by what they hold.

    Attributes:
        weights: parameters, as they are stored.
        gradients: one per trained parameter.
        moments: the optimizer's state of trained parameters.
        activations: what the forward pass of one micro-batch keeps for the backward pass, and the logits of one chunk.
    """

    weights: int
    gradients: int
    moments: int
    activations: int

    @property
    def total(self) -> int:
        """All of them: the peak of a step, but for temporaries and the allocator's losses."""
        return self.weights + self.gradients + self.moments + self.activations


@dataclass(frozen=True, slots=True)
class TensorRanks:
    """How ranks of tensor parallelism divide what is kept.

    Attributes:
        count: of ranks.
        sequence: whether each has a part of the positions between regions.
        regathers: whether a region's input, put together for it, is given up and put together again; else it is kept.
    """

    count: int = 1
    sequence: bool = True
    regathers: bool = False

    def stream(self, values: float) -> float:
        """Of values that lie between regions."""
        return values / self.count if self.sequence else values

    def entered(self, hidden_size: int) -> float:
        """Of the whole input of a region, beside the rank's part of it."""
        return hidden_size if self.count > 1 and self.sequence and not self.regathers else 0


WHOLE = TensorRanks()


def _attention_kept(s: DecoderSettings, ranks: TensorRanks) -> float:
    query, key = s.heads * s.head_width, s.key_heads * s.head_width
    # queries, keys, values; mixed values and their log-sum-exp
    kept = query + 2 * key + query + s.heads
    if s.qk_norm != "none":
        kept += query + key
    # norm input and output
    return ranks.stream(2 * s.hidden_size) + ranks.entered(s.hidden_size) + kept / ranks.count


def _mlp_kept(s: DecoderSettings, layer: int, ranks: TensorRanks) -> float:
    s = s.at(layer)
    stream = ranks.stream(2 * s.hidden_size) + ranks.entered(s.hidden_size)
    branches = 4 if s.gated else 2
    if s.moe is None or not s.is_moe_layer(layer):
        return stream + branches * s.feed_forward_size / ranks.count
    moe = s.moe
    stream += moe.experts + moe.experts_per_token * 2 * s.hidden_size
    return stream + branches * (moe.shared_size + moe.experts_per_token * moe.expert_size) / ranks.count


def _mamba_kept(s: HybridSettings) -> int:
    """Values that a token leaves in a Mamba-2 layer."""
    m = s.mamba
    convolved = m.width + 2 * m.state_width
    # norm input and output; inputs of the convolution, of silu and of what follows; B and C as they are multiplied; the
    # masked products of a chunk and what they are made of; inputs, outputs and gates of the scan and of the norm; the
    # states between chunks; steps and decays
    inside = (2 * m.heads + m.groups) * m.chunk + 10 * m.width + 5 * m.heads
    states = 2 * m.width * m.state_size // m.chunk
    return 2 * s.hidden_size + 4 * convolved + 4 * m.state_width + inside + states


def _hybrid_kept(s: HybridSettings, layer: int) -> float:
    masks = 2 * s.hidden_size if s.dropout else 0
    if s.kind_of(layer) == "mamba":
        return _mamba_kept(s) + masks
    own = _attention_kept(s, WHOLE) if s.kind_of(layer) == "attention" else _mlp_kept(s, layer, WHOLE)
    return own + masks


def _hybrid_selective_kept(s: HybridSettings, layer: int) -> int:
    kind, m = s.kind_of(layer), s.mamba
    if kind == "mamba":
        states = m.width * m.state_size // m.chunk
        return 2 * s.hidden_size + 4 * m.width + 2 * m.state_width + m.heads + m.groups * m.chunk + states
    if kind == "mlp":
        return 2 * s.hidden_size + (2 if s.gated else 1) * s.feed_forward_size
    query, key = s.heads * s.head_width, s.key_heads * s.head_width
    return 2 * s.hidden_size + 2 * query + 2 * key + s.heads


def _block_kept(s: DecoderSettings, layer: int, ranks: TensorRanks = WHOLE) -> float:
    """Values a token leaves in one block when nothing is recomputed."""
    s = s.at(layer)
    if isinstance(s, HybridSettings):
        return _hybrid_kept(s, layer)
    masks = 2 * 2 * s.hidden_size if s.dropout else 0
    branches = 2 * s.hidden_size if s.told else 0  # for the gradients of their gates
    return _attention_kept(s, ranks) + _mlp_kept(s, layer, ranks) + ranks.stream(masks + branches)


def _selective_kept(s: DecoderSettings, layer: int, ranks: TensorRanks = WHOLE) -> float:
    """Values a token leaves in one block when only matrix products and attention are kept."""
    s = s.at(layer)
    if isinstance(s, HybridSettings):
        return _hybrid_selective_kept(s, layer)
    query, key = s.heads * s.head_width, s.key_heads * s.head_width
    stream = ranks.stream(3 * s.hidden_size) + 2 * ranks.entered(s.hidden_size)
    region = 2 * query + 2 * key + s.heads
    branches = 2 if s.gated else 1
    if s.moe is None or not s.is_moe_layer(layer):
        return stream + (region + branches * s.feed_forward_size) / ranks.count
    moe = s.moe
    stream += moe.experts + moe.experts_per_token * 2 * s.hidden_size
    region += branches * (moe.shared_size + moe.experts_per_token * moe.expert_size)
    return stream + region / ranks.count


def _at_work(s: DecoderSettings, layer: int, batch: int, length: int, ranks: TensorRanks) -> float:
    """Values a token leaves in one block while it is computed again: those of its feed-forward for one tile only."""
    tiles = tile_count(s.mlp_tiles, batch, length, s.hidden_size)
    mlp = _mlp_kept(s, layer, ranks)
    return _block_kept(s, layer, ranks) - mlp * (1 - 1 / tiles) + (s.hidden_size if tiles > 1 else 0)


def activation_bytes(
    settings: DecoderSettings,
    batch: int,
    sequence_length: int,
    *,
    value_bytes: int = 4,
    logit_rows: int = 1024,
    blocks: range | None = None,
    ranks: TensorRanks = WHOLE,
) -> int:
    """What one micro-batch keeps between its forward and its backward pass.

    Args:
        settings: of the decoder; `recompute`, `offload` (but `host` on a CPU, which leaves nothing) and `mlp_tiles`
            decide.
        batch: rows of the micro-batch.
        sequence_length: tokens of a row.
        value_bytes: of one activation (4 in float32, 2 in bfloat16).
        logit_rows: tokens whose logits (and their gradient) the loss holds at once.
        blocks: those of one stage of a pipeline, the last of which has the logits; None: all.
        ranks: of tensor parallelism: what one of them keeps.
    """
    tokens, layers = batch * sequence_length, range(settings.layers) if blocks is None else blocks
    at_work = max(_at_work(settings, layer, batch, sequence_length, ranks) for layer in layers)
    loops = len(settings.trajectory)
    if settings.recompute == "none":
        tiled = tile_count(settings.mlp_tiles, batch, sequence_length, settings.hidden_size) > 1
        kept = (
            loops
            * sum(
                _block_kept(settings, layer, ranks) - tiled * (_mlp_kept(settings, layer, ranks) - settings.hidden_size)
                for layer in layers
            )
            + tiled * at_work
        )
    elif settings.recompute == "block":
        # While a block is recomputed, all of its own values are there. Of inputs that wait elsewhere, those of the last
        # block, of the one at work, and two on their way.
        inputs = loops * len(layers) if settings.offload == "none" else min(loops * len(layers), 4)
        kept = ranks.stream(inputs * settings.hidden_size) + at_work
    else:
        # What is kept is not there a second time while the rest of its block is computed again.
        again = max(_block_kept(settings, layer, ranks) - _selective_kept(settings, layer, ranks) for layer in layers)
        kept = loops * sum(_selective_kept(settings, layer, ranks) for layer in layers) + max(again, 0.0)
    ends = 3 * settings.hidden_size  # embedded tokens, input and output of the final norm
    logits = 2 * min(tokens, logit_rows) * settings.vocab_size * 4 if layers[-1] == settings.layers - 1 else 0
    return int(tokens * (kept + ends) * value_bytes) + logits // ranks.count


def memory_estimate(
    model: Decoder,
    batch: int,
    sequence_length: int,
    *,
    moments_per_parameter: int = 2,
    value_bytes: int = 4,
    logit_rows: int = 1024,
) -> MemoryEstimate:
    """The memory of one training step on one device.

    Args:
        model: on any device, the meta device too; `requires_grad` says what is trained. Of activations, those of a
            model that is trained in full are counted: at most these are kept where some of it is frozen.
        batch: rows of one micro-batch.
        sequence_length: tokens of a row.
        moments_per_parameter: float32 numbers the optimizer keeps for each (AdamW 2, Muon 1).
        value_bytes: of one activation.
        logit_rows: tokens whose logits the loss holds at once.
    """
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    activations = activation_bytes(
        model.settings, batch, sequence_length, value_bytes=value_bytes, logit_rows=logit_rows
    )
    return MemoryEstimate(
        weights=sum(parameter.nbytes for parameter in parameters),
        gradients=sum(parameter.nbytes for parameter in trained),
        moments=sum(parameter.numel() for parameter in trained) * moments_per_parameter * 4,
        activations=activations,
    )
