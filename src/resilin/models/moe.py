"""Mixture-of-experts feed-forward that drops no token.

Shapes: B batch, T tokens, D hidden size, N = B * T, E experts, k experts per token, F expert size, R = N * k
rows sorted by expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType

import torch
from torch import Tensor, nn

from resilin.models import uncompiled
from resilin.models.balance import counted
from resilin.models.cut import BlockCut, CutError
from resilin.models.decoder_settings import DecoderSettings, MoESettings
from resilin.models.expert_products import mix_experts, takes
from resilin.models.grouped import Groups, gather, group_choices, grouped_linear, spread
from resilin.models.linear import Linear
from resilin.models.mlp import MLP, activate


def affinities(logits_NE: Tensor, moe: MoESettings) -> Tensor:
    """(N, E) in float32 or better: what experts are chosen by, before any offset, and weighted with."""
    logits_NE = logits_NE.to(torch.promote_types(logits_NE.dtype, torch.float32))
    if moe.routing == "topk_softmax":
        return logits_NE
    return torch.sigmoid(logits_NE) if moe.routing == "sigmoid_topk" else logits_NE.softmax(-1)


def route(
    logits_NE: Tensor, moe: MoESettings, experts_per_token: int | None = None, offsets_E: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The chosen experts and their weights.

    Args:
        logits_NE: of the router, of the experts that may be chosen.
        moe: how they become choices.
        experts_per_token: k, where it is not that of `moe`.
        offsets_E: added to the affinities that experts are chosen by, not to those they are weighted with.

    Returns:
        (N, k) weights in float32 or better, and (N, k) expert numbers, by falling affinity (with offsets: falling
        affinity and offset), so that a smaller k takes the first of a larger one.
    """
    affinity_NE = affinities(logits_NE, moe)
    count = experts_per_token or moe.experts_per_token
    if offsets_E is None:
        weights_Nk, chosen_Nk = affinity_NE.topk(count, dim=-1)
    else:
        chosen_Nk = (affinity_NE.detach() + offsets_E.detach()).topk(count, dim=-1).indices
        weights_Nk = affinity_NE.gather(-1, chosen_Nk)
    if moe.routing == "topk_softmax":
        return weights_Nk.softmax(-1), chosen_Nk
    if moe.normalise_weights:
        weights_Nk = weights_Nk / weights_Nk.sum(-1, keepdim=True)
    return weights_Nk, chosen_Nk


Dispatch = Callable[[Callable[[Tensor, Tensor | None, Tensor], Tensor], Tensor, Tensor | None, Tensor], Tensor]
"""`dispatch(local, x_ND, weights_Nk, chosen_Nk)`: the same as `local(...)`, where experts lie in several places."""


def _here(mix: Callable[..., Tensor], x_ND: Tensor, weights_Nk: Tensor | None, chosen_Nk: Tensor) -> Tensor:
    return mix(x_ND, weights_Nk, chosen_Nk)


Matrices = tuple[Tensor | None, Tensor, Tensor]
"""Gate (E, F, D) or None, up (E, F, D) and down (E, D, F)."""


class Experts(nn.Module):
    """E feed-forwards without biases, their matrices stacked: `gate`, `up` (E, F, D) and `down` (E, D, F).

    Attributes:
        dispatch: where only some of the experts are here: brings rows to whoever has them, and back.
        lend: where the matrices are not kept here: `lend(experts)` gives those of some, in order, for a while.
    """

    dispatch: Dispatch | None = None
    lend: Callable[[list[int]], AbstractContextManager[Matrices]] | None = None

    def __init__(self, settings: DecoderSettings, moe: MoESettings, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.activation = settings.activation
        wide = (moe.experts, moe.expert_size, settings.hidden_size)
        self.gate: nn.Parameter | None = None
        if settings.gated:
            self.gate = nn.Parameter(torch.empty(wide, device=device))
        self.up = nn.Parameter(torch.empty(wide, device=device))
        self.down = nn.Parameter(torch.empty(wide[0], wide[2], wide[1], device=device))

    def forward(
        self, x_ND: Tensor, weights_Nk: Tensor | None, chosen_Nk: Tensor, cut: BlockCut | None = None
    ) -> Tensor:
        """(N, D) -> (N, D): what the chosen experts make of each token, weighted and summed.

        Args:
            x_ND: tokens.
            weights_Nk: of the choices; None: each token has one, which counts as it is.
            chosen_Nk: numbers of experts, below E.
            cut: what of each expert is computed; None: all.
        """
        if cut is not None and "moe.experts.up" in cut.regions:
            if self.dispatch is not None or self.lend is not None:
                raise CutError("experts that lie in several places can be chosen from, but not made narrower")
            gate, up, down = (
                cut.stack(stack, f"moe.experts.{name}")
                for name, stack in (("gate", self.gate), ("up", self.up), ("down", self.down))
            )
            assert up is not None
            assert down is not None
            part: Tensor = uncompiled.outside(mix, x_ND, weights_Nk, chosen_Nk, (gate, up, down), self.activation)
            return part
        if x_ND.is_cuda and self.dispatch is None and self.lend is None:
            return self._mix(x_ND, weights_Nk, chosen_Nk)
        # How many rows an expert has is known when they come: no code is compiled for each number.
        mixed_ND: Tensor = uncompiled.outside(self.dispatch or _here, self._mix, x_ND, weights_Nk, chosen_Nk)
        return mixed_ND

    def _mix(self, x_ND: Tensor, weights_Nk: Tensor | None, chosen_Nk: Tensor) -> Tensor:
        if self.lend is None:
            return mix(x_ND, weights_Nk, chosen_Nk, (self.gate, self.up, self.down), self.activation)
        used_A = chosen_Nk.unique()
        with self.lend(used_A.tolist()) as matrices:
            return mix(x_ND, weights_Nk, torch.searchsorted(used_A, chosen_Nk), matrices, self.activation)


def mix(x_ND: Tensor, weights_Nk: Tensor | None, chosen_Nk: Tensor, matrices: Matrices, activation: str) -> Tensor:
    """(N, D) -> (N, D): what the chosen experts make of each token, weighted and summed."""
    groups = group_choices(chosen_Nk, len(matrices[1]))

    def written(x_ND: Tensor, weights_Nk: Tensor | None, gate: Tensor | None, up: Tensor, down: Tensor) -> Tensor:
        mixed_RD = feed_forward(spread(x_ND, groups), gate, up, down, groups, activation)
        by_token_NkD = gather(mixed_RD, groups, chosen_Nk.shape[1])
        if weights_Nk is None:
            return by_token_NkD.squeeze(1)
        return (weights_Nk[:, None].to(by_token_NkD.dtype) @ by_token_NkD).squeeze(1)

    if takes(x_ND):
        return mix_experts(x_ND, weights_Nk, matrices, groups, activation, written)
    return written(x_ND, weights_Nk, *matrices)


def feed_forward(
    x_RD: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, groups: Groups, activation: str
) -> Tensor:
    """Rows sorted by expert, (R, D) -> (R, D)."""
    up_RF = grouped_linear(x_RD, up, groups)
    if gate is None:
        hidden_RF = activate(up_RF, activation)
    else:
        hidden_RF = activate(grouped_linear(x_RD, gate, groups), activation) * up_RF
    return grouped_linear(hidden_RF, down, groups)


class MoE(nn.Module):
    """Router, experts, and optionally an expert that all tokens share (Qwen2-MoE, DeepSeekMoE).

    Attributes:
        moved_by_sign: parameters that each step moves by the sign of their gradient alone, and how far
            (`resilin.optim.sign`).
    """

    moved_by_sign: Mapping[str, float] = MappingProxyType({})

    def __init__(self, settings: DecoderSettings, moe: MoESettings, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.settings = moe
        self.router = Linear(settings.hidden_size, moe.experts, bias=moe.router_bias, device=device)
        if moe.balance == "bias":
            self.balance_bias = nn.Parameter(torch.empty(moe.experts, device=device))
            self.moved_by_sign = {"balance_bias": moe.balance_rate}
        self.experts = Experts(settings, moe, device)
        self.shared = MLP(settings, moe.shared_size, device) if moe.shared_size else None
        self.shared_gate = Linear(settings.hidden_size, 1, bias=False, device=device) if moe.shared_gate else None

    def forward(self, x_BTD: Tensor, cut: BlockCut | None = None) -> tuple[Tensor, Tensor]:
        """(B, T, D) -> (B, T, D) and the router's logits (B, T, E): of the experts that may be chosen."""
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        if cut is None:
            router_NE = self.router(x_ND)
            weights_Nk, chosen_Nk = self._route(router_NE)
            out_ND = self.experts(x_ND, weights_Nk, chosen_Nk)
        else:
            router_NE = cut.gathered(x_ND, self.router, "moe.router")
            weights_Nk, chosen_Nk = self._route(router_NE, cut)
            if cut.experts is not None and cut.experts[-1] >= len(cut.experts):  # not the first ones
                chosen_Nk = torch.tensor(cut.experts, device=chosen_Nk.device)[chosen_Nk]
            out_ND = self.experts(x_ND, weights_Nk, chosen_Nk, cut)
        if self.shared is not None:
            shared_ND = self.shared(x_ND, cut, "moe.shared")
            if self.shared_gate is not None:
                gate = self.shared_gate
                gate_N1 = gate(x_ND) if cut is None else cut.linear(x_ND, gate, "moe.shared_gate")
                shared_ND = torch.sigmoid(gate_N1) * shared_ND
            out_ND = out_ND + shared_ND
        return out_ND.view(x_BTD.shape), router_NE.view(*x_BTD.shape[:-1], router_NE.shape[1])

    def _route(self, router_NE: Tensor, cut: BlockCut | None = None) -> tuple[Tensor, Tensor]:
        """Weights and choices among the experts that there are logits of."""
        count = None if cut is None else cut.experts_per_token
        if self.settings.balance == "none":
            return route(router_NE, self.settings, count)
        offsets_E = self.balance_bias if cut is None else cut.vector(self.balance_bias, "moe.balance_bias")
        weights_Nk, chosen_Nk = route(router_NE, self.settings, count, offsets_E)
        return counted(weights_Nk, chosen_Nk, offsets_E), chosen_Nk
