"""An expert in training beside a frozen anchor: two feed-forwards, both always computed, mixed by a router of two rows.

The expert learns to be of use beside the model that it will be joined with (FlexOlmo). What is frozen are
parameters of their own without a gradient: no optimizer, weight decay or stale momentum touches them.

Shapes: B batch, T tokens, D hidden size, L layers.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resilin.joined.errors import JoinError
from resilin.models.block import Block
from resilin.models.cut import BlockCut, CutError
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings, MoESettings
from resilin.models.linear import product
from resilin.models.mlp import MLP
from resilin.models.moe import MoE


def check_anchor(settings: DecoderSettings, what: str) -> None:
    """Refuse a decoder that experts cannot be put beside.

    Raises:
        JoinError: it has experts, or blocks of different sizes, or biases in its feed-forwards.
    """
    if settings.moe is not None:
        raise JoinError(f"{what}: has experts; an anchor is a dense decoder, whose feed-forwards become the first ones")
    if settings.sizes_differ:
        raise JoinError(f"{what}: its blocks have different sizes (layer_sizes); experts of one model are all alike")
    if settings.mlp_bias:
        raise JoinError(f"{what}: its feed-forwards have biases (mlp_bias), and experts have none")


def joined_settings(
    anchor: DecoderSettings, experts: int, top_k: int | None = None, *, offsets: bool = True
) -> DecoderSettings:
    """The settings of a mixture of an anchor's feed-forward and others of its size.

    Weights come from a softmax over all experts. Where a branch's input is normed those of the chosen ones are made to
    sum to 1; where its output is (OLMo 2), its scale does not matter, and they stay as they are.

    Args:
        anchor: of the dense decoder.
        experts: how many there are, the anchor's own among them.
        top_k: how many a token visits; None: all.
        offsets: whether experts have offsets on their logits.

    Raises:
        JoinError: the decoder cannot be an anchor, or fewer experts than `top_k`.
    """
    check_anchor(anchor, "the anchor")
    if top_k is not None and not 0 < top_k <= experts:
        raise JoinError(f"top_k is {top_k}, and there are {experts} experts: use 1 to {experts}")
    moe = MoESettings(
        experts=experts,
        experts_per_token=top_k or experts,
        expert_size=anchor.feed_forward_size,
        normalise_weights=anchor.norm_place == "before",
        router_bias=offsets,
    )
    return anchor.model_copy(update={"moe": moe})


def raw_of(offset: float) -> float:
    """The a of an offset -softplus(a) below 0."""
    return math.log(math.expm1(-offset))


class BesideAnchor(nn.Module):
    """The anchor's feed-forward and the expert's, each weighted by the router: p_0 anchor(x) + p_1 own(x).

    Attributes:
        anchor: frozen.
        own: the expert, at first a copy.
        anchor_row: (1, D), frozen.
        row: (1, D), the expert's row of the router.
        raw: (1,), a of its offset b = -softplus(a): always below 0, with a gradient everywhere (the published
            min(b, 0) has none where b is above 0); None: no offset.
    """

    def __init__(
        self, settings: DecoderSettings, anchor: MLP, rows_2D: Tensor, offset: float | None, *, moe: MoESettings
    ) -> None:
        """Args:
        settings: of the decoder.
        anchor: its feed-forward, which is used and not copied.
        rows_2D: of the anchor, and of the expert.
        offset: at the start, below 0; None: there is none.
        moe: of the mixture of these two.
        """
        super().__init__()
        self.decoder, self.settings = settings, moe
        weight = anchor.up.weight
        self.anchor = anchor.requires_grad_(False)
        self.own = MLP(settings, settings.feed_forward_size, weight.device).to(weight.dtype)
        if not weight.is_meta:
            self.own.load_state_dict(anchor.state_dict())
        rows_2D = rows_2D.detach().to(device=weight.device, dtype=weight.dtype)
        self.anchor_row = nn.Parameter(rows_2D[:1].clone(), requires_grad=False)
        self.row = nn.Parameter(rows_2D[1:].clone())
        self.raw: nn.Parameter | None = None
        if offset is not None:
            self.raw = nn.Parameter(torch.full((1,), raw_of(offset), device=weight.device, dtype=weight.dtype))

    def offsets(self) -> Tensor | None:
        """(2,): of the anchor, 0, and of the expert, below 0."""
        return None if self.raw is None else torch.cat([torch.zeros_like(self.raw), -F.softplus(self.raw)])

    def forward(self, x_BTD: Tensor, cut: BlockCut | None = None) -> tuple[Tensor, Tensor]:
        """(B, T, D) -> (B, T, D) and the router's logits (B, T, 2)."""
        if cut is not None:
            raise CutError("an expert in training is used whole: take it out of its run, and cut what it is joined to")
        logits_BT2 = product(x_BTD, torch.cat([self.anchor_row, self.row]), self.offsets())
        weights_BT2 = logits_BT2.to(torch.promote_types(logits_BT2.dtype, torch.float32)).softmax(-1).to(x_BTD.dtype)
        both = weights_BT2[..., :1] * self.anchor(x_BTD) + weights_BT2[..., 1:] * self.own(x_BTD)
        return both, logits_BT2

    @torch.no_grad()
    def plain_form(self) -> MoE:
        """The same as a mixture of two experts."""
        plain = MoE(self.decoder, self.settings, self.row.device).to(self.row.dtype)
        plain.router.weight.copy_(torch.cat([self.anchor_row, self.row]))
        offsets = self.offsets()
        if offsets is not None:
            plain.router.bias.copy_(offsets)
        for name in ("gate", "up", "down"):
            stack = getattr(plain.experts, name)
            if stack is not None:
                for number, mlp in enumerate((self.anchor, self.own)):
                    stack[number] = getattr(mlp, name).weight
        return plain


def beside_anchor(model: Decoder, anchor_rows_LD: Tensor, rows_LD: Tensor, offset: float | None = -0.1) -> Decoder:
    """A dense decoder with an expert beside each of its feed-forwards; it computes what the decoder computed.

    All that is trained are the expert, its row and its offset.

    Args:
        model: changed in place: its blocks get experts, its settings say so.
        anchor_rows_LD: of the router, for the anchor, in each layer.
        rows_LD: the same for the expert, from which it starts.
        offset: of the expert at the start, below 0; None: experts have no offsets.

    Raises:
        JoinError: the decoder has experts already, or rows of another shape.
    """
    settings = model.settings
    check_anchor(settings, "the anchor")
    shape = (settings.layers, settings.hidden_size)
    for what, rows in (("the anchor's rows", anchor_rows_LD), ("the expert's rows", rows_LD)):
        if tuple(rows.shape) != shape:
            raise JoinError(f"{what} have shape {tuple(rows.shape)}; the model's layers and width are {shape}")
    if offset is not None and offset >= 0:
        raise JoinError(f"the offset at the start is {offset}: an expert's offset is below 0; use -0.1, or none")
    model.requires_grad_(False)
    model.settings = joined_settings(settings, 2, offsets=offset is not None)
    assert model.settings.moe is not None
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        rows_2D = torch.stack([anchor_rows_LD[layer], rows_LD[layer]])
        mixed = BesideAnchor(settings, block.mlp, rows_2D, offset, moe=model.settings.moe)
        del block.mlp
        block.moe = mixed  # type: ignore[assignment]  # in the mixture's place, with its results
        block.has_experts = True
    return model
