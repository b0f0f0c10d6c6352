"""A Llama-family decoder.

Shapes: B batch, T tokens, D hidden size, E experts, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from resilin.keys import Keys, dropout
from resilin.models.attention import Attention
from resilin.models.cache import KVCache
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.initial import fill_parameters
from resilin.models.linear import Embedding, Linear, PackedWeight, product
from resilin.models.mask import Mask, cached_mask, flex_mask, training_mask
from resilin.models.mlp import MLP
from resilin.models.moe import MoE
from resilin.models.norm import stream_norm
from resilin.models.recompute import run_block
from resilin.models.rope import Rotation, depends_on_length, rotation


class DecoderOutput(NamedTuple):
    """What a decoder gives for a batch of tokens.

    Attributes:
        hidden_BTD: after the final norm; `Decoder.logits` turns it (or a chunk of it) into logits.
        router_logits: (B, T, E) of every block that has experts, in order.
    """

    hidden_BTD: Tensor
    router_logits: tuple[Tensor, ...] = ()


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, settings: DecoderSettings, layer: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.dropout = settings.dropout
        self.attention_norm = stream_norm(settings, device)
        self.attention = Attention(settings, layer, device)
        self.mlp_norm = stream_norm(settings, device)
        if settings.moe is not None and settings.is_moe_layer(layer):
            self.moe = MoE(settings, settings.moe, device)
        else:
            self.mlp = MLP(settings, settings.feed_forward_size, device)
        self.has_experts = settings.is_moe_layer(layer)

    def forward(
        self,
        x_BTD: Tensor,
        turn: Rotation,
        mask: Mask,
        keys: Keys | None = None,
        cache: KVCache | None = None,
        slots_BT: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The residual stream after this block, and the router's logits where the block has experts."""
        keys = keys.fold(self.layer) if keys is not None and self.dropout else None
        mixed = self.attention(self.attention_norm(x_BTD), turn, mask, cache, slots_BT)
        x_BTD = x_BTD + dropout(mixed, self.dropout, keys.fold("attention") if keys else None)
        normed, router = self.mlp_norm(x_BTD), None
        if self.has_experts:
            hidden, router = self.moe(normed)
        else:
            hidden = self.mlp(normed)
        return x_BTD + dropout(hidden, self.dropout, keys.fold("mlp") if keys else None), router


class Decoder(nn.Module):
    """A decoder-only transformer. Built by `DecoderSettings.build`.

    Attributes:
        settings: what it was built from; `vocab_size` is never 0 here.
    """

    def __init__(
        self, settings: DecoderSettings, *, seed: int | None = 0, device: torch.device | str | None = None
    ) -> None:
        """Args:
        settings: of the decoder.
        seed: of the initial weights; None leaves the memory unfilled, for a loader.
        device: where the parameters live ("meta" allocates nothing).
        """
        super().__init__()
        if not settings.vocab_size:
            raise ValueError("a Decoder needs settings.vocab_size: it is 0")
        self.settings = settings
        self.embed = Embedding(settings.vocab_size, settings.hidden_size, device=device)
        self.blocks = nn.ModuleList(Block(settings, layer, device) for layer in range(settings.layers))
        self.norm = stream_norm(settings, device)
        self.head: Linear | None = None
        if not settings.tie_embeddings:
            self.head = Linear(settings.hidden_size, settings.vocab_size, bias=False, device=device)
        if seed is not None:
            fill_parameters(self, settings, seed)

    @property
    def head_weight(self) -> Tensor:
        """(V, D): the output matrix, the embedding's own where they are tied."""
        return self.embed.weight if self.head is None else self.head.weight

    @property
    def stream_dtype(self) -> torch.dtype:
        """The format of the residual stream: that of the norms, whatever format the matrices are stored in."""
        dtype: torch.dtype = self.norm.weight.dtype  # type: ignore[assignment]
        return dtype

    def logits(self, hidden: Tensor, head: PackedWeight | None = None) -> Tensor:
        """(..., D) after the final norm -> (..., V) logits, float32 at least, soft-capped where the settings say so.

        Args:
            hidden: after the final norm.
            head: the head's weight, packed, where many products follow each other.
        """
        logits = product(hidden, self.head_weight) if head is None else head(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        cap = self.settings.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def forward(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        *,
        keys: Keys | None = None,
        cache: KVCache | None = None,
    ) -> DecoderOutput:
        """Args:
        tokens_BT: ids.
        positions_BT: where each token stands in its text; None: 0, 1, 2, ... (after what the cache holds).
        documents_BT: attention stays among equal numbers; -1 marks padding. With a cache only padding counts.
        keys: for dropout; None (evaluation): no dropout.
        cache: read and extended by these tokens.
        """
        if cache is not None:
            return self._forward_cached(tokens_BT, positions_BT, documents_BT, cache)
        T, device = tokens_BT.shape[1], tokens_BT.device
        length = T
        if positions_BT is None:
            positions = torch.arange(T, device=device)
        else:
            positions = positions_BT
            length = int(positions.max()) + 1 if depends_on_length(self.settings) else T
        turn = rotation(self.settings, positions, length)
        windows = {self.settings.window_of(layer) for layer in range(self.settings.layers)}
        # torch has no backward pass of flex attention on CPUs: there the same mask goes to another backend.
        flex = self.settings.attention_backend == "flex" and not (device.type == "cpu" and torch.is_grad_enabled())
        make_mask = flex_mask if flex else training_mask
        masks = {window: make_mask(documents_BT, T, window, device) for window in windows}
        x_BTD = self.embed(tokens_BT).to(self.stream_dtype)
        x_BTD = dropout(x_BTD, self.settings.dropout, keys.fold("embed") if keys else None)
        routers = []
        for layer, block in enumerate(self.blocks):
            mask = masks[self.settings.window_of(layer)]
            x_BTD, router = run_block(self.settings.recompute, block, x_BTD, turn, mask, keys)
            if router is not None:
                routers.append(router)
        return DecoderOutput(self.norm(x_BTD), tuple(routers))

    def _forward_cached(
        self, tokens_BT: Tensor, positions_BT: Tensor | None, documents_BT: Tensor | None, cache: KVCache
    ) -> DecoderOutput:
        T = tokens_BT.shape[1]
        real_BT = None if documents_BT is None else documents_BT >= 0
        slots_BT = cache.slots_of(real_BT, T)
        reach = min(cache.reach + T, cache.capacity)
        positions = slots_BT if positions_BT is None else positions_BT
        length = reach
        if depends_on_length(self.settings):
            in_use = positions if real_BT is None else positions.where(real_BT, 0)
            length = int(in_use.max()) + 1
        turn = rotation(self.settings, positions, length)
        ragged = cache.ragged or real_BT is not None
        windows = {self.settings.window_of(layer) for layer in range(self.settings.layers)}
        masks = {window: cached_mask(slots_BT, reach, ragged, window) for window in windows}
        x_BTD = self.embed(tokens_BT).to(self.stream_dtype)
        routers = []
        for layer, block in enumerate(self.blocks):
            mask = masks[self.settings.window_of(layer)]
            x_BTD, router = block(x_BTD, turn, mask, None, cache, slots_BT)
            if router is not None:
                routers.append(router)
        cache.advance(real_BT, T)
        return DecoderOutput(self.norm(x_BTD), tuple(routers))
