"""A source whose rows the live model writes: it answers prompts before a step, and verifiers score the answers.

One rollout serves `updates` x `minibatches` steps. It is made anew from the model, the prompts and the keys of its
first step, so a resume gives the same bits; a rollout that is still in use is saved with the run.

Shapes: R answers of a rollout, T positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from resilin.config import component
from resilin.data.settings import SourceContext, SourceSettings
from resilin.inference.sampling import GREEDY, Sampling
from resilin.keys import Keys, hash64
from resilin.nouns import Batch, Source, State, StepView
from resilin.posttrain.advantage import equal_groups
from resilin.posttrain.rollout import Answer, rows_of, sample_answers
from resilin.posttrain.verification import pack_rows, unpack_rows
from resilin.posttrain.verifiers.table import VerifierTable
from resilin.transforms import SourceTransform

Fields = dict[str, Tensor]


class Rollouts(SourceSettings):
    """Prompts, and how the model answers them while it trains; `train.batch_size` counts answers."""

    prompts: Annotated[SourceSettings, component("resilin.data.prompt_source:PromptSource")]
    """Where prompts and their truths come from."""
    samples_per_prompt: int = Field(default=1, ge=1)
    """Answers to each prompt: the group that GRPO compares."""
    updates: int = Field(default=1, ge=1)
    """Times each answer is learnt from before new ones are written."""
    minibatches: int = Field(default=1, ge=1)
    """Steps that a rollout is divided into; it holds train.batch_size times as many answers."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Tokens of an answer at most."""
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Of the draws; the losses are about the same distribution."""
    top_k: int = Field(default=0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Filters of the draws; with one, the objective asks the policy again for what the draws were worth."""
    verification_reward: float = 10.0
    """Score of an answer that is right."""
    non_stop_penalty: float | Literal["verifier"] = -10.0
    """Score of an answer that reached the limit without ending, in place of its reward; `verifier`: its reward."""
    verifiers: VerifierTable = VerifierTable()
    """What checks answers, by the name a row's `dataset` gives."""
    equal_groups: Literal["keep", "drop", "resample"] = "keep"
    """Groups whose answers all have one score teach nothing: keep them, leave them out of the loss, or ask further
    prompts until the rollout is full of others."""
    resample_rounds: int = Field(default=4, ge=1)
    """With `resample`: rounds of further prompts before equal groups are taken after all."""
    batch_rows: int = Field(default=256, ge=1)
    """Answers that grow side by side."""

    @model_validator(mode="after")
    def _groups(self) -> Rollouts:
        if self.equal_groups != "keep" and self.samples_per_prompt < 2:
            raise ValueError(
                f"equal_groups = {self.equal_groups!r} compares answers to one prompt: set samples_per_prompt to 2 "
                "or more"
            )
        return self

    def sampling(self, seed: int) -> Sampling:
        """How tokens are drawn."""
        return Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p, seed=seed)

    @property
    def filtered(self) -> bool:
        """Whether some tokens can never be drawn."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0

    def build(self, context: SourceContext) -> RolloutSource | HeldOutPrompts:
        """The rollouts of the training split; of the validation split, its prompts and their truths.

        Raises:
            ValueError: the batch size does not hold whole groups.
        """
        if context.split == "validation":
            return HeldOutPrompts(self.prompts.build(context))
        answers = context.batch_size * self.minibatches
        if answers % self.samples_per_prompt:
            raise ValueError(
                f"train.batch_size x minibatches = {answers} answers are not whole groups of samples_per_prompt = "
                f"{self.samples_per_prompt}: use a multiple"
            )
        prompts = self.prompts.build(replace(context, batch_size=answers // self.samples_per_prompt))
        for row in getattr(prompts, "mine", ()):
            self.verifiers.check(prompts.row(int(row)), f"prompt row {row}")  # type: ignore[attr-defined]
        return RolloutSource(self, prompts, context.seed)


class HeldOutPrompts(SourceTransform):
    """Prompts whose batches carry their rows (`row_json`, see `resilin.posttrain.verification`)."""

    def shown(self, step: int | None, batch: Batch) -> Batch:
        """The prompts with their rows."""
        rows = [self.inner.row(row) for row in batch["row"].tolist()]  # type: ignore[attr-defined]
        return Batch(batch.slots_B, {**batch.fields, "row_json": pack_rows(rows)})


def unpadded(batch: Batch) -> list[list[int]]:
    """The prompts of a batch as token lists."""
    rows = zip(batch["prompt_tokens"].cpu(), batch["prompt_mask"].cpu(), strict=True)
    return [tokens[mask].tolist() for tokens, mask in rows]


class RolloutSource(SourceTransform):
    """Answers of the live model, as rows to learn from.

    A batch has `tokens` and `labels` (B, T), where labels are the answer's tokens; `old_logprobs` (B, T) of the
    draws; `scores`, `verified`, `stopped`, `lengths` and `prompts` (B,): score, the verifiers' sum, whether the answer
    ended, its tokens, the row its prompt has; and what the objective adds to `rollout` when a new one is there.

    Attributes:
        settings: of the rollouts.
        rollout: the fields of all R answers; None between rollouts.
        fresh: whether the rollout was made before this very step.
    """

    def __init__(self, settings: Rollouts, prompts: Source, seed: int) -> None:
        super().__init__(prompts)
        self.settings, self.seed = settings, seed
        self.rollout: Fields | None = None
        self.fresh = False
        self._made_at = 0
        self._prompt_step = 0

    @property
    def steps_of_rollout(self) -> int:
        """Steps that one rollout serves."""
        return self.settings.updates * self.settings.minibatches

    # -- steps --------------------------------------------------------------------------------------------------

    def before_step(self, view: StepView) -> None:
        """Write a new rollout where the last one is used up."""
        super().before_step(view)
        self.fresh = self.rollout is None or view.step >= self._made_at + self.steps_of_rollout
        if self.fresh:
            with view.autocast():
                self.rollout = self._write(view.model, view.step)
            self._made_at = view.step

    def after_step(self, view: StepView) -> None:
        """Forget a rollout that is used up."""
        super().after_step(view)
        if view.step >= self._made_at + self.steps_of_rollout:
            self.rollout = None

    def slots(self, step: int) -> int:
        """Answers of this step; 0 where there are no more prompts."""
        if self.rollout is None:
            batch = self.inner.slots(self._prompt_step) * self.settings.samples_per_prompt
            return batch // self.settings.minibatches
        return len(self._rows(step))

    def fetch(self, step: int, slots: Sequence[int]) -> Batch:
        """The answers of these slots."""
        if self.rollout is None:
            raise RuntimeError(f"step {step} asks for answers before the model wrote them: call before_step first")
        rows = self._rows(step)[torch.tensor(list(slots), dtype=torch.int64)]
        fields = {name: tensor[rows] for name, tensor in self.rollout.items()}
        return Batch(torch.tensor(list(slots), dtype=torch.int64), fields)

    def _rows(self, step: int) -> Tensor:
        """Which answers a step learns from: the rollout in an order of its own for each update, divided."""
        assert self.rollout is not None
        count, parts = len(self.rollout["scores"]), self.settings.minibatches
        update, part = divmod(step - self._made_at, parts)
        order = torch.arange(count)
        if parts > 1:
            keys = Keys.of_step(self.seed, self._made_at).fold("minibatches").fold(update)
            order = keys.uniform((count,))[0].argsort(stable=True)
        return order[part * count // parts : (part + 1) * count // parts]

    # -- writing ------------------------------------------------------------------------------------------------

    def _write(self, model: nn.Module, step: int) -> Fields | None:
        """A new rollout; None where there are no more prompts."""
        group, wanted = self.settings.samples_per_prompt, self.inner.slots(self._prompt_step)
        if not wanted:
            return None
        useful: list[_Group] = []
        spare: list[_Group] = []
        rounds = self.settings.resample_rounds if self.settings.equal_groups == "resample" else 0
        for turn in range(rounds + 1):
            found = self._ask(model, step, turn)
            for one in found:
                equal = bool(equal_groups(torch.tensor(one.scores, dtype=torch.float64), group)[0])
                (spare if rounds and equal else useful).append(one)
            if len(useful) >= wanted or not self.inner.slots(self._prompt_step):
                break
        chosen = (useful + spare)[:wanted]
        return self._fields(chosen)

    def _ask(self, model: nn.Module, step: int, turn: int) -> list[_Group]:
        """The next prompts, answered and scored."""
        count, group = self.inner.slots(self._prompt_step), self.settings.samples_per_prompt
        batch = self.inner.fetch(self._prompt_step, range(count))
        self._prompt_step += 1
        rows = batch["row"].tolist()
        prompts = [prompt for prompt in unpadded(batch) for _ in range(group)]
        sampling = self.settings.sampling(hash64(self.seed, "rollout", step, turn))
        answers = sample_answers(
            model, prompts, sampling, self.settings.max_new_tokens, self.end_ids, batch_rows=self.settings.batch_rows
        )
        right = self.verify(answers, [self.row(row) for row in rows for _ in range(group)])
        scores = [self.score(answer, value) for answer, value in zip(answers, right, strict=True)]
        cut = [slice(at, at + group) for at in range(0, len(answers), group)]
        return [_Group(rows[i], answers[at], right[at], scores[at]) for i, at in enumerate(cut)]

    def verify(self, answers: Sequence[Answer], rows: Sequence[Mapping[str, Any]]) -> list[float]:
        """What the verifiers say of the answers to some rows: scores in [0, 1] times weights."""
        texts = self.tokenizer.inner.decode_batch([answer.tokens for answer in answers], skip_special_tokens=True)
        return self.settings.verifiers.scores(rows, [answer.tokens for answer in answers], texts)

    def score(self, answer: Answer, right: float) -> float:
        """The score of an answer: its reward, or the penalty of one that did not end."""
        penalty = self.settings.non_stop_penalty
        if not answer.stopped and penalty != "verifier":
            return float(penalty)
        return self.settings.verification_reward * right

    def _fields(self, groups: Sequence[_Group]) -> Fields:
        answers = [answer for one in groups for answer in one.answers]
        fields = rows_of(answers)
        scores = [score for one in groups for score in one.scores]
        fields["scores"] = torch.tensor(scores, dtype=torch.float64)
        fields["verified"] = torch.tensor([value for one in groups for value in one.right], dtype=torch.float64)
        fields["stopped"] = torch.tensor([answer.stopped for answer in answers])
        fields["lengths"] = torch.tensor([len(answer.tokens) for answer in answers])
        fields["prompts"] = torch.tensor([one.row for one in groups for _ in one.answers])
        if self.settings.equal_groups == "drop":
            equal_P = equal_groups(fields["scores"], self.settings.samples_per_prompt)
            if not bool(equal_P.all()):  # a rollout without a single unequal group is kept: a step needs units
                dropped_R = equal_P.repeat_interleave(self.settings.samples_per_prompt)
                fields["labels"][dropped_R] = -100
        return fields

    def answer_held_out(self, model: nn.Module, batch: Batch) -> tuple[list[Answer], list[float]]:
        """Greedy answers to held-out prompts, and how right they are."""
        limit = self.settings.max_new_tokens
        answers = sample_answers(
            model, unpadded(batch), GREEDY, limit, self.end_ids, batch_rows=self.settings.batch_rows
        )
        return answers, self.verify(answers, unpack_rows(batch["row_json"]))

    # -- saving -------------------------------------------------------------------------------------------------

    def own_state(self) -> State:
        """Where the prompts stand, and the rollout that is still in use."""
        rollout: Any = None if self.rollout is None else dict(self.rollout)
        return {"prompt_step": self._prompt_step, "made_at": self._made_at, "rollout": rollout}

    def load_own_state(self, state: State) -> None:
        """Take both back."""
        self._prompt_step, self._made_at = state["prompt_step"], state["made_at"]
        self.rollout = None if state["rollout"] is None else dict(state["rollout"])


class _Group:
    """The answers to one prompt."""

    __slots__ = ("answers", "right", "row", "scores")

    def __init__(self, row: int, answers: list[Answer], right: list[float], scores: list[float]) -> None:
        self.row, self.answers, self.right, self.scores = row, answers, right, scores
