"""How many floating-point operations a token costs in training a decoder as it stands, with what is frozen in it.

Counted as in `resilin.models.flops`. The backward pass computes a matrix's own gradient only where it is trained, and
the gradient of its input only where something before it is trained: below the first trained parameter nothing flows
back. Matrices that a method puts beside the decoder's own (adapters) count as matrices that a token meets; a product
of weights alone, which costs the same for any number of tokens (Bat's), is not counted, like recomputation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from resilin.models.attention import Attention
from resilin.models.block import Block
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.flops import keys_seen, state_products
from resilin.models.hybrid import HybridBlock
from resilin.models.hybrid_settings import HybridSettings
from resilin.models.mamba import Mamba2
from resilin.models.moe import Experts


def _matrices(modules: Iterable[nn.Module], settings: DecoderSettings) -> Iterator[tuple[float, bool]]:
    """How many numbers of each matrix of a block with these settings a token meets, and whether it is trained."""
    for module in modules:
        for part in module.modules():
            share = 1.0
            if isinstance(part, Experts) and settings.moe is not None:
                share = settings.moe.experts_per_token / settings.moe.experts
            for parameter in part.parameters(recurse=False):
                if parameter.ndim > 1:
                    yield parameter.numel() * share, parameter.requires_grad


def _trained(*modules: nn.Module | None) -> bool:
    return any(p.requires_grad for module in modules if module is not None for p in module.parameters())


def step_flops_per_token(model: Decoder, sequence_length: int) -> float:
    """Operations of one forward and backward pass, averaged over the tokens of a text.

    Args:
        model: on any device, the meta device too; `requires_grad` says what is trained.
        sequence_length: tokens of a text.
    """
    settings, total = model.settings, 0.0
    flows = _trained(model.embed)
    """Whether a gradient flows back to what was computed so far."""

    own = settings
    """Those of the block that is counted."""

    def through(*modules: nn.Module | None) -> None:
        """Count modules that share an input."""
        nonlocal total, flows
        there = [module for module in modules if module is not None]
        total += sum(2 * count * (1 + trained + flows) for count, trained in _matrices(there, own))
        flows = flows or _trained(*there)

    def attend(attention: Attention, layer: int) -> None:
        """Count the attention of a block."""
        nonlocal total, flows
        q, k = (flows or _trained(*pair) for pair in ((attention.q, attention.q_norm), (attention.k, attention.k_norm)))
        v = flows or _trained(attention.v)
        through(attention.q, attention.k, attention.v)
        # q.k and the mix of values; backwards the pulls of values, weights, queries and keys, each where it is needed
        product = 2 * own.heads * settings.head_width * keys_seen(sequence_length, settings.window_of(layer))
        total += product * (2 + v + (q or k) + q + k)
        flows = flows or q or k
        through(attention.o)

    def scan(mamba: Mamba2) -> None:
        """Count a Mamba-2 layer."""
        nonlocal total, flows
        through(mamba.z, mamba.x, mamba.B, mamba.C, mamba.dt)
        through(mamba.conv_x, mamba.conv_B, mamba.conv_C)
        flows = flows or any(p.requires_grad for p in (mamba.A_log, mamba.D, mamba.dt_bias))
        assert isinstance(own, HybridSettings)
        total += state_products(own.mamba) * (1 + 2 * flows)
        through(mamba.norm)
        through(mamba.out)

    for layer, block in [*enumerate(model.blocks)] * len(settings.trajectory):
        own = settings.at(layer)
        if isinstance(block, HybridBlock):
            through(block.norm)
            if block.kind == "mamba":
                scan(block.mamba)
            elif block.kind == "attention":
                attend(block.attention, layer)
            else:
                through(block.mlp.gate, block.mlp.up)
                through(block.mlp.down)
            continue
        assert isinstance(block, Block)
        through(block.attention_norm)
        attend(block.attention, layer)
        through(block.mlp_norm)
        if block.has_experts:
            through(block.moe)
        else:
            through(block.mlp.gate, block.mlp.up)
            through(block.mlp.down)
    through(model.norm)
    head = model.head_weight
    return total + 2 * head.numel() * (1 + head.requires_grad + flows)
