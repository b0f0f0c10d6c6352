"""What is asked of a model, one row at a time, and how worked examples stand before it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from resilin.data.errors import DataError
from resilin.evaluate.multiple_choice import joined

Messages = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Item:
    """One row as it is asked.

    Attributes:
        prompt: a text, or messages that end before the assistant's turn.
        query: the prompt as plain text.
        label: what the answer is held against.
        answer: of a worked example; of others "".
        row: its columns.
        where: file and line.
    """

    prompt: str | Messages
    query: str
    label: Any
    answer: str
    row: Mapping[str, Any]
    where: str


def as_text(examples: Sequence[Item], item: Item, separator: str) -> str:
    """The examples with their answers, and the question, as one text.

    Raises:
        DataError: a prompt is a conversation of several messages.
    """
    shown = ["".join(joined(_plain(example), example.answer)) for example in examples]
    return separator.join([*shown, _plain(item)])


def as_turns(examples: Sequence[Item], item: Item) -> Messages:
    """The examples as earlier turns of a conversation; of system messages the question's own alone, at the front."""
    turns: Messages = []
    for example in examples:
        turns += [m for m in _messages(example) if m["role"] != "system"]
        turns.append({"role": "assistant", "content": example.answer})
    own = _messages(item)
    return [*(m for m in own if m["role"] == "system"), *turns, *(m for m in own if m["role"] != "system")]


def _messages(item: Item) -> Messages:
    return [{"role": "user", "content": item.prompt}] if isinstance(item.prompt, str) else list(item.prompt)


def _plain(item: Item) -> str:
    prompt = item.prompt
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and isinstance(prompt[0].get("content"), str):
        return str(prompt[0]["content"])
    raise DataError(
        f"{item.where}: the prompt is a conversation of {len(prompt)} messages, which has no plain form: set chat = "
        "true, or write the prompt from its columns"
    )


def one_group(pattern: str) -> re.Pattern[str]:
    """A regular expression with exactly one group.

    Raises:
        ValueError: it is none.
    """
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
    if compiled.groups != 1:
        raise ValueError(f"{pattern!r} should have one group (what stands in it is taken), not {compiled.groups}")
    return compiled
