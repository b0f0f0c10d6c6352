"""NICE: training gradients against the policy gradient of a reward on the target's prompts.

Source: Wang et al., "NICE data selection for instruction tuning in LLMs with non-differentiable evaluation metric",
2025; as a live selector in DataFlex, 2026.
Shapes: M target samples, R responses to each, K projected dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from resilin.config import component
from resilin.data.pool import pool_size
from resilin.inference.generate import StopRule, generate
from resilin.inference.sampling import Sampling
from resilin.models.decoder import Decoder
from resilin.nouns import Batch
from resilin.objective.next_token import IGNORE
from resilin.steer.evaluating import device_of, evaluating
from resilin.steer.influence import projected
from resilin.steer.less import InfluenceSettings
from resilin.steer.look import Look
from resilin.steer.rewards import Reward
from resilin.steer.selector import Selection, SelectionError


def prompt_and_reference(tokens: list[int], labels: list[int], prompt_tokens: int) -> tuple[list[int], list[int]]:
    """A target sample cut in two.

    Where its first labels are masked (a conversation), the prompt is what comes before the first label; plain text is
    cut after `prompt_tokens` tokens, or in the middle where it is shorter than twice that.
    """
    real = [place for place, label in enumerate(labels) if label != IGNORE]
    if not real:
        return [], []
    whole = [*tokens[: real[-1] + 1], labels[real[-1]]]
    cut = real[0] + 1 if real[0] > 0 else min(prompt_tokens, max(1, len(whole) // 2))
    return whole[:cut], whole[cut:]


class NICE(InfluenceSettings):
    """The samples whose direction would raise the expected reward of the model's own responses.

    For each target sample: `responses` sampled continuations of its prompt; the gradient of reward * summed negative
    log-likelihood, averaged over them; then cosines as in LESS.
    """

    responses: Annotated[int, Field(ge=1)] = 4
    """Sampled for each prompt."""
    temperature: Annotated[float, Field(gt=0)] = 0.7
    """Of the sampling."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 512
    """Longest response; also bounded by the model's positions."""
    prompt_tokens: Annotated[int, Field(ge=1)] = 32
    """How much of a plain text is its prompt."""
    baseline: bool = False
    """Take the mean reward of a prompt's responses away: less noise, the same expected gradient."""
    reward: Annotated[Reward, component("resilin.steer.rewards:Overlap")] = Field(
        default_factory=dict, validate_default=True
    )
    """Judge of the responses."""

    def select(self, look: Look) -> Selection:
        """The best, by cosine with the policy gradients.

        Raises:
            SelectionError: the model cannot write, a reward is outside [0, 1], or no response got a reward.
        """
        target_MK, mean_reward = self.policy_gradients(look)
        alive_M = target_MK.norm(dim=1) > 0
        if not bool(alive_M.any()):
            raise SelectionError(
                "NICE: no response got a reward that tells it from others, so there is no gradient to compare with: "
                "use another selector.reward, or begin with more source.warmup_steps"
            )
        score_N = self._scores(look, self.directions(look), target_MK, alive_M)
        chosen = torch.argsort(score_N, descending=True, stable=True)[: look.count]
        figures = {"mean reward": mean_reward, "score of the chosen": float(score_N[chosen].mean())}
        return Selection(chosen, figures)

    def _scores(self, look: Look, train_NK: Tensor, target_MK: Tensor, alive_M: Tensor) -> Tensor:
        from resilin.steer.influence import scores

        subtask_M = self.subtasks(look)[alive_M] if self.aggregate == "subtask" else None
        return scores(train_NK, target_MK[alive_M], self.aggregate, centred=self.centred, subtask_M=subtask_M)

    def policy_gradients(self, look: Look) -> tuple[Tensor, float]:
        """The projected policy gradient of each target sample, (M, K), and the mean reward.

        Its sign is that of a loss: descending along it raises the reward.
        """
        model = look.model
        if not isinstance(model, Decoder):
            raise SelectionError(f"NICE lets the model write, which a {type(model).__name__} cannot")
        prompts, references, owners = self._prompts(look)
        room = model.settings.max_positions - max(len(prompt) for prompt in prompts)
        seed = look.keys("responses").integer(2**31)
        stop = StopRule(max(1, min(self.max_new_tokens, room)), _end_ids(look))
        with evaluating(model), torch.no_grad():
            written = generate(
                model, [p for p in prompts for _ in range(self.responses)], stop,
                sampling=Sampling(temperature=self.temperature, seed=seed),
            )  # fmt: skip
        responses = [continuation.tokens for continuation in written]
        tokenizer = getattr(look.target, "tokenizer", None)
        rewards = self.reward.score(responses, [r for r in references for _ in range(self.responses)], tokenizer)
        outside = [value for value in rewards if not 0 <= value <= 1]
        if outside or len(rewards) != len(responses):
            raise SelectionError(
                f"reward {type(self.reward).__name__} should give a number in [0, 1] for each of {len(responses)} "
                f"responses; it gave {len(rewards)}" + (f", among them {outside[0]}" if outside else "")
            )
        reward_R = torch.tensor(rewards).view(-1, self.responses)
        mean = float(reward_R.mean())
        if self.baseline:
            reward_R = reward_R - reward_R.mean(1, keepdim=True)
        rows = [(prompts[number // self.responses], response) for number, response in enumerate(responses)]
        gradient_RK = projected(
            look,
            _batches(rows, look.batch_size, device_of(model)),
            self.projection(),
            direction="sgd",
            memory=self.memory_mib * 2**20,
        )
        lengths_R = torch.tensor([float(len(response)) for response in responses])
        gradient_RK = gradient_RK * (lengths_R * reward_R.flatten())[:, None]  # of the mean -> of the sum
        by_prompt = gradient_RK.view(len(prompts), self.responses, -1).mean(1)
        found_MK = torch.zeros(pool_size(look.target), by_prompt.shape[1])
        found_MK[torch.tensor(owners)] = by_prompt
        return found_MK, mean

    def _prompts(self, look: Look) -> tuple[list[list[int]], list[list[int]], list[int]]:
        prompts, references, owners = [], [], []
        number = 0
        for batch in look.batches(look.target):
            for tokens, labels in zip(batch["tokens"].tolist(), batch["labels"].tolist(), strict=True):
                prompt, reference = prompt_and_reference(tokens, labels, self.prompt_tokens)
                if prompt and reference:
                    prompts.append(prompt)
                    references.append(reference)
                    owners.append(number)
                number += 1
        if not prompts:
            raise SelectionError("NICE: no target sample has both a prompt and a continuation")
        return prompts, references, owners


def _end_ids(look: Look) -> frozenset[int]:
    tokenizer = getattr(look.target, "tokenizer", None)
    end = getattr(tokenizer, "eos_id", None)
    return frozenset() if end is None else frozenset({end})


def _batches(rows: Sequence[tuple[list[int], list[int]]], batch_size: int, device: torch.device) -> Iterator[Batch]:
    """Prompt and response as padded rows; only the response is learnt."""
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        longest = max(len(prompt) + len(response) for prompt, response in part)
        tokens_BT = torch.zeros(len(part), longest, dtype=torch.int64)
        labels_BT = torch.full((len(part), longest - 1), IGNORE)
        documents_BT = torch.full((len(part), longest - 1), -1, dtype=torch.int32)
        for b, (prompt, response) in enumerate(part):
            size = len(prompt) + len(response)
            tokens_BT[b, :size] = torch.tensor(prompt + response)
            labels_BT[b, len(prompt) - 1 : size - 1] = torch.tensor(response)
            documents_BT[b, : size - 1] = 0
        fields = {"tokens": tokens_BT[:, :-1], "labels": labels_BT, "documents": documents_BT}
        yield Batch(torch.arange(len(part)), fields).to(device)
