"""Answers that are begun before their turn: nobody waits idle for the longest one, and the order stays.

A pool holds the answers of this rollout and of the next ones, in the order of their prompts. All grow side by side;
when those of this rollout are done, the others stop where they are and go on in the next one, with the model as it then
is. Every rollout is trained on exactly the prompts that are its own, so neither their order nor how hard they are
depends on how long answers take (the ordered rollout buffer U-RB of ERNIE 5.0, section 5; taking whoever is done first
would train on short answers first).

What was drawn before is kept with the log-probabilities it was drawn with; `objective.importance_band` tells training
how far they are from the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from resilin.data.tokenizer import Tokenizer
from resilin.inference.generate import StopRule, stream
from resilin.inference.sampling import Sampling
from resilin.nouns import State
from resilin.posttrain.rollout import Answer, decoder_of


@dataclass
class Turn:
    """The answers of one rollout.

    Attributes:
        number: of its prompts, in the order they are asked.
        rows: of the table of prompts, one for each prompt.
        hinted: the part of its thought that each prompt was given.
        answers: as many to each prompt; grown as far as they are.
        done: which of them ended.
        earlier: tokens of each that were drawn in earlier rollouts.
    """

    number: int
    rows: list[int]
    hinted: list[float]
    answers: list[Answer]
    done: list[bool] = field(default_factory=list)
    earlier: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.done = self.done or [False] * len(self.answers)
        self.earlier = self.earlier or [0] * len(self.answers)

    def state(self) -> State:
        """As JSON values, none of which changes when answers grow."""
        state: State = {"number": self.number}
        state |= {name: list(getattr(self, name)) for name in ("rows", "hinted", "done", "earlier")}
        state["answers"] = [
            {
                "prompt": list(answer.prompt),
                "tokens": list(answer.tokens),
                "logprobs": list(answer.logprobs),
                "stopped": answer.stopped,
                "stop": answer.stop,
            }
            for answer in self.answers
        ]
        return state

    @classmethod
    def of(cls, state: State) -> Turn:
        """The reverse."""
        copied = ("prompt", "tokens", "logprobs")
        answers = [Answer(**{**one, **{name: list(one[name]) for name in copied}}) for one in state["answers"]]
        return cls(
            state["number"], list(state["rows"]), list(state["hinted"]), answers, list(state["done"]),
            list(state["earlier"]),
        )  # fmt: skip


class RolloutBuffer:
    """The answers of this rollout and of the next ones, in order.

    Attributes:
        ahead: rollouts whose answers are begun beside those of this one.
        turns: this rollout's first.
    """

    def __init__(self, ahead: int) -> None:
        self.ahead = ahead
        self.turns: list[Turn] = []

    def fill(self, number: int, ask: Callable[[int], Turn | None]) -> None:
        """Have the turns of this rollout and the next ones in the pool.

        Args:
            number: of this rollout's prompts.
            ask: gives the turn with a number, its answers empty; None: there are no more prompts.
        """
        first = self.turns[-1].number + 1 if self.turns else number
        for later in range(first, number + self.ahead + 1):
            turn = ask(later)
            if turn is None:
                break
            self.turns.append(turn)

    def grow(
        self,
        model: nn.Module,
        sampling: Sampling,
        max_new_tokens: int,
        end_ids: frozenset[int],
        *,
        stop: Sequence[str],
        tokenizer: Tokenizer,
        batch_rows: int,
    ) -> Turn:
        """Let answers grow until all of the first turn are done; takes it out of the pool.

        Args:
            model: as of `resilin.posttrain.rollout.sample_answers`, like the others.
            sampling: how tokens are drawn; another seed each time.
            max_new_tokens: of an answer, what was drawn earlier counted.
            end_ids: tokens that end an answer.
            stop: texts that end an answer.
            tokenizer: needed for those.
            batch_rows: answers that grow side by side; those of the first turn begin first.
        """
        places = [(turn, at) for turn in self.turns for at in range(len(turn.answers)) if not turn.done[at]]
        for turn in self.turns:
            turn.earlier = [len(answer.tokens) for answer in turn.answers]
        first = self.turns[0]
        numbers = [(turn.number - first.number) * len(first.answers) + at for turn, at in places]
        prompts = [[*turn.answers[at].prompt, *turn.answers[at].tokens] for turn, at in places]
        pieces = stream(
            decoder_of(model),
            prompts,
            StopRule(max_new_tokens, end_ids, tuple(stop)),
            sampling=sampling,
            tokenizer=tokenizer if stop else None,
            rows=numbers,
            batch_rows=batch_rows,
            begun=[turn.earlier[at] for turn, at in places],
        )
        waits = first.done.count(False)
        for piece in pieces if waits else ():
            turn, at = places[piece.row]
            answer: Any = turn.answers[at]
            answer.tokens.append(piece.token)
            answer.logprobs.append(piece.draw_logprob)
            if piece.reason is None:
                continue
            answer.stopped, answer.stop = piece.reason in ("stop_token", "stop_string"), piece.found
            turn.done[at] = True
            waits -= turn is first
            if not waits:
                break
        return self.turns.pop(0)
