"""Dense models as the experts of one mixture whose router is yet to be trained: baselines of joining.

Sources: branch-train-mix, Sukhbaatar et al., 2024; sparse upcycling, Komatsuzaki et al., 2022.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from resilin.joined.averaging import average
from resilin.joined.beside import joined_settings
from resilin.keys import Keys
from resilin.models.block import Block
from resilin.models.decoder import Decoder


@torch.no_grad()
def upcycle(models: Sequence[Decoder], *, top_k: int | None = None, seed: int = 0) -> Decoder:
    """A mixture of the feed-forwards of dense models; everything else is the models' average.

    The same model several times gives the usual upcycled model: it computes what the model computes.

    Args:
        models: dense, of the same settings.
        top_k: experts that a token visits; None: all.
        seed: of the router's rows, which are small and random.

    Raises:
        JoinError: the models differ in their sizes, or cannot be experts.
    """
    shared = average(models)
    settings = joined_settings(shared.settings, len(models), top_k, offsets=False)
    found = Decoder(settings, seed=None, device="meta")
    weight = shared.embed.weight
    found = found.to(weight.dtype).to_empty(device=weight.device)
    for name, parameter in found.named_parameters():
        if ".moe." not in name:
            parameter.copy_(shared.get_parameter(name))
    for layer, block in enumerate(found.blocks):
        assert isinstance(block, Block)
        generator = Keys.of_step(seed, 0).fold("rows of an upcycled router").fold(layer).generator()
        rows = torch.empty(block.moe.router.weight.shape)
        block.moe.router.weight.copy_(rows.normal_(0.0, settings.init_std, generator=generator))
        for matrix in ("gate", "up", "down"):
            stack = getattr(block.moe.experts, matrix)
            if stack is not None:
                for number, model in enumerate(models):
                    stack[number].copy_(model.get_parameter(f"blocks.{layer}.mlp.{matrix}.weight"))
    return found
