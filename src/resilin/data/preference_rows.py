"""Rows that hold two answers to a prompt, in the forms other trainers use, and from one form to another.

| form | columns |
|---|---|
| TRL, verl, plain | `prompt`, `chosen`, `rejected`: texts |
| TRL, conversation | `prompt`: messages; `chosen`, `rejected`: the messages that answer them |
| TRL, implicit prompt | `chosen`, `rejected`: texts or messages that begin alike |
| open-instruct | `chosen`, `rejected`: whole conversations |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from resilin.data.errors import DataError
from resilin.data.row_files import Row
from resilin.data.row_messages import Messages, messages_in

Form = Literal["trl", "open-instruct", "verl"]


@dataclass(frozen=True, slots=True)
class Preference:
    """A prompt with a better and a worse answer; all three are texts, or all three are lists of messages.

    Attributes:
        prompt: what was asked; of messages, those before the answer.
        chosen: the better answer.
        rejected: the worse one.
    """

    prompt: str | Messages
    chosen: str | Messages
    rejected: str | Messages


def _answer(row: Row, key: str) -> str | Messages:
    value = row.value.get(key)
    if value is None or (isinstance(value, str | list) and not value):
        keys = ", ".join(sorted(row.value)) or "none"
        missing = "is empty" if value is not None else "is missing"
        raise row.error(
            f"the {key} answer {missing} (column {key!r}; columns here: {keys}): a preference row needs a prompt, a "
            "chosen and a rejected answer; mend or leave out the row"
        )
    if isinstance(value, str):
        if not value.strip():
            raise row.error(f"the {key} answer holds only white space")
        return value
    return messages_in(row, key, value)


def _split_messages(row: Row, chosen: Messages, rejected: Messages) -> Preference:
    """Two whole conversations: all but what follows the last common message but the answers is the prompt."""
    same = 0
    while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
        same += 1
    while same > 0 and (same >= min(len(chosen), len(rejected)) or chosen[same - 1]["role"] == "assistant"):
        # Two equal answers, or a turn of the assistant that both begin with, still need an answer behind the prompt.
        same -= 1
    if same == 0:
        raise row.error(
            "chosen and rejected do not begin with the same prompt: expected whole conversations that differ in the "
            "answer, or a prompt column beside two answers"
        )
    return Preference(chosen[:same], chosen[same:], rejected[same:])


def _split_texts(row: Row, chosen: str, rejected: str) -> Preference:
    same = 0
    while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
        same += 1
    if same and chosen[same - 1] == " ":
        same -= 1  # a space belongs to the word behind it
    if same == 0:
        raise row.error("there is no prompt column, and chosen and rejected do not begin with the same prompt")
    made = Preference(chosen[:same], chosen[same:], rejected[same:])
    if not made.chosen or not made.rejected:
        raise row.error("there is no prompt column, and one answer is the beginning of the other: add a prompt column")
    return made


def read_preference(row: Row) -> Preference:
    """The preference a row holds, whatever its form.

    Raises:
        DataError: with file and line, for a missing or empty answer, messages that are none, mixed forms, answers
            that do not end with the assistant, or conversations that do not share their prompt.
    """
    chosen, rejected = _answer(row, "chosen"), _answer(row, "rejected")
    prompt = row.value.get("prompt")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise row.error("chosen and rejected should both be texts or both be messages")
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            return _split_texts(row, chosen, rejected)
        if isinstance(prompt, str):
            return Preference(prompt, chosen, rejected)
        given = messages_in(row, "prompt", prompt)  # verl: messages before, texts behind
        return Preference(given, _said(chosen), _said(rejected))
    assert isinstance(chosen, list)
    assert isinstance(rejected, list)
    whole = chosen[0]["role"] in ("system", "user")
    if whole:
        made = _split_messages(row, chosen, rejected)
    elif isinstance(prompt, list):
        made = Preference(messages_in(row, "prompt", prompt), chosen, rejected)
    elif isinstance(prompt, str) and prompt.strip():
        made = Preference([{"role": "user", "content": prompt}], chosen, rejected)
    else:
        raise row.error("chosen begins with an answer and there is no prompt column (text or messages)")
    for name, answer in (("chosen", made.chosen), ("rejected", made.rejected)):
        last = answer[-1]
        assert isinstance(last, dict)
        if last["role"] != "assistant":
            raise row.error(
                f"{name} ends with a message of {last['role']!r}; it should end with the assistant's answer"
            )
        if not isinstance(last.get("content"), str) or not last["content"].strip():
            raise row.error(f"the {name} answer has no text")
    return made


def _said(text: str) -> Messages:
    return [{"role": "assistant", "content": text}]


def write_preference(preference: Preference, form: Form) -> dict[str, Any]:
    """A preference as a row in the form of another trainer.

    Args:
        preference: what to write.
        form: `trl` keeps texts as texts and messages as prompt and answers; `open-instruct` writes whole
            conversations (texts become a user's and an assistant's message); `verl` writes texts, or the prompt's
            messages beside answers in plain text.

    Raises:
        DataError: an answer of several messages has no plain-text form (verl).
    """
    prompt, chosen, rejected = preference.prompt, preference.chosen, preference.rejected
    if form == "trl":
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    if form == "verl":
        return {"prompt": prompt, "chosen": _plain(chosen), "rejected": _plain(rejected)}
    begun = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    asked = next((m["content"] for m in begun if m["role"] == "user"), "")
    return {"prompt": asked, "chosen": [*begun, *_as_messages(chosen)], "rejected": [*begun, *_as_messages(rejected)]}


def convert_preference(row: Row, form: Form) -> dict[str, Any]:
    """A row in the form of another trainer, with all its further columns.

    Raises:
        DataError: with file and line, as `read_preference` and `write_preference`.
    """
    preference = read_preference(row)
    try:
        written = write_preference(preference, form)
    except DataError as error:
        raise row.error(str(error)) from None
    rest = {key: value for key, value in row.value.items() if key not in ("prompt", "chosen", "rejected")}
    return {**rest, **written}


def _as_messages(answer: str | Messages) -> Messages:
    return _said(answer) if isinstance(answer, str) else answer


def _plain(answer: str | Sequence[Mapping[str, Any]]) -> str:
    if isinstance(answer, str):
        return answer
    if len(answer) != 1:
        raise DataError(f"an answer of {len(answer)} messages has no plain-text form: write trl or open-instruct")
    return str(answer[0]["content"])
