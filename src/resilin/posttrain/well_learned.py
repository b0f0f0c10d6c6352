"""Answers a policy need not learn again: those it is sure of, to prompts that it answers well.

Positive answers that are already well learned pull a policy's entropy down further. With acc the share of a prompt's
answers that are right, an answer is well learned if its entropy < eta and acc > tau; its part of the loss is then
multiplied by 1 - cut (WPSM, ERNIE 5.0, section 5).

Shapes: R answers, T positions, N answer tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from resilin.config import Settings
from resilin.models.decoder import Decoder
from resilin.posttrain.sequences import label_states, sums_of_rows

_POSITIONS = 4096  # of rows that go through the model together
_ROWS = 512  # tokens whose logits exist at once


class WellLearned(Settings):
    """What counts less, and how much less."""

    entropy: float = Field(default=0.1, ge=0)
    """eta: an answer's tokens have less entropy than this in the mean, in nats."""
    success: float = Field(default=0.75, ge=0, lt=1)
    """tau: more than this share of the answers to its prompt is right (the verifiers' number is above 0)."""
    cut: float = Field(default=1.0, ge=0, le=1)
    """What is taken from its weight in the loss; 1: all of it."""

    def found(self, entropy_R: Tensor, verified_R: Tensor, group: int) -> Tensor:
        """(R,) bool: which answers are well learned.

        Args:
            entropy_R: mean of each answer's tokens, in nats.
            verified_R: what verifiers said.
            group: answers to a prompt, which lie one behind another.
        """
        right_P = (verified_R > 0).double().view(-1, group).mean(1)
        return (entropy_R < self.entropy) & (right_P > self.success).repeat_interleave(group)


@torch.no_grad()
def answer_entropies(model: Decoder, tokens_RT: Tensor, labels_RT: Tensor, temperature: float = 1.0) -> Tensor:
    """(R,) float64: the mean entropy, in nats, of the distributions that each answer's tokens were drawn from.

    Args:
        model: the policy.
        tokens_RT: ids, right-padded.
        labels_RT: -100 where no token of an answer follows.
        temperature: of the distributions.
    """
    found, rows = [], max(1, _POSITIONS // tokens_RT.shape[1])
    for at in range(0, len(tokens_RT), rows):
        states = label_states(model, tokens_RT[at : at + rows], labels_RT[at : at + rows], None, temperature)
        assert states.head is not None
        parts = []
        for piece_CD in states.states_ND.split(_ROWS):
            logp_CV = states.head.logits(piece_CD).log_softmax(-1)
            parts.append(-(logp_CV.exp() * logp_CV).sum(-1).double())
        entropy_N = torch.cat(parts) if parts else tokens_RT.new_zeros(0, dtype=torch.float64)
        counts_R = torch.tensor(states.counts, dtype=torch.float64, device=entropy_N.device).clamp(min=1)
        found.append(sums_of_rows(entropy_N, states.counts) / counts_R)
    return torch.cat(found)
