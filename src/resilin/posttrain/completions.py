"""Answers for prompts that have none, written by a teacher."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from resilin.config import Settings
from resilin.data.prompt_rows import read_prompt
from resilin.data.row_files import Row
from resilin.posttrain.filters import AnswerFilters
from resilin.teacher.chat import ChatTeacher
from resilin.teacher.request import Message, Plan, Request, message


@dataclass(slots=True)
class Completed:
    """Conversations, and what gave none.

    Attributes:
        rows: with `messages` that end with an answer.
        dropped: answers that were left out, by reason.
        failures: (place, reason) of requests without an answer; asking again asks only for these.
        kept: rows that had an answer before.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[str, str]] = field(default_factory=list)
    kept: int = 0


class CompletionSettings(Settings):
    """How answers are asked for."""

    model: str = ""
    """The endpoint's name for it."""
    system: str | None = None
    """A system message for conversations that have none."""
    temperature: Annotated[float, Field(ge=0)] = 0.7
    """Of sampling."""
    max_tokens: Annotated[int, Field(ge=1)] = 2048
    """Of an answer."""
    seed: int | None = None
    """Asks for the same answers again, where the endpoint can."""
    filters: AnswerFilters = AnswerFilters()
    """Which answers are kept."""


def has_answer(row: Row) -> bool:
    """Whether a row's messages already end with the assistant."""
    said = row.value.get("messages")
    return isinstance(said, list) and bool(said) and isinstance(said[-1], dict) and said[-1].get("role") == "assistant"


def prompt_messages(row: Row, system: str | None = None) -> list[Message]:
    """A row's prompt as the messages that are sent.

    Raises:
        DataError: with file and line, for a row without a prompt.
    """
    given = read_prompt(row).prompt
    messages = [message("user", given)] if isinstance(given, str) else [message(m["role"], m["content"]) for m in given]
    if system is not None and messages[0]["role"] != "system":
        messages.insert(0, message("system", system))
    return messages


def completion_requests(rows: Sequence[Row], how: CompletionSettings) -> list[Request]:
    """What is asked for the rows that have no answer, in order.

    Raises:
        DataError: with file and line, for a row without a prompt.
    """
    return [
        Request(
            tuple(prompt_messages(row, how.system)),
            how.model,
            temperature=how.temperature,
            max_tokens=how.max_tokens,
            seed=how.seed,
            tag=row.where,
        )
        for row in rows
        if not has_answer(row)
    ]


def plan_completions(rows: Sequence[Row], teacher: ChatTeacher, how: CompletionSettings) -> Plan:
    """What `complete` would cost."""
    return teacher.plan(completion_requests(rows, how))


def complete(rows: Sequence[Row], teacher: ChatTeacher, how: CompletionSettings) -> Completed:
    """The rows with an answer each, in their order; those that had one are left as they are."""
    done = Completed()
    replies = iter(teacher.ask(completion_requests(rows, how)))
    for row in rows:
        if has_answer(row):
            done.rows.append(dict(row.value))
            done.kept += 1
            continue
        reply = next(replies)
        if reply.error is not None:
            done.failures.append((row.where, reply.error))
            continue
        reason = how.filters.reason(reply.text, reply.finish_reasons[0])
        if reason is not None:
            done.dropped[reason] += 1
            continue
        messages = [*prompt_messages(row, how.system), message("assistant", reply.text.strip())]
        rest = {key: value for key, value in row.value.items() if key not in ("messages", "prompt")}
        done.rows.append({**rest, "messages": messages, "model": how.model})
    return done
