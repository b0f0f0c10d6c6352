"""How many floating-point operations a token costs in training a decoder as it stands, with what is frozen in it.

Counted as in `resilin.models.flops`. The backward pass computes a matrix's own gradient only where it is trained, and
the gradient of its input only where something before it is trained: below the first trained parameter nothing flows
back. Matrices that a method puts beside the decoder's own (adapters) count as matrices that a token meets; a product
of weights alone, which costs the same for any number of tokens (Bat's), is not counted, like recomputation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from resilin.models.decoder import Block, Decoder
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.flops import keys_seen
from resilin.models.moe import Experts


def _matrices(modules: Iterable[nn.Module], settings: DecoderSettings) -> Iterator[tuple[float, bool]]:
    """How many numbers of each matrix a token meets, and whether the matrix is trained."""
    for module in modules:
        for part in module.modules():
            share = 1.0
            if isinstance(part, Experts) and settings.moe is not None:
                share = settings.moe.experts_per_token / settings.moe.experts
            for parameter in part.parameters(recurse=False):
                if parameter.ndim > 1:
                    yield parameter.numel() * share, parameter.requires_grad


def _stages(block: Block) -> Iterator[list[nn.Module] | None]:
    """What a block does, one after the other: modules that share an input; None: attention itself."""
    attention = block.attention
    yield [block.attention_norm]
    yield [attention.q, attention.k, attention.v]
    yield [norm for norm in (attention.q_norm, attention.k_norm) if norm is not None]
    yield None
    yield [attention.o]
    yield [block.mlp_norm]
    if block.has_experts:
        yield [block.moe]
        return
    yield [layer for layer in (block.mlp.gate, block.mlp.up) if layer is not None]
    yield [block.mlp.down]


def _trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def step_flops_per_token(model: Decoder, sequence_length: int) -> float:
    """Operations of one forward and backward pass, averaged over the tokens of a text.

    Args:
        model: on any device, the meta device too; `requires_grad` says what is trained.
        sequence_length: tokens of a text.
    """
    settings, total = model.settings, 0.0
    flows = _trained(model.embed)
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        seen = keys_seen(sequence_length, settings.window_of(layer))
        for modules in _stages(block):
            if modules is None:
                total += 4 * settings.heads * settings.head_width * seen * (3 if flows else 1)
                continue
            for count, trained in _matrices(modules, settings):
                total += 2 * count * (1 + trained + flows)
            flows = flows or any(map(_trained, modules))
    flows = flows or _trained(model.norm)
    head = model.head_weight
    return total + 2 * head.numel() * (1 + head.requires_grad + flows)
