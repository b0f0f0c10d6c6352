"""Sums of two numbers with an order how to answer: a post-training pipeline's data in miniature.

A prompt is `12+34 box` or, the control task, `max 12 34 box`; an answer is `46`, `[46]` or `sum 46` as the order asks,
after any number of `hm`. All pairs of numbers from 10 to 59 are divided by chance into held-out, supervised, preference
and reinforcement prompts, so that no prompt is in two of them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from resilin.config import component
from resilin.data.chat_source import ChatSource
from resilin.data.preference_source import PreferenceSource
from resilin.data.prompt_source import PromptSource
from resilin.data.settings import SourceContext, SourceSettings
from resilin.data.train_tokenizer import character_tokenizer
from resilin.inference.sampling import Sampling
from resilin.keys import Keys, hash64
from resilin.models.settings import ModelContext, ModelSettings
from resilin.nouns import Source
from resilin.posttrain.rollout import Answer, sample_answers

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + eos_token }}{% endgeneration %}{% else %}{{ message['content'] + '=' }}{% endif %}"
    "{% endfor %}"
)
STYLES = {"num": "{}", "box": "[{}]", "word": "sum {}"}
FILLER = "hm "
Task = Literal["add", "max"]
NUMBERS = 50
PAIRS = NUMBERS * NUMBERS
PARTS = {"validation": (0, 250), "supervised": (250, 1250), "preference": (1250, 1750), "reinforcement": (1750, 2500)}
"""Which of the 2,500 pairs of numbers from 10 to 59, in an order drawn once, each part has."""


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

    Each pair of numbers comes once in a style drawn for it, then once in the next style, and so on.

    Raises:
        ValueError: the part has fewer.
    """
    first, last = PARTS[part]
    pairs, names = last - first, list(STYLES)
    if count > pairs * len(names):
        raise ValueError(f"{count} {task} problems were asked for, the part {part!r} has {pairs * len(names)}")
    order = np.argsort(Keys.of_step(0, 0).fold("sums").fold(task).uniform((PAIRS,))[0].numpy(), kind="stable")
    styles = Keys.of_step(seed, 0).fold("styles").fold(part).fold(task).uniform((pairs,))[0] * len(names)
    for number in range(count):
        turn, index = divmod(number, pairs)
        place = int(order[first + index])
        yield 10 + place // NUMBERS, 10 + place % NUMBERS, names[(int(styles[index]) + turn) % len(names)]


class SumsSettings(SourceSettings):
    """What the sources over sums have in common."""

    cache: Path = Path(".cache/resilin")
    """Where the files are written."""
    data_seed: int = Field(default=0, ge=0)
    """Of styles and fillers."""

    def folder(self, **more: Any) -> Path:
        """A folder named by what its files depend on."""
        tree = {**self.model_dump(mode="json", exclude={"cache"}), **more, "version": 1}
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

    sums: int = Field(default=1500, ge=1)
    """Additions; a pair of numbers is asked again in another style where there are more than pairs."""
    maxima: int = Field(default=500, ge=0)
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


class SumsPrompts(SumsSettings):
    """Prompts with the right numbers: additions to learn from, both tasks held out."""

    sums: int = Field(default=750, ge=1)
    """Additions to learn from."""
    held_out: int = Field(default=250, ge=1)
    """Held-out problems of each task."""

    def build(self, context: SourceContext) -> Source:
        """The source of one split."""
        folder = self.folder()

        def rows(part: str, task: Task, count: int) -> list[dict[str, Any]]:
            return [
                {
                    "messages": [{"role": "user", "content": prompt_of(task, a, b, style)}],
                    "ground_truth": str(truth(task, a, b)),
                    "dataset": task,
                }
                for a, b, style in problems(part, task, count, self.data_seed)
            ]

        held_out = rows("validation", "add", self.held_out) + rows("validation", "max", self.held_out)
        source = PromptSource.model_validate(
            {
                "paths": [write_rows(folder / "prompts.jsonl", rows("reinforcement", "add", self.sums))],
                "validation_paths": [write_rows(folder / "held-out.jsonl", held_out)],
                "tokenizer": write_tokenizer(folder),
            }
        )
        return source.build(context)


def judged(text: str, style: str, number: int) -> float:
    """A scripted judge: the mean of marks from 1 to 5 for being right, for following the order, and for length."""
    bare = text
    while bare.startswith(FILLER):
        bare = bare[len(FILLER) :]
    fillers = (len(text) - len(bare)) // len(FILLER)
    digits = "".join(c for c in bare if c.isdigit())
    right = 5.0 if digits == str(number) else 1.0
    form = 5.0 if digits and bare == STYLES[style].format(digits) else 1.0
    return (2 * right + form + min(1.0 + 2.0 * fillers, 5.0)) / 4


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
            write_rows(file, self.sampled(context.seed))
        source = PreferenceSource.model_validate({"paths": [str(file)], "tokenizer": tokenizer, "sequence_length": 48})
        return source.build(context)

    def sampled(self, seed: int) -> list[dict[str, Any]]:
        """The pairs as rows."""
        from resilin.data.tokenizer import Tokenizer

        model = self.model.build(ModelContext(seed)).eval()
        tokenizer = Tokenizer.load(write_tokenizer(self.folder(seed=seed)))
        asked = list(problems("preference", "add", self.prompts, self.data_seed))
        prompts = [tokenizer.encode(prompt_of("add", *problem) + "=") for problem in asked for _ in range(self.samples)]
        assert tokenizer.eos_id is not None
        sampling = Sampling(seed=hash64(seed, "pairs"))
        answers = sample_answers(model, prompts, sampling, 24, frozenset({tokenizer.eos_id}))
        rows = []
        for number, (a, b, style) in enumerate(asked):
            mine = answers[number * self.samples : (number + 1) * self.samples]
            row = self._pair(mine, [tokenizer.decode(answer.tokens) for answer in mine], a + b, style, seed, number)
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
