"""Modules for tokens further on as a draft: the model's own text, and the proposals of a reading of whole rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from resilin.inference.generate import StopRule, generate
from resilin.inference.sampling import Sampling
from resilin.inference.speculative import Speculation, SpeculationError
from resilin.keys import Keys
from resilin.modalities.model import GroupDecoder, GroupDecoderSettings
from resilin.modalities.mtp import MtpSettings
from resilin.modalities.mtp_draft import MtpDraft
from resilin.modalities.objective import NextGroup
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.settings import ModelContext
from resilin.nouns import Batch

V = 11
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped keys, a window": {"heads": 4, "kv_heads": 2, "sliding_window": 3},
    "experts": {"moe": {"experts": 4, "expert_size": 8}},
    "tied, normed heads": {"tie_embeddings": True, "qk_norm": "rms"},
}


def model_of(depth: int, vocab_size: int = V, **changes: Any) -> GroupDecoder:
    tree = {"vocab_size": vocab_size, "hidden_size": 16, "layers": 2, "heads": 2, "init_std": 0.3, "max_positions": 64}
    settings = GroupDecoderSettings(decoder=DecoderSettings(**{**tree, **changes}), mtp=MtpSettings(depth=depth))
    return settings.build(ModelContext(0, None)).double().eval()


class Watched(MtpDraft):
    """Compares each round's proposals with what the modules make of the whole text at once."""

    def __init__(self, model: GroupDecoder) -> None:
        super().__init__(model)
        self.rounds = 0

    def propose(self, pending: int, count: int, choose: Any) -> tuple[list[int], list[Tensor]]:
        text = [*self._text, pending]
        tokens, drawn_from = super().propose(pending, count, choose)
        if tokens:
            self.rounds += 1
            row = torch.tensor([[*text, *tokens]])
            read = len(text) - 1
            with torch.no_grad():
                # Of the text without its last token, as the model had read it; then each depth's token k places on.
                hidden_BTD = self._model(row[:, :read]).hidden_BTD
                ahead = [
                    (row[:, depth : depth + read], torch.ones(1, read, dtype=torch.bool))
                    for depth in range(1, len(tokens) + 1)
                ]
                kept, self._model.mtp = self._model.mtp, self._model.mtp[: len(tokens)]
                states, _ = self._model.further(hidden_BTD, ahead, None, None, None, None)
                self._model.mtp = kept
            for state_BTD, logits_1V in zip(states, drawn_from, strict=True):
                expected = self._model.logits(state_BTD[0, -1:])
                torch.testing.assert_close(logits_1V, expected, rtol=1e-9, atol=1e-9)
        return tokens, drawn_from


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_the_text_is_the_models_and_drafts_are_those_of_whole_rows(kind: str, depth: int, ahead: int) -> None:
    model = model_of(depth, **KINDS[kind])
    for prompt in ([3, 1, 4, 1, 5], [2]):
        (expected,) = generate(model.inner, [prompt], StopRule(20, frozenset(), ()))
        draft = Watched(model)
        one = Speculation(model.inner, prompt, draft, 20, ahead)
        assert list(one) == expected.tokens
        assert one.drafts.accepted + one.drafts.rounds == 20
        assert draft.rounds >= one.drafts.rounds - 2  # all but the last token, and a first one with nothing read
        assert one.drafts.proposed <= one.drafts.rounds * min(depth, ahead)


@pytest.mark.slow
def test_sampled_texts_have_the_models_distribution() -> None:
    model, prompt, temperature, count = model_of(1, vocab_size=5, init_std=0.6), [1, 2], 0.9, 500

    def logits(ids: list[int]) -> Tensor:
        with torch.no_grad():
            return model.logits(model(torch.tensor([ids])).hidden_BTD[0, -1])

    first = (logits(prompt) / temperature).softmax(-1)
    expected = torch.stack([first[a] * (logits([*prompt, a]) / temperature).softmax(-1) for a in range(5)]).flatten()
    counts, kept = torch.zeros(25), 0
    for seed in range(count):
        one = Speculation(
            model.inner, prompt, MtpDraft(model), 2, 1, sampling=Sampling(temperature=temperature, seed=seed)
        )
        a, b = one
        counts[5 * a + b] += 1
        kept += one.drafts.accepted
    assert 0 < kept < count  # some are refused, some are not
    chi2 = float(((counts - count * expected) ** 2 / (count * expected)).sum())
    assert chi2 < 51.2  # the 0.1 % point of 24 degrees of freedom


def test_trained_modules_foretell_much_of_the_text() -> None:
    """Of a text that repeats itself, after some steps, nearly all; untrained modules guess."""
    period = torch.tensor([3, 7, 1, 9, 4, 4, 2, 10, 6])
    rows = torch.stack([period.roll(shift).repeat(5)[:40] for shift in range(9)])
    batch = Batch(torch.arange(9), {"tokens": rows[:, :-1], "labels": rows[:, 1:]})
    model = model_of(2, init_std=0.1).float()
    objective, optimizer = NextGroup().build(), torch.optim.Adam(model.parameters(), 0.01)
    rates = []
    for step in range(121):
        if step in (0, 120):
            one = Speculation(model.inner, period[:4].tolist(), MtpDraft(model), 30, 2)
            said = list(one)
            rates.append(one.drafts.rate)
        optimizer.zero_grad()
        loss = objective(model, batch, Keys(0, step, batch.slots_B))
        (loss.sum / loss.units).backward()
        optimizer.step()
    assert said == period.repeat(5)[4:34].tolist()
    assert rates[0] < 0.5
    assert rates[1] > 0.9


def test_a_model_without_modules_is_refused() -> None:
    model = GroupDecoderSettings(decoder=DecoderSettings(vocab_size=V, hidden_size=16, layers=1, heads=2))
    with pytest.raises(SpeculationError, match="no modules for the tokens after the next"):
        MtpDraft(model.build(ModelContext(0, None)))
