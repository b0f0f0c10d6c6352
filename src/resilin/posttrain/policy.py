"""What GRPO and PPO have in common: a policy that learns from its own answers, and how it is evaluated.

Shapes: R answers of a rollout, B of a micro-batch, T positions, N answer tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from resilin.keys import Keys
from resilin.nouns import Batch, Log, Loss, Mean, State, StepView
from resilin.objective.next_token import IGNORE
from resilin.objective.settings import ObjectiveContext, ObjectiveSettings, needed
from resilin.posttrain.policy_loss import PolicyTerms
from resilin.posttrain.reference import LiveReference
from resilin.posttrain.rollout import decoder_of
from resilin.posttrain.sequences import frozen_logprobs, spread
from resilin.posttrain.verification import unpack_rows


class PolicySettings(ObjectiveSettings):
    """Settings of every loss over rollouts."""

    clip_low: float = Field(default=0.2, ge=0, lt=1)
    """The ratio of new to old probability may fall to 1 - clip_low before its gradient stops."""
    clip_high: float = Field(default=0.2, ge=0)
    """It may rise to 1 + clip_high; a greater bound than the lower one keeps rare tokens alive (DAPO)."""
    clip_dual: float | None = Field(default=None, gt=1)
    """Bounds the loss of tokens with a negative advantage at this many times the advantage (3 in dual-clip PPO)."""
    beta: float = Field(default=0.05, ge=0)
    """Strength of the pull to the reference; 0: there is none, and no reference model."""
    reference: Literal["live", "adapters_off"] = "live"
    """live: the initial model stays in memory; adapters_off: the model itself without its adapters."""
    old_logprobs: Literal["auto", "sampled", "recomputed"] = "auto"
    """Where the probabilities before the updates come from: the draws, or another pass. auto: the draws, except in a
    narrow format or with filtered draws, whose numbers differ from those of training."""
    importance_cap: float = Field(default=0.0, ge=0)
    """Weigh each token by its probability in training over that of its draw, at most this (2 in Yao et al., 2025),
    where the two differ: a narrow format, filtered draws. The old probabilities are then recomputed. 0: no weights."""
    importance_band: tuple[float, float] | None = None
    """(alpha, beta) around 1: tokens whose probability in training over that of their draw lies outside count nothing,
    the others count so much (IcePop; with GRPO's ratio = "sequence", MISC). The old probabilities are recomputed."""
    importance_over: Literal["token", "answer"] = "token"
    """What the band judges: each token; or an answer by its tokens' geometric mean, all or nothing."""
    chunk: int | None = Field(default=None, ge=0)
    """Tokens whose logits exist at once; left out: chosen; 0: all."""

    @model_validator(mode="after")
    def _weights_need_another_pass(self) -> PolicySettings:
        if self.importance_cap and self.old_logprobs == "sampled":
            raise ValueError("importance_cap compares training with the draws: set old_logprobs to auto or recomputed")
        if self.importance_band is None:
            return self
        low, high = self.importance_band
        if not 0 <= low <= 1 <= high:
            raise ValueError(f"importance_band = [{low:g}, {high:g}]: 0 <= alpha <= 1 <= beta was expected")
        if self.importance_cap:
            raise ValueError("importance_band and importance_cap both weigh tokens: set one of them")
        if self.old_logprobs == "sampled":
            raise ValueError("importance_band compares training with the draws: set old_logprobs to auto or recomputed")
        return self


def rollouts_of(source: Any, what: str) -> Any:
    """The source, if it writes rollouts.

    Raises:
        ValueError: it does not.
    """
    if not hasattr(source, "steps_of_rollout"):
        raise ValueError(
            f"{what} learns from the model's own answers, and the source is a {type(source).__name__}: set source.use "
            "= 'resilin.posttrain.rollouts:Rollouts'"
        )
    return source


class PolicyObjective(ABC):
    """The common part; a subclass gives `advantages` and `learn`."""

    name = "the policy loss"
    needs_old = False
    """Whether the probabilities of the draws are used beside the ratio."""

    def __init__(self, settings: PolicySettings, context: ObjectiveContext | None, terms: PolicyTerms) -> None:
        run = needed(context, self.name)
        self.common, self.terms = settings, terms
        self.source = rollouts_of(run.source, self.name)
        self.temperature: float = self.source.settings.temperature
        self.once: bool = self.source.steps_of_rollout == 1
        """Whether the model that wrote an answer is the one that learns from it."""
        self.reference: LiveReference | None = None
        if settings.beta:
            self.reference = LiveReference(run.initial_model, off_adapters=settings.reference == "adapters_off")

    # -- before a step ------------------------------------------------------------------------------------------

    def before_step(self, view: StepView) -> None:
        """Complete a new rollout: what the reference and the policy say of it, and the advantages."""
        source = rollouts_of(view.source, self.name)
        if source.rollout is None or not source.fresh:
            return
        training = view.model.training
        view.model.eval()
        with torch.no_grad(), view.autocast():
            self._complete(view.model, source.rollout)
        view.model.train(training)

    def _complete(self, model: nn.Module, rollout: dict[str, Tensor]) -> None:
        policy = decoder_of(model)
        device = policy.embed.weight.device
        tokens_RT, labels_RT = rollout["tokens"].to(device), rollout["labels"].to(device)
        narrow = torch.is_autocast_enabled(device.type) or policy.embed.weight.dtype.itemsize < 4
        asked = self.common.old_logprobs
        ahead = bool(getattr(self.source.settings, "ahead", 0))  # earlier tokens are of an earlier policy
        again = asked == "recomputed" or (asked == "auto" and (narrow or ahead or self.source.settings.filtered))
        cap, band = self.common.importance_cap, self.common.importance_band
        if cap or band is not None or (again and (self.needs_old or not self.once)):
            logp_RT = spread(frozen_logprobs(policy, tokens_RT, labels_RT, self.temperature), labels_RT).cpu()
            gained_RT = logp_RT - rollout["old_logprobs"]
            if cap:
                rollout["importance"] = torch.exp(gained_RT).clamp(max=cap)
            if band is not None:
                labelled_RT = rollout["labels"] != IGNORE
                rollout["importance"] = masked_importance(gained_RT, labelled_RT, band, self.common.importance_over)
            rollout["old_logprobs"] = logp_RT
        if self.reference is not None:
            logp_N = self.reference.token_logprobs(model, tokens_RT, labels_RT, self.temperature)
            rollout["reference_logprobs"] = spread(logp_N, labels_RT).cpu()
        self.advantages(model, rollout)
        rollout["advantages"][rollout["muted"]] = 0.0

    @abstractmethod
    def advantages(self, model: nn.Module, rollout: dict[str, Tensor]) -> None:
        """Add what the loss needs to a new rollout."""

    # -- the loss -----------------------------------------------------------------------------------------------

    def __call__(self, model: nn.Module, batch: Batch, keys: Keys | None) -> Loss:
        """The loss of answers; of held-out prompts, how often greedy answers to them are wrong."""
        if batch.get("prompt_tokens") is not None:
            return self.evaluate(model, batch)
        return self.learn(model, batch)

    @abstractmethod
    def learn(self, model: nn.Module, batch: Batch) -> Loss:
        """The loss of a micro-batch of answers."""

    def evaluate(self, model: nn.Module, batch: Batch) -> Loss:
        """One minus the verifiers' number, summed over prompts, with the logs `verified`, `stopped` and `length`, each
        also by skill.
        """
        answers, right = self.source.answer_held_out(model, batch)
        device = batch["prompt_tokens"].device
        count = torch.tensor(float(len(answers)), dtype=torch.float64, device=device)
        values = {
            "verified": right,
            "stopped": [float(answer.stopped) for answer in answers],
            "length": [float(len(answer.tokens)) for answer in answers],
        }
        sums = {name: torch.tensor(sum(v), dtype=torch.float64, device=device) for name, v in values.items()}
        logs: dict[str, Log] = {name: Mean(value, count) for name, value in sums.items()}
        logs |= self._by_skill(batch, values)
        return Loss(count - sums["verified"], count, logs)

    @staticmethod
    def _by_skill(batch: Batch, values: Mapping[str, list[float]]) -> dict[str, Log]:
        """`verified/<name>` and so on for each value of `dataset` among the rows."""
        skills: dict[str, list[float]] = {}
        for place, row in enumerate(unpack_rows(batch["row_json"])):
            name = row.get("dataset", row.get("data_source"))
            if name is None:
                continue
            skill = "+".join(name) if isinstance(name, list) else str(name)
            for measure, of_rows in values.items():
                skills.setdefault(f"{measure}/{skill}", []).append(of_rows[place])
        device = batch["prompt_tokens"].device
        return {
            name: Mean(*torch.tensor([sum(v), len(v)], dtype=torch.float64, device=device))
            for name, v in skills.items()
        }

    def old_logprobs(self, batch: Batch, valid_BT: Tensor) -> Tensor | None:
        """(N,) of the tokens when they were drawn; None where the model is still the same."""
        return None if self.once else batch["old_logprobs"][valid_BT]

    def reference_logprobs(self, batch: Batch, valid_BT: Tensor) -> Tensor | None:
        """(N,) under the reference, where there is one."""
        return batch["reference_logprobs"][valid_BT] if self.reference is not None else None

    @staticmethod
    def weights(batch: Batch, valid_BT: Tensor) -> Tensor:
        """(N,) float64: how much each token's draw counts."""
        found = batch.get("importance")
        weights_BT = torch.ones(valid_BT.shape, device=valid_BT.device) if found is None else found
        return weights_BT[valid_BT].double()

    @staticmethod
    def rollout_logs(batch: Batch) -> dict[str, Log]:
        """`score`, `verified`, `stopped`, `length` and, with a reward model, `reward_model` per answer; `importance`
        per token where tokens are weighed.
        """
        names = {"scores": "score", "verified": "verified", "stopped": "stopped", "lengths": "length"}
        names |= {"liked": "reward_model"} if batch.get("liked") is not None else {}
        count = torch.tensor(float(len(batch)), dtype=torch.float64)
        logs: dict[str, Log] = {name: Mean(batch[field].double().sum(), count) for field, name in names.items()}
        if batch.get("importance") is not None:
            valid_BT = valid_of(batch)
            logs["importance"] = Mean(batch["importance"][valid_BT].double().sum(), valid_BT.sum())
            logs["left_out"] = Mean((batch["importance"][valid_BT] == 0).double().sum(), valid_BT.sum())
        for field, name in (("hinted", "hinted"), ("earlier", "earlier_tokens"), ("well_learned", "well_learned")):
            if batch.get(field) is not None:
                logs[name] = Mean(batch[field].double().sum(), count)
        return logs

    def state_dict(self) -> State:
        """Nothing: the reference is the initial model, the rollout belongs to the source."""
        return {}

    def load_state_dict(self, state: State) -> None:  # noqa: B027  # a subclass with state overrides both
        """Nothing to take back."""


def valid_of(batch: Batch | Mapping[str, Tensor]) -> Tensor:
    """(B, T) bool: where an answer's token follows."""
    return batch["labels"] != IGNORE


def masked_importance(
    gained_RT: Tensor, labelled_RT: Tensor, band: tuple[float, float], over: Literal["token", "answer"] = "token"
) -> Tensor:
    """(R, T): M(k) = k where alpha <= k <= beta, else 0, of k = probability in training / probability of the draw.

    (IcePop, Ling team, 2025; in the objective of ERNIE 5.0's MISC, section 5.)

    Args:
        gained_RT: log k of every token.
        labelled_RT: bool, the answers' tokens.
        band: alpha, beta.
        over: each token by itself; or all of an answer, whose k is their geometric mean, together.
    """
    ratio_RT = torch.exp(gained_RT)
    judged_RT = ratio_RT
    if over == "answer":
        counts_R1 = labelled_RT.sum(1, keepdim=True).clamp(min=1)
        judged_RT = torch.exp((gained_RT * labelled_RT).sum(1, keepdim=True) / counts_R1).expand_as(ratio_RT)
    inside_RT = (judged_RT >= band[0]) & (judged_RT <= band[1])
    return ratio_RT.where(inside_RT & labelled_RT, 0.0)
