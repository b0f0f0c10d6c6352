"""One block of a decoder: attention and a feed-forward, or experts, each beside the residual stream.

Shapes: B batch, T tokens, D hidden size, E experts.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial

import torch
from torch import Tensor, nn

from resilin.keys import Keys, drop
from resilin.models import uncompiled
from resilin.models.attention import Attention
from resilin.models.cache import KVCache
from resilin.models.chain_modules import chain_kept
from resilin.models.cut import BlockCut
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.linear import Linear
from resilin.models.loop import Modulated, modulated
from resilin.models.mask import Mask
from resilin.models.mlp import MLP
from resilin.models.moe import MoE
from resilin.models.norm import stream_norm
from resilin.models.rope import Rotation
from resilin.models.tiled import in_tiles


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`, or the branches' outputs normed; of a looped decoder see
    `resilin.models.loop`.
    """

    def __init__(self, settings: DecoderSettings, layer: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        settings = settings.at(layer)
        self.layer = layer
        self.dropout = settings.dropout
        self.norms_after = settings.norm_place == "after"
        self.attention_norm = stream_norm(settings, device, scaled=not settings.told)
        self.attention = Attention(settings, layer, device)
        self.mlp_norm = stream_norm(settings, device, scaled=not settings.told)
        if settings.moe is not None and settings.is_moe_layer(layer):
            self.moe = MoE(settings, settings.moe, device)
        else:
            self.mlp = MLP(settings, settings.feed_forward_size, device)
        self.has_experts = settings.is_moe_layer(layer)
        self.tiles = settings.mlp_tiles
        self.widths = settings.widths.hidden
        if settings.told:
            self.modulation = Linear(settings.hidden_size, 4 * settings.hidden_size, device=device)

    def _feed_forward(self, x: Tensor, cut: BlockCut | None = None, *, is_normed: bool = False) -> tuple[Tensor, ...]:
        """(..., D), each token by itself -> the branch's output (..., D) and, with experts, the router's logits."""
        how = () if cut is None else (cut,)
        normed = x if is_normed or self.norms_after else self._normed(self.mlp_norm, x, cut, "mlp_norm.weight")
        hidden, *router = self.moe(normed, *how) if self.has_experts else (self.mlp(normed, *how),)
        if self.norms_after:
            hidden = self._normed(self.mlp_norm, hidden, cut, "mlp_norm.weight")
        return hidden, *router

    @staticmethod
    def _normed(norm: nn.Module, x: Tensor, cut: BlockCut | None, name: str) -> Tensor:
        found: Tensor = norm(x) if cut is None else cut.norm(x, norm, name)
        return found

    def forward(
        self,
        x_BTD: Tensor,
        turn: Rotation,
        mask: Mask,
        keys: Keys | None = None,
        cache: KVCache | None = None,
        slots_BT: Tensor | None = None,
        cut: BlockCut | None = None,
        told_D: Tensor | None = None,
        told_as: tuple[Hashable, ...] = (),
    ) -> tuple[Tensor, Tensor | None]:
        """The residual stream after this block, and the router's logits where the block has experts.

        With a cut, of that part of the block; it is an argument so that a block that is computed again is cut again.
        In a looped decoder `told_D` is what the block is told of the loop; with a cache, what it makes of that is kept
        there under `told_as`.
        """
        if told_D is not None:
            make = partial(modulated, self.modulation, told_D, cut)
            loop = make() if cache is None else cache.once((*told_as, self.layer), make)
            return self._told(x_BTD, turn, mask, keys, cache, slots_BT, cut, loop)
        normed = x_BTD if self.norms_after else self._normed(self.attention_norm, x_BTD, cut, "attention_norm.weight")
        how = (cut,) if cut is not None and cut.in_attention else ()
        mixed = self.attention(normed, turn, mask, cache, slots_BT, *how)
        if self.norms_after:
            mixed = self._normed(self.attention_norm, mixed, cut, "attention_norm.weight")
        x_BTD = x_BTD + self._dropped(mixed, keys, "attention")
        if self.tiles == 1:
            hidden, *router = self._feed_forward(x_BTD, cut)
        else:
            modules = (self.mlp_norm, self.moe if self.has_experts else self.mlp)
            hidden, *router = in_tiles(modules, partial(self._feed_forward, cut=cut), x_BTD, self.tiles)
        return x_BTD + self._dropped(hidden, keys, "mlp"), router[0] if router else None

    def _told(
        self,
        x_BTD: Tensor,
        turn: Rotation,
        mask: Mask,
        keys: Keys | None,
        cache: KVCache | None,
        slots_BT: Tensor | None,
        cut: BlockCut | None,
        loop: Modulated,
    ) -> tuple[Tensor, Tensor | None]:
        """As `forward`, with norms and branches scaled as the block was told."""
        normed = self.attention_norm(x_BTD, loop.attention_scale)
        mixed = self.attention(normed, turn, mask, cache, slots_BT, *(() if cut is None else (cut,)))
        x_BTD = x_BTD + loop.attention_gate * self._dropped(mixed, keys, "attention")
        normed = self.mlp_norm(x_BTD, loop.mlp_scale)
        branch = partial(self._feed_forward, cut=cut, is_normed=True)
        if self.tiles == 1:
            hidden, *router = branch(normed)
        else:
            hidden, *router = in_tiles((self.moe if self.has_experts else self.mlp,), branch, normed, self.tiles)
        return x_BTD + loop.mlp_gate * self._dropped(hidden, keys, "mlp"), router[0] if router else None

    def _dropped(self, x_BTD: Tensor, keys: Keys | None, branch: str) -> Tensor:
        if keys is None or not self.dropout:
            return x_BTD
        # Drawn outside compiled code, which would be another one for each layer and step.
        return drop(x_BTD, self.dropout, uncompiled.outside(self._kept, x_BTD, keys, branch))

    def _kept(self, x_BTD: Tensor, keys: Keys, branch: str) -> Tensor:
        own = keys.fold(self.layer).fold(branch)
        # A stream of chains is dropped chain by chain; any other, of whatever width, at once.
        sizes = self.widths if len(self.widths) > 1 else (x_BTD.shape[-1],)
        return chain_kept(x_BTD, self.dropout, own, sizes)
