"""Measuring a model from inside while it trains, without changing a number of it.

An objective transform: on every n-th step it hangs forward hooks on the model, looks at what passes, and adds what it
saw to the loss's logs, where it is merged over micro-batches and workers like any other. The step loop knows nothing.

    [objective]
    use = "resilin.evaluate.probes:Probed"
    every = 25
    objective = { z_loss = 1e-4 }

Logged, per block i (Wortsman et al., 2023, sections 3.1 and 3.3):
    probe/attention_logit_max/i   max |q.k| / sqrt(head size) over all pairs, before masking, in float32
    probe/attention_entropy/i     mean entropy of the attention weights, nats
    probe/output_rms/i            root mean square of the block's output
and of the output logits:
    probe/log_z, probe/log_z_max  mean and largest log of the softmax's denominator
    probe/logit_min               the smallest logit

Shapes: B batch, T queries, S keys, H query heads, K key heads, D head size, V vocabulary.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Annotated, Any, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from resilin.config import component
from resilin.keys import Keys
from resilin.models.attention_core import AttentionCore
from resilin.models.block import Block
from resilin.models.decoder import Decoder, DecoderOutput
from resilin.models.mask import Mask
from resilin.nouns import Batch, Log, Loss, Max, Mean, Objective
from resilin.objective.settings import ObjectiveContext, ObjectiveSettings
from resilin.transforms import ObjectiveTransform

_CHUNK = 1 << 22
"""Logits held at once, so that looking needs little memory beside the model."""


def _visible(mask: Mask, batch: int, tokens: int, keys: int, device: torch.device) -> Tensor | None:
    """Which keys each query sees, (1 or B, T, S); None: all."""
    if mask.block is not None:
        from torch.nn.attention.flex_attention import create_mask

        seen_BHTS: Tensor = create_mask(mask.block.mask_mod, batch, 1, tokens, keys, device=str(device))
        return seen_BHTS[:, 0]
    if mask.causal:
        return torch.ones(1, tokens, keys, dtype=torch.bool, device=device).tril()
    return mask.dense(batch, tokens)


@torch.no_grad()
def attention_measures(
    q_BHTD: Tensor, k_BKSD: Tensor, mask: Mask, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor, int]:
    """What one attention does with its queries and keys, computed in float32.

    Args:
        q_BHTD: queries as the attention receives them: normed and rotated.
        k_BKSD: keys, likewise.
        mask: which keys a query may see; counts for the entropy only.
        scale: the attention's own factor of q.k; counts for the entropy only.
        softcap: c of its c * tanh(logit / c), where it has one; counts for the entropy only.

    Returns:
        max |q.k| / sqrt(D) over all pairs; the sum of the entropies of all queries and heads; how many there are.
    """
    B, H, T, D = q_BHTD.shape
    S = k_BKSD.shape[2]
    largest, entropy = q_BHTD.new_zeros((), dtype=torch.float32), q_BHTD.new_zeros((), dtype=torch.float64)
    rows = max(1, _CHUNK // (H * T * S))
    group = H // k_BKSD.shape[1]
    seen = _visible(mask, B, T, S, q_BHTD.device)
    for start in range(0, B, rows):
        k_bHSD = k_BKSD[start : start + rows].float().repeat_interleave(group, dim=1)
        products_bHTS = q_BHTD[start : start + rows].float() @ k_bHSD.transpose(-1, -2)
        largest = torch.maximum(largest, products_bHTS.abs().max() * D**-0.5)
        logits_bHTS = products_bHTS * scale
        if softcap is not None:
            logits_bHTS = softcap * torch.tanh(logits_bHTS / softcap)
        if seen is not None:
            mine = seen if len(seen) == 1 else seen[start : start + rows]
            logits_bHTS = logits_bHTS.masked_fill(~mine[:, None], -torch.inf)
        weights_bHTS = logits_bHTS.softmax(-1)
        entropy = entropy + torch.special.entr(weights_bHTS).sum(dtype=torch.float64)
    return largest, entropy, B * H * T


@torch.no_grad()
def logit_measures(model: Decoder, hidden_BTD: Tensor, valid_BT: Tensor) -> dict[str, Log]:
    """Log-denominator (mean, max) and smallest logit of the valid positions, in float32."""
    hidden_ND = hidden_BTD[valid_BT]
    total = hidden_ND.new_zeros((), dtype=torch.float64)
    highest = hidden_ND.new_full((), -torch.inf, dtype=torch.float32)
    smallest = hidden_ND.new_full((), torch.inf, dtype=torch.float32)
    for chunk_nD in hidden_ND.split(max(1, _CHUNK // model.settings.vocab_size)):
        logits_nV = model.logits(chunk_nD)
        log_z_n = logits_nV.logsumexp(-1)
        total = total + log_z_n.sum(dtype=torch.float64)
        highest, smallest = torch.maximum(highest, log_z_n.max()), torch.minimum(smallest, logits_nV.min())
    count = valid_BT.sum()
    return {
        "probe/log_z": Mean(total, count),
        "probe/log_z_max": Max(highest),
        # A smallest value merges as the largest of its opposite, so it is logged negated.
        "probe/logit_min_negated": Max(-smallest),
    }


class _Look:
    """Hooks on one forward pass of a decoder, and what they saw."""

    def __init__(self, model: Decoder, valid_BT: Tensor):
        self.model = model
        self.valid_BT = valid_BT
        self.logs: dict[str, Log] = {}
        self._handles = ExitStack()

    def __enter__(self) -> _Look:
        block = 0
        for module in self.model.modules():
            if isinstance(module, Block):
                self._handles.callback(module.register_forward_hook(self._block_hook(module.layer)).remove)
                block = module.layer
            elif isinstance(module, AttentionCore):
                self._handles.callback(module.register_forward_pre_hook(self._attention_hook(block)).remove)
        self._handles.callback(self.model.register_forward_hook(self._model_hook).remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._handles.close()

    def _attention_hook(self, layer: int) -> Any:
        def hook(core: nn.Module, inputs: tuple[Any, ...]) -> None:
            q_BHTD, k_BKSD, _, mask = inputs
            own = cast(AttentionCore, core)
            largest, entropy, count = attention_measures(q_BHTD.detach(), k_BKSD.detach(), mask, own.scale, own.softcap)
            self.logs[f"probe/attention_logit_max/{layer}"] = Max(largest)
            self.logs[f"probe/attention_entropy/{layer}"] = Mean(entropy, torch.tensor(count, device=entropy.device))

        return hook

    def _block_hook(self, layer: int) -> Any:
        def hook(block: nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
            out_BTD = output[0].detach().float()
            squares = out_BTD.square().sum(dtype=torch.float64)
            # The mean square adds up over micro-batches; its root is taken by whoever reads the log.
            self.logs[f"probe/output_mean_square/{layer}"] = Mean(squares, torch.tensor(out_BTD.numel()))

        return hook

    def _model_hook(self, model: nn.Module, inputs: tuple[Any, ...], output: DecoderOutput) -> None:
        self.logs |= logit_measures(self.model, output.hidden_BTD.detach(), self.valid_BT)


class ProbedObjective(ObjectiveTransform):
    """An objective that also says what happens inside the model, on every n-th step."""

    def __init__(self, inner: Objective, every: int):
        super().__init__(inner)
        self.every = every

    def __call__(self, model: nn.Module, batch: Batch, keys: Keys | None) -> Loss:
        """The inner objective's loss, with the probes' logs beside its own; evaluation (no keys) is not probed."""
        if keys is None or keys.step % self.every:
            return self.inner(model, batch, keys)
        # Compiled models keep the original beside them: hooks belong on that.
        decoder = getattr(model, "_orig_mod", model)
        if not isinstance(decoder, Decoder):
            raise TypeError(f"probes look inside a resilin Decoder; the model is a {type(decoder).__name__}")
        with _Look(decoder, batch["labels"] != -100) as look:
            loss = self.inner(model, batch, keys)
        return Loss(loss.sum, loss.units, {**loss.logs, **look.logs})


class Probed(ObjectiveSettings):
    """Measure attention logits, entropies, block outputs and output logits while training on an objective."""

    every: int = Field(default=25, ge=1)
    """Steps between measurements; the first step is measured."""
    objective: Annotated[ObjectiveSettings, component("resilin.objective.next_token:NextToken")] = Field(
        default_factory=dict, validate_default=True
    )
    """What is trained on."""

    def build(self, context: ObjectiveContext | None = None) -> ProbedObjective:
        """The objective with hooks on every n-th step."""
        return ProbedObjective(self.objective.build(context), self.every)
