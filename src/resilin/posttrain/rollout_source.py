"""A source whose rows the live model writes: it answers prompts before a step, and they are scored.

One rollout serves `updates` x `minibatches` steps. It is made anew from the model, the prompts and the keys of its
first step, so a resume gives the same bits; a rollout that is still in use is saved with the run.

Shapes: R answers of a rollout, P groups, B answers of a step, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from resilin.inference.sampling import GREEDY, Sampling
from resilin.keys import Keys, hash64
from resilin.nouns import Batch, Source, State, StepView
from resilin.posttrain.advantage import equal_groups
from resilin.posttrain.reward_judge import RewardJudge
from resilin.posttrain.rewards import Rewards, Worth
from resilin.posttrain.rollout import Answer, decoder_of, rows_of, sample_answers
from resilin.posttrain.rollout_buffer import RolloutBuffer, Turn
from resilin.posttrain.verification import pack_rows, unpack_rows
from resilin.transforms import SourceTransform

if TYPE_CHECKING:
    from resilin.posttrain.rollouts import Rollouts

Fields = dict[str, Tensor]


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
    ended, its tokens, the row its prompt has; `muted` (B,): whether its advantage is to be 0; and what the objective
    adds to `rollout` when a new one is there. Where there are such things also (B,): `liked`, the reward model's score;
    `hinted`, the part of a thought that its prompt was given; `earlier`, its tokens drawn before this rollout.

    Attributes:
        settings: of the rollouts.
        rollout: the fields of all R answers; None between rollouts.
        fresh: whether the rollout was made before this very step.
    """

    def __init__(self, settings: Rollouts, prompts: Source, seed: int, judge: RewardJudge | None = None) -> None:
        super().__init__(prompts)
        self.settings, self.seed = settings, seed
        self.rewards = Rewards(settings, self.tokenizer, judge)
        self.rollout: Fields | None = None
        self.fresh = False
        self.buffer = RolloutBuffer(settings.ahead) if settings.ahead else None
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
            began = self._prompt_step
            try:
                with view.autocast():
                    self.rollout = self._write(view.model, view.step)
            except BaseException:
                self._prompt_step = began  # a verifier may fail; the next try asks the same prompts
                raise
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
        return self._part(len(self.rollout["scores"]), step - self._made_at, self._made_at)

    def _part(self, count: int, step: int, made_at: int) -> Tensor:
        """The answers of one of a rollout's steps, which it serves from step `made_at` on."""
        parts = self.settings.minibatches
        update, part = divmod(step, parts)
        order = torch.arange(count)
        if parts > 1:
            keys = Keys.of_step(self.seed, made_at).fold("minibatches").fold(update)
            order = keys.uniform((count,))[0].argsort(stable=True)
        # In the order of their prompts: neighbours that begin with the same one are read together.
        return order[part * count // parts : (part + 1) * count // parts].sort().values

    # -- writing ------------------------------------------------------------------------------------------------

    def _write(self, model: nn.Module, step: int) -> Fields | None:
        """A new rollout; None where there are no more prompts."""
        if self.buffer is not None:
            return self._write_ahead(self.buffer, model, step)
        group, wanted = self.settings.samples_per_prompt, self.inner.slots(self._prompt_step)
        if not wanted:
            return None
        useful: list[_Group] = []
        spare: list[_Group] = []
        rounds = self.settings.resample_rounds if self.settings.equal_groups == "resample" else 0
        for turn in range(rounds + 1):
            found = self._ask(model, step, turn)
            for one in found:
                scores = torch.tensor([worth.score for worth in one.worth], dtype=torch.float64)
                equal = bool(equal_groups(scores, group)[0])
                (spare if rounds and equal else useful).append(one)
            if len(useful) >= wanted or not self.inner.slots(self._prompt_step):
                break
        chosen = (useful + spare)[:wanted]
        return self._fields(chosen, step)

    def _ask(self, model: nn.Module, step: int, turn: int) -> list[_Group]:
        """The next prompts, answered and scored."""
        asked = self._turn(self._prompt_step, step)
        assert asked is not None
        self._prompt_step += 1
        sampling = self.settings.sampling(hash64(self.seed, "rollout", step, turn))
        asked.answers = self._answers(model, [answer.prompt for answer in asked.answers], sampling)
        return self._scored(model, asked)

    def _turn(self, number: int, step: int) -> Turn | None:
        """The prompts of a number, to be learnt from at a step, with empty answers; None: there are no more."""
        count, group, hints = self.inner.slots(number), self.settings.samples_per_prompt, self.settings.hints
        if not count:
            return None
        batch = self.inner.fetch(number, range(count))
        rows, prompts = batch["row"].tolist(), unpadded(batch)
        shares = [0.0] * count
        if hints is not None:
            shares = [hints.part(self.row(row), step) for row in rows]
            thoughts = [hints.tokens(self.row(row), step, self.tokenizer) for row in rows]
            prompts = [[*prompt, *thought] for prompt, thought in zip(prompts, thoughts, strict=True)]
        return Turn(number, rows, shares, [Answer(prompt) for prompt in prompts for _ in range(group)])

    def _scored(self, model: nn.Module, asked: Turn) -> list[_Group]:
        """The groups of a turn whose answers are there."""
        group, device = self.settings.samples_per_prompt, decoder_of(model).embed.weight.device
        worth = self.rewards.of(asked.answers, [self.row(row) for row in asked.rows for _ in range(group)], device)
        cut = [slice(at, at + group) for at in range(0, len(worth), group)]
        return [
            _Group(row, asked.answers[at], worth[at], part)
            for row, part, at in zip(asked.rows, asked.hinted, cut, strict=True)
        ]

    def _write_ahead(self, buffer: RolloutBuffer, model: nn.Module, step: int) -> Fields | None:
        """A new rollout whose answers may have begun in earlier ones; those of later ones begin beside it."""
        number, each = self._prompt_step, self.steps_of_rollout
        before = [turn.state() for turn in buffer.turns]
        buffer.fill(number, lambda later: self._turn(later, step + (later - number) * each))
        if not buffer.turns:
            return None
        try:
            mine = buffer.grow(
                model,
                self.settings.sampling(hash64(self.seed, "rollout", step, 0)),
                self.settings.max_new_tokens,
                self.end_ids,
                stop=self.settings.stop,
                tokenizer=self.tokenizer,
                batch_rows=self.settings.batch_rows,
            )
            fields = self._fields(self._scored(model, mine), step)
        except BaseException:
            buffer.turns = [Turn.of(state) for state in before]  # the next try begins with the same answers
            raise
        self._prompt_step = number + 1
        fields["earlier"] = torch.tensor(mine.earlier)
        return fields

    def _answers(self, model: nn.Module, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Answer]:
        return sample_answers(
            model,
            prompts,
            sampling,
            self.settings.max_new_tokens,
            self.end_ids,
            stop=self.settings.stop,
            tokenizer=self.tokenizer,
            batch_rows=self.settings.batch_rows,
        )

    def _fields(self, groups: Sequence[_Group], step: int) -> Fields:
        answers = [answer for one in groups for answer in one.answers]
        fields = rows_of(answers)
        worth = [value for one in groups for value in one.worth]
        fields["scores"] = torch.tensor([value.score for value in worth], dtype=torch.float64)
        fields["verified"] = torch.tensor([value.right for value in worth], dtype=torch.float64)
        fields["stopped"] = torch.tensor([answer.stopped for answer in answers])
        fields["lengths"] = torch.tensor([len(answer.tokens) for answer in answers])
        fields["prompts"] = torch.tensor([one.row for one in groups for _ in one.answers])
        if self.settings.hints is not None:
            fields["hinted"] = torch.tensor([one.hinted for one in groups for _ in one.answers])
        if self.rewards.judge is not None:
            fields["liked"] = torch.tensor([value.liked for value in worth], dtype=torch.float64)
        silent_R = torch.zeros(len(answers), dtype=torch.bool)
        if self.settings.equal_groups == "drop":
            equal_P = equal_groups(fields["scores"], self.settings.samples_per_prompt)
            silent_R |= equal_P.repeat_interleave(self.settings.samples_per_prompt)
        if self.settings.mask_truncated:
            silent_R |= ~fields["stopped"]
        # A step needs units: where one would have none, such answers stay, and only their advantages go.
        steps = [silent_R[self._part(len(answers), part, step)] for part in range(self.steps_of_rollout)]
        empty = any(bool(of_step_B.all()) for of_step_B in steps)
        fields["muted"] = silent_R & empty
        if not empty:
            fields["labels"][silent_R] = -100
        return fields

    def answer_held_out(self, model: nn.Module, batch: Batch) -> tuple[list[Answer], list[float]]:
        """Greedy answers to held-out prompts, and how right they are."""
        answers = self._answers(model, unpadded(batch), GREEDY)
        return answers, self.rewards.verify(answers, unpack_rows(batch["row_json"]))

    # -- saving -------------------------------------------------------------------------------------------------

    def own_state(self) -> State:
        """Where the prompts stand, and the rollout that is still in use."""
        rollout: Any = None if self.rollout is None else dict(self.rollout)
        state = {"prompt_step": self._prompt_step, "made_at": self._made_at, "rollout": rollout}
        if self.buffer is not None:
            state["begun"] = [turn.state() for turn in self.buffer.turns]
        return state

    def load_own_state(self, state: State) -> None:
        """Take both back."""
        self._prompt_step, self._made_at = state["prompt_step"], state["made_at"]
        self.rollout = None if state["rollout"] is None else dict(state["rollout"])
        if self.buffer is not None:
            self.buffer.turns = [Turn.of(turn) for turn in state.get("begun", ())]


class _Group(NamedTuple):
    """The answers to one prompt, and what they are worth."""

    row: int
    answers: list[Answer]
    worth: list[Worth]
    hinted: float = 0.0
