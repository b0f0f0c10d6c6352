"""Settings of rollouts: how the live model answers prompts while it trains, and what answers are worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from resilin.config import component
from resilin.data.settings import SourceContext, SourceSettings
from resilin.inference.sampling import Sampling
from resilin.posttrain.hints import Hints
from resilin.posttrain.reward_judge import RewardJudge
from resilin.posttrain.rollout_source import HeldOutPrompts, RolloutSource
from resilin.posttrain.verifiers.table import VerifierTable


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
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that end an answer too, wherever the borders between tokens fall. What the last token says beyond one is
    not shown to verifiers; the answer counts as one that ended."""
    non_stop_penalty: float | Literal["verifier"] = -10.0
    """Score of an answer that reached the limit without ending, in place of its reward; `verifier`: its reward."""
    mask_truncated: bool = False
    """Learn nothing from answers that reached the limit: they only count among the others of their group (DAPO)."""
    overlong_buffer: int = Field(default=0, ge=0)
    """Tokens before the limit over which `overlong_penalty` grows from nothing to all of it (DAPO)."""
    overlong_penalty: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Taken from the score of an answer that reaches the limit; needs `overlong_buffer`."""
    verifiers: VerifierTable = VerifierTable()
    """What checks answers, by the name a row's `dataset` gives."""
    reward_model: Path | None = None
    """A folder that `resilin reward` wrote, whose score is added to the verifiers' reward."""
    reward_model_multiplier: float = Field(default=0.0, allow_inf_nan=False)
    """What it is multiplied by; 0: verifiers only, no reward model is opened."""
    reward_model_tokenizer: Path | None = None
    """Its tokenizer and chat template, where the folder holds none."""
    equal_groups: Literal["keep", "drop", "resample"] = "keep"
    """Groups whose answers all have one score teach nothing: keep them, leave them out of the loss, or ask further
    prompts until the rollout is full of others."""
    resample_rounds: int = Field(default=4, ge=1)
    """With `resample`: rounds of further prompts before equal groups are taken after all."""
    batch_rows: int = Field(default=256, ge=1)
    """Answers that grow side by side."""
    ahead: int = Field(default=0, ge=0)
    """Rollouts whose answers are begun while the longest of this one goes on; they stop where they are and go on in
    their turn. Each rollout learns from its own prompts, in the order there is without (U-RB)."""
    hints: Hints | None = None
    """Prompts begin with a part of a reference thought that fades as training goes on (AHRL)."""

    @model_validator(mode="after")
    def _groups(self) -> Rollouts:
        if self.equal_groups != "keep" and self.samples_per_prompt < 2:
            raise ValueError(
                f"equal_groups = {self.equal_groups!r} compares answers to one prompt: set samples_per_prompt to 2 "
                "or more"
            )
        if self.equal_groups == "resample" and self.ahead:
            raise ValueError(
                "equal_groups = 'resample' asks further prompts by what answers say, and ahead begins answers before "
                "that is known: set ahead = 0, or equal_groups = 'drop'"
            )
        return self

    @model_validator(mode="after")
    def _whole_pairs_of_settings(self) -> Rollouts:
        if self.reward_model_multiplier and self.reward_model is None:
            raise ValueError("reward_model_multiplier needs reward_model: a folder that resilin reward wrote")
        if bool(self.overlong_buffer) != bool(self.overlong_penalty):
            raise ValueError("overlong_buffer and overlong_penalty need each other: set both, or neither")
        if self.overlong_buffer >= self.max_new_tokens > 1:
            raise ValueError(
                f"overlong_buffer = {self.overlong_buffer} should be less than max_new_tokens = {self.max_new_tokens}"
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
            ValueError: the batch size does not hold whole groups, or nothing rewards answers.
            VerifierError: a row's answers could not be checked.
            ModelFolderError: `reward_model` is none.
        """
        if context.split == "validation":
            return HeldOutPrompts(self.prompts.build(context))
        answers = context.batch_size * self.minibatches
        if answers % self.samples_per_prompt:
            raise ValueError(
                f"train.batch_size x minibatches = {answers} answers are not whole groups of samples_per_prompt = "
                f"{self.samples_per_prompt}: use a multiple"
            )
        prompts: Any = self.prompts.build(replace(context, batch_size=answers // self.samples_per_prompt))
        checked = 0
        for row in getattr(prompts, "mine", ()):
            if self.is_checked(prompts.row(int(row))):
                self.verifiers.check(prompts.row(int(row)), f"prompt row {row}")
                checked += 1
            if self.hints is not None:
                self.hints.check(prompts.row(int(row)), f"prompt row {row}")
        judge = None
        if self.reward_model is not None and self.reward_model_multiplier:
            chat = getattr(self.prompts, "texts", "plain") == "chat"
            judge = RewardJudge.load(self.reward_model, self.reward_model_tokenizer, texts_are_messages=chat)
        elif not checked and hasattr(prompts, "mine"):
            raise ValueError(
                "nothing rewards answers: no prompt names a verifier, and there is no reward model; set reward_model "
                "and reward_model_multiplier, or give rows ground_truth and dataset"
            )
        return RolloutSource(self, prompts, context.seed, judge)

    def is_checked(self, row: Mapping[str, Any]) -> bool:
        """Whether verifiers say something of this row's answers; a row may do without where prompts may."""
        return getattr(self.prompts, "needs_truth", True) or row.get("dataset", row.get("data_source")) is not None
