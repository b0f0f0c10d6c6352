"""What evaluations of written answers share: rows become prompts with worked examples, and the model answers them."""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from resilin.config.errors import UserError
from resilin.data.chat import encode_chat
from resilin.data.errors import DataError
from resilin.data.prompt_rows import read_prompt
from resilin.data.prompt_source import end_of_turn
from resilin.data.row_files import Row, read_rows
from resilin.data.row_template import columns_of, fill
from resilin.evaluate.multiple_choice import joined
from resilin.inference.generate import StopRule
from resilin.inference.prompts import prompt_tokens
from resilin.inference.sampling import Sampling
from resilin.posttrain.evaluations.answers import AnswerFile, Written, answers_digest, write_answers
from resilin.posttrain.evaluations.evaluation import (
    Evaluation,
    Job,
    Outcome,
    Progress,
    Subject,
    SuiteError,
    digest_of,
    file_name,
)
from resilin.posttrain.evaluations.items import Item, Messages, as_text, as_turns, one_group


@dataclass(frozen=True, slots=True)
class Asked:
    """All prompts of an evaluation as tokens.

    Attributes:
        items: what is asked.
        examples: the worked examples before each.
        ids: of each prompt, examples included.
        fewer_shots: prompts that left out examples for want of room.
    """

    items: list[Item]
    examples: list[Item]
    ids: list[list[int]]
    fewer_shots: int


class Writing(Evaluation):
    """An evaluation of what the model writes; a subclass says what an answer is worth."""

    rows: Annotated[tuple[str, ...], Field(min_length=1)]
    """Files of rows (.jsonl, .parquet, .arrow), folders or patterns."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Only the first so many rows."""
    prompt: str | None = None
    """The prompt from a row's columns, such as "Question: {question}\\nAnswer:"; left out, its messages or prompt."""
    truth: str | None = None
    """The column with the right answer, or a text made of columns in braces; left out, ground_truth."""
    truth_pattern: str | None = None
    """A regular expression with one group: the part of the truth that is it, such as "#### (.*)"."""
    examples: tuple[str, ...] = ()
    """Files of worked examples: the first `shots` rows of them, always in this order."""
    example_answer: str | None = None
    """An example's answer from its columns; left out, the answer that ends its messages, or its truth."""
    examples_as: Literal["turns", "text"] = "turns"
    """In a conversation, examples are earlier turns, or stand as text in front of the question."""
    separator: str = "\n\n"
    """Between examples that are text."""
    chat: bool | None = None
    """Ask in the model's chat form; left out, where its tokenizer has one."""
    system: str | None = None
    """The system message of conversations that have none."""
    answer_start: str = ""
    """How the answer begins: the model goes on from there, and it counts as part of the answer."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 512
    """Tokens of an answer at most."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer and are cut off."""
    samples: Annotated[int, Field(ge=1)] = 1
    """Answers to each prompt."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 is greedy: always the most probable token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the draws."""

    @model_validator(mode="after")
    def _settings_agree(self) -> Writing:
        if self.shots and not self.examples:
            raise ValueError(f"shots = {self.shots} needs examples: name a file of worked examples")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"samples = {self.samples} are all alike at temperature 0: raise temperature")
        for template in (self.prompt, self.example_answer, self.truth):
            columns_of(template or "")
        if self.truth_pattern is not None:
            one_group(self.truth_pattern)
        return self

    @abstractmethod
    def check(self, item: Item) -> None:
        """Refuse an item whose answers could not be scored.

        Raises:
            UserError: saying what was expected.
        """

    @abstractmethod
    def score(self, items: Sequence[Item], answers: Sequence[Sequence[Written]]) -> Outcome:
        """What the answers to each item are worth."""

    def item(self, row: Row, example: bool = False) -> Item:
        """A row as it is asked; a worked example has an answer too.

        Raises:
            DataError: with file and line, for a row without a prompt.
        """
        prompt: str | Messages
        if self.prompt is not None:
            prompt = query = self.filled(self.prompt, row)
        else:
            read = read_prompt(row)
            prompt, query = read.prompt, read.query
        label = self.label(row)
        answer = self._example_answer(row, label) if example else ""
        return Item(prompt, query, label, answer, row.value, row.where)

    def filled(self, template: str, row: Row) -> str:
        """A template with the row's columns.

        Raises:
            DataError: with file and line.
        """
        try:
            return fill(template, row.value)
        except DataError as error:
            raise row.error(str(error)) from None

    def label(self, row: Row) -> Any:
        """What the row's answers are held against; None where there is nothing."""
        if self.truth is None:
            rule = row.value.get("reward_model")
            label = row.value.get("ground_truth", rule.get("ground_truth") if isinstance(rule, dict) else None)
        elif "{" in self.truth:
            label = self.filled(self.truth, row)
        elif row.value.get(self.truth) is None:
            raise row.error(f"no column {self.truth!r} with the truth; columns here: {', '.join(sorted(row.value))}")
        else:
            label = row.value[self.truth]
        if self.truth_pattern is None:
            return label
        found = re.search(self.truth_pattern, str(label), re.DOTALL)
        if found is None:
            raise row.error(f"the truth {str(label)[:60]!r} does not match truth_pattern {self.truth_pattern!r}")
        return found.group(1).strip()

    def _example_answer(self, row: Row, label: Any) -> str:
        if self.example_answer is not None:
            return self.filled(self.example_answer, row)
        said = row.value.get("messages")
        if isinstance(said, list) and said and said[-1].get("role") == "assistant":
            return str(said[-1].get("content") or "")
        return label if isinstance(label, str) else "" if label is None else str(label)

    def read(self) -> tuple[list[Item], list[Item]]:
        """The items, and the worked examples.

        Raises:
            DataError: a row that cannot be used.
            SuiteError: no rows, too few examples, or an example that is also asked.
        """
        items = [self.item(row) for row in islice(read_rows(self.rows), self.limit)]
        if not items:
            raise SuiteError(f"{self.name}: {', '.join(self.rows)} hold no rows")
        examples: list[Item] = []
        for row in islice(read_rows(self.examples), self.shots) if self.shots else ():
            examples.append(self.item(row, example=True))
            if not examples[-1].answer.strip():
                raise row.error("a worked example without an answer: set example_answer, or give it a truth")
        if len(examples) < self.shots:
            raise SuiteError(
                f"{self.name}: shots = {self.shots}, but {', '.join(self.examples)} hold only {len(examples)}"
            )
        shown = {example.query: example.where for example in examples}
        for item in items:
            if item.query in shown:
                raise SuiteError(
                    f"{self.name}: {item.where} is also a worked example ({shown[item.query]}): its answer is shown"
                )
        return items, examples

    def asked(self, subject: Subject) -> Asked:
        """Every item with its examples as tokens.

        Raises:
            SuiteError: a prompt that leaves the model no room for an answer.
            DataError: a chat template that does not fit.
        """
        items, examples = self.read()
        ids, fewer = [], 0
        most = subject.model.settings.max_positions
        for item in items:
            for used in range(len(examples), -1, -1):
                tokens = self._tokens(subject, item, examples[:used])
                if len(tokens) + self.max_new_tokens <= most:
                    break
            if len(tokens) >= most:
                raise SuiteError(
                    f"{self.name}: {item.where}: the prompt has {len(tokens)} tokens without any example; the model "
                    f"takes {most} positions, prompt and answer together"
                )
            fewer += used < len(examples)
            ids.append(tokens)
        return Asked(items, examples, ids, fewer)

    def talks(self, subject: Subject) -> bool:
        """Whether prompts are put into the chat form."""
        return self.chat if self.chat is not None else subject.tokenizer.chat_template is not None

    def _tokens(self, subject: Subject, item: Item, examples: Sequence[Item]) -> list[int]:
        tokenizer, start = subject.tokenizer, self.answer_start
        try:
            if not self.talks(subject):
                text = as_text(examples, item, self.separator)
                return prompt_tokens(tokenizer, "".join(joined(text, start)) if start else text)
            if self.examples_as == "turns":
                turns = as_turns(examples, item)
            else:
                turns = [{"role": "user", "content": as_text(examples, item, self.separator)}]
            if self.system is not None and turns[0]["role"] != "system":
                turns.insert(0, {"role": "system", "content": self.system})
            ids = encode_chat(tokenizer, turns, add_generation_prompt=True).ids
            return [*ids, *tokenizer.encode(start)] if start else ids
        except DataError as error:
            raise SuiteError(f"{self.name}: {item.where}: {error}") from None

    def prepare(self, subject: Subject) -> Job:
        """Read the rows, check that their answers can be scored, and encode the prompts."""
        asked = self.asked(subject)
        for item in asked.items:
            try:
                self.check(item)
            except SuiteError:
                raise
            except UserError as error:
                raise SuiteError(f"{self.name}: {item.where}: {error}") from None
        ends = subject.end_ids | (end_of_turn(subject.tokenizer) if self.talks(subject) else frozenset())
        stop = StopRule(self.max_new_tokens, ends, self.stop)
        sampling = Sampling(temperature=self.temperature, top_p=self.top_p, seed=self.seed)
        key = answers_digest(subject, asked.ids, stop, sampling, self.samples)
        parts = [json.dumps([i.prompt, i.label, i.answer, i.row], default=str) for i in (*asked.examples, *asked.items)]

        def run(folder: Path, progress: Progress) -> Outcome:
            file = AnswerFile(folder / f"{file_name(self.name)}-{key[:12]}.jsonl")
            answers = write_answers(subject, asked.ids, stop, sampling, self.samples, file, progress)
            if self.answer_start:
                start = self.answer_start
                answers = [[Written(start + w.text, w.tokens, w.reason) for w in mine] for mine in answers]
            outcome = self.score(asked.items, answers)
            facts = {
                "rows": len(asked.items),
                "answers": self.samples * len(asked.items),
                "cut_answers": sum(one.cut for mine in answers for one in mine),
                "prompts_with_fewer_shots": asked.fewer_shots,
                **outcome.facts,
            }
            return Outcome(outcome.score, facts)

        return Job(digest_of(self, *parts), run)
