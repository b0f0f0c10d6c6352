"""Drafts by the modules that predict tokens further on (`resilin.modalities.mtp`): the model checks what they say.

Depth k reads the text up to k tokens before its end: what depth k - 1 made of a token, and the token k places on: the
text's own, or, for the last ones, one that the depths before proposed. So D modules propose D tokens for each pass of
the model, at the cost of D blocks (DeepSeek-V3, 2024, section 2.2, "MTP in Inference"). Each keeps keys and values of
its own; those of proposals are taken back, and read again once the text is known.

Shapes: T tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from resilin.inference.scoring import evaluating
from resilin.inference.speculative import Choose, SpeculationError
from resilin.modalities.model import GroupDecoder
from resilin.modalities.mtp import MtpModule
from resilin.models.cache import KVCache
from resilin.models.mask import cached_mask
from resilin.models.rope import rotation


class MtpDraft:
    """A `Draft` of `resilin.inference.speculative.Speculation` over `model.inner`.

    Args:
        model: trained with `model.mtp`.

    Raises:
        SpeculationError: it has no such modules.
    """

    def __init__(self, model: GroupDecoder) -> None:
        if not len(model.mtp):
            raise SpeculationError(
                "the model has no modules for the tokens after the next one: train with model.mtp = { depth = 1 }"
            )
        self._model = model
        self._modules: list[MtpModule] = list(model.mtp)  # type: ignore[arg-type]
        self._caches: list[KVCache] = []
        self._text: list[int] = []
        self._inputs: list[Tensor] = []  # of each depth, (T, D): what it has not read for good

    def begin(self, cache: KVCache) -> None:
        """A text begins."""
        decoder = self._model.inner
        own, dtype, device = (
            decoder.settings.at(decoder.settings.layers - 1),
            decoder.stream_dtype,
            cache.length_B.device,
        )
        self._caches = [
            KVCache(1, 1, own.key_heads, cache.capacity, own.head_width, dtype, device) for _ in self._modules
        ]
        self._text = []
        self._inputs = [torch.empty(0, own.hidden_size, dtype=dtype, device=device) for _ in self._modules]

    def heard(self, tokens: Sequence[int], hidden_TD: Tensor) -> None:
        """What the model made of the next tokens."""
        self._text += tokens
        self._inputs[0] = torch.cat([self._inputs[0], hidden_TD])

    def propose(self, pending: int, count: int, choose: Choose) -> tuple[list[int], list[Tensor]]:
        """As of `Draft`; a text of one token, of which the model has read nothing, is not gone on with."""
        read, known = len(self._text), [*self._text, pending]
        proposed: list[int] = []
        drawn_from: list[Tensor] = []
        if not read:
            return proposed, drawn_from
        passing = self._inputs[0][:0]  # what the depth before made of tokens too near the end to be read for good
        with evaluating(self._model):
            for depth, (module, cache) in enumerate(zip(self._modules[:count], self._caches, strict=False), 1):
                begin = cache.reach
                inputs_TD = torch.cat([self._inputs[depth - 1], passing])
                out_TD = self._read(module, inputs_TD, known[begin + depth : read + depth], cache)
                final = max(read - depth + 1, begin)
                cache.take_back(read - final)
                self._inputs[depth - 1] = self._inputs[depth - 1][final - begin :]
                if depth < len(self._modules):
                    self._inputs[depth] = torch.cat([self._inputs[depth], out_TD[: final - begin]])
                passing = out_TD[final - begin :]
                logits_1V = self._model.logits(module.norm(out_TD[-1:]))
                token, logits_1V = choose(logits_1V, depth - 1)
                known.append(token)
                proposed.append(token)
                drawn_from.append(logits_1V)
        return proposed, drawn_from

    def _read(self, module: MtpModule, inputs_TD: Tensor, tokens: list[int], cache: KVCache) -> Tensor:
        """(T, D): what a depth makes of its next tokens, which are now in its cache."""
        decoder, T = self._model.inner, len(tokens)
        slots_1T = cache.slots_of(None, T)
        reach = cache.reach + T
        window = decoder.settings.window_of(decoder.settings.layers - 1)
        token_TD = decoder.embed(torch.tensor(tokens, device=inputs_TD.device)).to(inputs_TD.dtype)
        turn = rotation(decoder.settings, slots_1T, reach)
        mask = cached_mask(slots_1T, reach, cache.ragged, window)
        out_1TD, _ = module.read(inputs_TD[None], token_TD[None], turn, mask, cache, slots_1T)
        cache.advance(None, T)
        return out_1TD[0]
