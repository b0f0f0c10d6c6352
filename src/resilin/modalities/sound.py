"""Sound in a decoder: levels of a residual quantiser, summed on the way in, predicted one after another on the way up.

A frame goes in as the sum of its levels' embeddings. The next frame's levels are predicted by heads on the top layers:
with L layers and Q levels, level q behind layer L - Q + q. Once level q is known (in training the true one, in sampling
the drawn one), its embedding is added to the hidden state that goes into the next layer, which predicts level q + 1
(next-codec prediction, ERNIE 5.0, section 3.3). A frame thus takes one position and one pass, whatever Q is.

Shapes: B rows, T positions, D hidden size, Q levels, K codes, N positions of sound, A positions that are asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from pydantic import Field
from torch import Tensor, nn

from resilin.config import Settings
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.linear import Embedding, Linear
from resilin.models.norm import stream_norm


class SoundPartSettings(Settings):
    """How sound goes in and out."""

    levels: int = Field(ge=1)
    """Levels of the residual quantiser, Q."""
    codes: int = Field(ge=2)
    """Codes of each level, K."""


@dataclass(eq=False)
class SoundSteps:
    """What is predicted of sound.

    Attributes:
        index_A: int64, which of the B * T positions predict a frame.
        next_AQ: int64, the codes of that frame; -1: they are drawn.
        draw: (level, logits (N, K) of positions whose codes are drawn) -> codes (N,); for sampling.
        logits: of the levels so far, (A, K) each; filled on the way up.
        drawn: codes of the levels so far, (N,) each, where they are drawn.
    """

    index_A: Tensor
    next_AQ: Tensor
    draw: Callable[[int, Tensor], Tensor] | None = None
    logits: list[Tensor] = field(default_factory=list)
    drawn: list[Tensor] = field(default_factory=list)

    def codes(self, level: int) -> Tensor:
        """(A,) int64: the codes of the level whose logits came last."""
        codes_A = self.next_AQ[:, level]
        if self.draw is None:
            return codes_A
        unknown_A = codes_A < 0
        self.drawn.append(self.draw(level, self.logits[level][unknown_A]))
        return codes_A.masked_scatter(unknown_A, self.drawn[-1])


class SoundPart(nn.Module):
    """Embeddings of codes, and a head for each level."""

    def __init__(self, settings: SoundPartSettings, decoder: DecoderSettings) -> None:
        super().__init__()
        self.levels, self.codes = settings.levels, settings.codes
        width = decoder.hidden_size
        self.embed = nn.ModuleList(Embedding(settings.codes, width) for _ in range(settings.levels))
        self.begin = Embedding(1, width)
        self.norms = nn.ModuleList(stream_norm(decoder, None) for _ in range(settings.levels))
        self.heads = nn.ModuleList(Linear(width, settings.codes, bias=False) for _ in range(settings.levels))

    def embedded(self, codes_NQ: Tensor) -> Tensor:
        """(N, D): the sum over levels; of a position without codes (-1), which begins a sound, an embedding of its own.

        Args:
            codes_NQ: int64.
        """
        begins_N1 = codes_NQ[:, :1] < 0
        known_NQ = codes_NQ.clamp(min=0)
        total_ND = sum((table(known_NQ[:, level]) for level, table in enumerate(self.embed)), torch.zeros(()))
        begin_D = self.begin.weight[0]
        found: Tensor = torch.where(begins_N1, begin_D, total_ND)
        return found

    def predicting(self, steps: SoundSteps, layers: int) -> Callable[[int, Tensor], Tensor]:
        """What happens behind each of a decoder's `layers` blocks; see `resilin.models.given.Given`."""
        first = layers - self.levels

        def after_block(layer: int, x_BTD: Tensor) -> Tensor:
            level = layer - first
            if level < 0:
                return x_BTD
            flat_ND = x_BTD.flatten(0, 1)
            state_AD = self.norms[level](flat_ND.index_select(0, steps.index_A))
            logits_AK: Tensor = self.heads[level](state_AD)
            steps.logits.append(logits_AK.to(torch.promote_types(logits_AK.dtype, torch.float32)))
            codes_A = steps.codes(level)
            if level == self.levels - 1:
                return x_BTD
            told_AD = self.embed[level](codes_A).to(x_BTD.dtype)
            return flat_ND.index_add(0, steps.index_A, told_AD).view(x_BTD.shape)

        return after_block
