"""Sums of two numbers with an order how to answer: a post-training pipeline's data in miniature.

A prompt is `12+34 box` or, the control task, `max 12 34 box`; an answer is `46`, `[46]` or `sum 46` as the order asks,
after any number of `hm`. All pairs of different numbers of two digits, either first, are divided by chance into
held-out, supervised, preference and reinforcement pairs: no prompt, nor its mirror image, is in two of these parts.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field
from torch import nn

from resilin.config import component
from resilin.data.chat_source import ChatSource
from resilin.data.preference_source import PreferenceSource
from resilin.data.prompt_source import PromptSource
from resilin.data.settings import SourceContext, SourceSettings
from resilin.data.tokenizer import Tokenizer
from resilin.data.train_tokenizer import character_tokenizer
from resilin.inference.sampling import GREEDY, Sampling
from resilin.keys import Keys, hash64
from resilin.models.settings import ModelContext, ModelSettings
from resilin.nouns import Source
from resilin.posttrain.rollout import Answer, sample_answers
from resilin.recipes.tulu3.judge import FILLER, STYLES, contest, judged

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + eos_token }}{% endgeneration %}{% else %}{{ message['content'] + '=' }}{% endif %}"
    "{% endfor %}"
)
Task = Literal["add", "max"]
MOST_TOKENS = 24
"""Of an answer; the longest of the supervised ones has 14."""
LEAST, NUMBERS = 10, 90
PAIRS = NUMBERS * (NUMBERS - 1) // 2
PARTS = {
    "validation": (0, 250),
    "supervised": (250, 1750),
    "preference": (1750, 2750),
    "reinforcement": (2750, PAIRS),
}
"""Which of the 4,005 pairs of different numbers from 10 to 99, in an order drawn once, each part has."""
FORMS = 2 * len(STYLES)
"""Prompts that one pair makes: each style, and either number first."""


def truth(task: Task, a: int, b: int) -> int:
    """The right number."""
    return a + b if task == "add" else max(a, b)


def prompt_of(task: Task, a: int, b: int, style: str) -> str:
    """The text of a prompt, without the sign that ends it."""
    return f"{a}+{b} {style}" if task == "add" else f"max {a} {b} {style}"


def answer_of(number: int, style: str, fillers: int) -> str:
    """A right answer."""
    return FILLER * fillers + STYLES[style].format(number)


def problems(part: str, task: Task, count: int, seed: int = 0) -> Iterator[tuple[int, int, str]]:
    """The first `count` problems of a part: two numbers and the style of the answer.

    Each pair of numbers comes once in a form (a style, and which number is first) drawn for it, then once in the next
    form, and so on.

    Raises:
        ValueError: the part has fewer.
    """
    first, last = PARTS[part]
    pairs, names = last - first, list(STYLES)
    if count > pairs * FORMS:
        raise ValueError(f"{count} {task} problems were asked for, the part {part!r} has {pairs * FORMS}")
    numbers = list(itertools.combinations(range(LEAST, LEAST + NUMBERS), 2))
    order = np.argsort(Keys.of_step(0, 0).fold("sums").fold(task).uniform((PAIRS,))[0].numpy(), kind="stable")
    forms = (Keys.of_step(seed, 0).fold("forms").fold(part).fold(task).uniform((pairs,))[0] * FORMS).long().tolist()
    for number in range(count):
        turn, index = divmod(number, pairs)
        mirrored, style = divmod((forms[index] + turn) % FORMS, len(names))
        a, b = numbers[order[first + index]]
        yield (b, a, names[style]) if mirrored else (a, b, names[style])


class SumsSettings(SourceSettings):
    """What the sources over sums have in common."""

    cache: Path = Path(".cache/resilin")
    """Where the files are written."""
    data_seed: int = Field(default=0, ge=0)
    """Of styles and fillers."""

    def folder(self, **more: Any) -> Path:
        """A folder named by what its files depend on."""
        tree = {**self.model_dump(mode="json", exclude={"cache"}), **more, "version": 2}
        return self.cache / f"sums-{hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]}"


def write_rows(file: Path, rows: list[dict[str, Any]]) -> str:
    """Write rows as JSON lines, whole or not at all; the path as text."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    temporary.replace(file)
    return str(file)


def write_tokenizer(folder: Path) -> Path:
    """The tokenizer of characters with the template, in a folder."""
    made = character_tokenizer(["0123456789+=[] abdehmnorsuwx"])
    made.config["chat_template"] = TEMPLATE
    made.save(folder / "tokenizer")
    return folder / "tokenizer"


class SumsChat(SumsSettings):
    """Right answers to learn from: supervised fine-tuning."""

    sums: int = Field(default=1250, ge=1)
    """Additions; a pair of numbers is asked again in another style where there are more than pairs."""
    maxima: int = Field(default=750, ge=0)
    """Problems of the control task."""
    fillers: int = Field(default=2, ge=0)
    """An answer begins with none to this many `hm`, each number as often."""

    def build(self, context: SourceContext) -> Source:
        """The source of one split."""
        folder = self.folder()
        rows = []
        tasks: tuple[tuple[Task, int], ...] = (("add", self.sums), ("max", self.maxima))
        for task, count in tasks:
            keys = Keys.of_step(self.data_seed, 0).fold("fillers").fold(task)
            counts = (keys.uniform((max(count, 1),))[0] * (self.fillers + 1)).long().tolist()
            for (a, b, style), fillers in zip(
                problems("supervised", task, count, self.data_seed), counts, strict=False
            ):
                answer = answer_of(truth(task, a, b), style, fillers)
                turns = [("user", prompt_of(task, a, b, style)), ("assistant", answer)]
                rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
        source = ChatSource.model_validate(
            {
                "paths": [write_rows(folder / "chat.jsonl", rows)],
                "tokenizer": {"path": write_tokenizer(folder)},
                "packing": "pad",
                "sequence_length": 28,
                "separate_documents": False,
                "workers": 1,
                "cache": self.cache,
            }
        )
        return source.build(context)


def answers_of(
    model: nn.Module, tokenizer: Path, problems_asked: Sequence[tuple[int, int, str]], sampling: Sampling
) -> tuple[list[Answer], list[str]]:
    """A model's answers to additions, and their texts."""
    known = Tokenizer.load(tokenizer)
    assert known.eos_id is not None
    prompts = [known.encode(prompt_of("add", *problem) + "=") for problem in problems_asked]
    answers = sample_answers(model.eval(), prompts, sampling, MOST_TOKENS, frozenset({known.eos_id}))
    return answers, [known.decode(answer.tokens) for answer in answers]


class SumsPrompts(SumsSettings):
    """Prompts with the right numbers: additions to learn from, both tasks held out.

    The name in a row's `dataset` is its task: `add`, `max`, or `win`, where an answer is compared with a rival's.
    """

    sums: int = Field(default=3765, ge=1)
    """Additions to learn from."""
    held_out: int = Field(default=250, ge=1)
    """Held-out problems of each task."""
    rival: Annotated[ModelSettings, component("resilin.recipes.stage:Stage")] | None = None
    """A model whose greedy answers to the held-out additions are what `win` compares with; None: no such rows."""

    def build(self, context: SourceContext) -> Source:
        """The source of one split; on the first use the rival answers."""
        folder = self.folder(seed=context.seed)
        tokenizer = write_tokenizer(folder)
        file = folder / f"{context.split}.jsonl"
        if not file.is_file():
            write_rows(file, self._held_out(context.seed, tokenizer) if context.split == "validation" else self._rows())
        paths = {"paths": [str(file)], "validation_paths": [str(file)]}  # each split has a file, all of it its own
        return PromptSource.model_validate({**paths, "tokenizer": tokenizer}).build(context)

    def _rows(self) -> list[dict[str, Any]]:
        return [_row("add", *problem) for problem in problems("reinforcement", "add", self.sums, self.data_seed)]

    def _held_out(self, seed: int, tokenizer: Path) -> list[dict[str, Any]]:
        tasks: tuple[Task, ...] = ("add", "max")
        asked = {task: list(problems("validation", task, self.held_out, self.data_seed)) for task in tasks}
        rows = [_row(task, *problem) for task in tasks for problem in asked[task]]
        if self.rival is not None:
            _, texts = answers_of(self.rival.build(ModelContext(seed)), tokenizer, asked["add"], GREEDY)
            for (a, b, style), text in zip(asked["add"], texts, strict=True):
                rows.append(_row("add", a, b, style) | {"dataset": "win", "ground_truth": contest(a + b, style, text)})
        return rows


def _row(task: Task, a: int, b: int, style: str) -> dict[str, Any]:
    said = [{"role": "user", "content": prompt_of(task, a, b, style)}]
    return {"messages": said, "ground_truth": str(truth(task, a, b)), "dataset": task}


class SumsPairs(SumsSettings):
    """Pairs among answers that an earlier model gives to further prompts, as a scripted judge likes them.

    The best of each prompt's answers is chosen, a random one with a lower mark rejected; prompts whose answers all get
    one mark, and best answers that did not end, give no pair.
    """

    model: Annotated[ModelSettings, component("resilin.recipes.stage:Stage")]
    """Whose answers they are."""
    prompts: int = Field(default=1000, ge=1)
    """Additions that are answered."""
    samples: int = Field(default=4, ge=2)
    """Answers to each."""

    def build(self, context: SourceContext) -> Source:
        """The source of one split; samples the answers on the first use."""
        folder = self.folder(seed=context.seed)
        tokenizer = write_tokenizer(folder)
        file = folder / "pairs.jsonl"
        if not file.is_file():
            write_rows(file, self.sampled(context.seed, tokenizer))
        source = PreferenceSource.model_validate({"paths": [str(file)], "tokenizer": tokenizer, "sequence_length": 48})
        return source.build(context)

    def sampled(self, seed: int, tokenizer: Path) -> list[dict[str, Any]]:
        """The pairs as rows."""
        asked = list(problems("preference", "add", self.prompts, self.data_seed))
        each = [problem for problem in asked for _ in range(self.samples)]
        sampling = Sampling(seed=hash64(seed, "pairs"))
        answers, texts = answers_of(self.model.build(ModelContext(seed)), tokenizer, each, sampling)
        rows = []
        for number, (a, b, style) in enumerate(asked):
            mine = slice(number * self.samples, (number + 1) * self.samples)
            row = self._pair(answers[mine], texts[mine], a + b, style, seed, number)
            if row is not None:
                rows.append({"prompt": [{"role": "user", "content": prompt_of("add", a, b, style)}], **row})
        return rows

    @staticmethod
    def _pair(
        answers: list[Answer], texts: list[str], number: int, style: str, seed: int, place: int
    ) -> dict[str, Any] | None:
        marks = [judged(text, style, number) for text in texts]
        best = max(range(len(marks)), key=marks.__getitem__)
        lower = [index for index, mark in enumerate(marks) if mark < marks[best] and texts[index].strip()]
        if not lower or not answers[best].stopped:
            return None
        other = lower[Keys.of_step(seed, place).fold("rejected").integer(len(lower))]
        said = {"chosen": texts[best], "rejected": texts[other]}
        return {side: [{"role": "assistant", "content": text}] for side, text in said.items()}
