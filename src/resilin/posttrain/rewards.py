"""What answers are worth: what verifiers say, what a reward model says, and the penalties of length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from resilin.data.tokenizer import Tokenizer
from resilin.posttrain.reward_judge import RewardJudge
from resilin.posttrain.rollout import Answer

if TYPE_CHECKING:
    from resilin.posttrain.rollouts import Rollouts


class Worth(NamedTuple):
    """Of one answer.

    Attributes:
        right: the verifiers' scores in [0, 1] times their weights, added.
        liked: the reward model's number; 0 without one.
        score: what the policy learns from.
    """

    right: float
    liked: float
    score: float


class Rewards:
    """Scores answers as the settings of the rollouts say.

    Args:
        settings: of the rollouts.
        tokenizer: the policy's.
        judge: a reward model.
    """

    def __init__(self, settings: Rollouts, tokenizer: Tokenizer, judge: RewardJudge | None = None) -> None:
        self.settings, self.tokenizer, self.judge = settings, tokenizer, judge

    def of(self, answers: Sequence[Answer], rows: Sequence[Mapping[str, Any]], device: torch.device) -> list[Worth]:
        """The worth of answers to some rows; a reward model is asked on that device."""
        right = self.verify(answers, rows)
        liked = [0.0] * len(answers)
        if self.judge is not None:
            liked = self.judge.scores(rows, answers, self.texts(answers), device)
        return [Worth(a, b, self.score(answer, a, b)) for answer, a, b in zip(answers, right, liked, strict=True)]

    def texts(self, answers: Sequence[Answer]) -> list[str]:
        """What answers say, without special tokens and nothing beyond a stop string."""
        decoded = self.tokenizer.inner.decode_batch([answer.tokens for answer in answers], skip_special_tokens=True)
        return [answer.said(text) for answer, text in zip(answers, decoded, strict=True)]

    def verify(self, answers: Sequence[Answer], rows: Sequence[Mapping[str, Any]]) -> list[float]:
        """What the verifiers say of the answers to some rows; 0 for rows that name none."""
        texts, right = self.texts(answers), [0.0] * len(rows)
        checked = [number for number, row in enumerate(rows) if self.settings.is_checked(row)]
        found = self.settings.verifiers.scores(
            [rows[n] for n in checked], [answers[n].tokens for n in checked], [texts[n] for n in checked]
        )
        for number, score in zip(checked, found, strict=True):
            right[number] = score
        return right

    def score(self, answer: Answer, right: float, liked: float = 0.0) -> float:
        """An answer's reward, less the penalty of a long one; or the score of one that did not end."""
        settings = self.settings
        if not answer.stopped and settings.non_stop_penalty != "verifier":
            return float(settings.non_stop_penalty)
        reward = settings.verification_reward * right + settings.reward_model_multiplier * liked
        if settings.overlong_buffer:
            over = len(answer.tokens) - (settings.max_new_tokens - settings.overlong_buffer)
            reward -= settings.overlong_penalty * min(max(over / settings.overlong_buffer, 0.0), 1.0)
        return reward
