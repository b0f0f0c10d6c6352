"""Rows that hold one conversation to be learnt, in the forms other trainers use, and from one form to another.

| form | columns |
|---|---|
| open-instruct, plain | `messages` |
| TRL | `prompt` and `completion`: messages, or texts |
| verl | `prompt` and `response`: texts |
| ShareGPT | `conversations`: objects of `from` (system, human, gpt) and `value` |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from resilin.data.errors import DataError
from resilin.data.row_files import Row
from resilin.data.row_messages import Messages, messages_in

ConversationForm = Literal["open-instruct", "trl", "verl", "sharegpt"]

_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
_NAMES = {"user": "human", "assistant": "gpt", "system": "system"}
_COLUMNS = {
    "open-instruct": ("messages",),
    "trl": ("prompt", "completion"),
    "verl": ("prompt", "response"),
    "sharegpt": ("conversations",),
}


def conversation_form(value: Mapping[str, Any]) -> ConversationForm | None:
    """The form whose columns a row has; None where it has those of none."""
    forms: tuple[ConversationForm, ...] = ("open-instruct", "sharegpt", "trl", "verl")
    return next((form for form in forms if all(value.get(column) is not None for column in _COLUMNS[form])), None)


def read_conversation(row: Row) -> Messages:
    """The conversation a row holds, whatever its form; it ends with the assistant.

    Raises:
        DataError: with file and line, for a row without the columns of a form, broken messages, an unknown speaker, or
            a conversation without an answer at its end.
    """
    value, form = row.value, conversation_form(row.value)
    if form is None:
        keys = ", ".join(sorted(value)) or "none"
        raise row.error(
            "no conversation: expected messages, conversations, prompt and completion, or prompt and response; columns "
            f"here: {keys}"
        )
    if form == "open-instruct":
        messages = messages_in(row, "messages", value["messages"])
    elif form == "sharegpt":
        messages = _from_sharegpt(row, value["conversations"])
    else:
        asked, said = (value[column] for column in _COLUMNS[form])
        before = [_said("user", asked)] if isinstance(asked, str) else messages_in(row, "prompt", asked)
        after = [_said("assistant", said)] if isinstance(said, str) else messages_in(row, _COLUMNS[form][1], said)
        messages = [*before, *after]
    if messages[-1]["role"] != "assistant" or not str(messages[-1].get("content") or "").strip():
        raise row.error("the conversation should end with an answer of the assistant that is not empty")
    return messages


def _said(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


def _from_sharegpt(row: Row, value: Any) -> Messages:
    if not isinstance(value, list) or not value:
        raise row.error("conversations should be a list of at least one object with from and value")
    messages = []
    for number, turn in enumerate(value):
        speaker, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if speaker not in _ROLES or not isinstance(text, str):
            raise row.error(
                f"conversations[{number}] should have from ({', '.join(_ROLES)}) and value (a text), not {turn!r:.60}"
            )
        messages.append(_said(_ROLES[speaker], text))
    return messages


def write_conversation(messages: Messages, form: ConversationForm) -> dict[str, Any]:
    """A conversation as a row in the form of another trainer.

    Raises:
        DataError: a conversation of several turns, or with a system message, has no form in plain texts (verl); a role
            that ShareGPT does not know.
    """
    if form == "open-instruct":
        return {"messages": messages}
    if form == "trl":
        return {"prompt": messages[:-1], "completion": messages[-1:]}
    if form == "sharegpt":
        unknown = next((m["role"] for m in messages if m["role"] not in _NAMES), None)
        if unknown is not None:
            raise DataError(f"a message of {unknown!r} has no form in ShareGPT: write open-instruct or trl")
        return {"conversations": [{"from": _NAMES[m["role"]], "value": m["content"]} for m in messages]}
    if [m["role"] for m in messages] != ["user", "assistant"]:
        roles = ", ".join(m["role"] for m in messages)
        raise DataError(f"a conversation of {roles} has no form as prompt and response: write open-instruct or trl")
    return {"prompt": messages[0]["content"], "response": messages[1]["content"]}


def convert_conversation(row: Row, form: ConversationForm) -> dict[str, Any]:
    """A row in the form of another trainer, with all its further columns.

    Raises:
        DataError: with file and line, as `read_conversation` and `write_conversation`.
    """
    messages, own = read_conversation(row), conversation_form(row.value)
    assert own is not None
    try:
        written = write_conversation(messages, form)
    except DataError as error:
        raise row.error(str(error)) from None
    rest = {key: value for key, value in row.value.items() if key not in _COLUMNS[own]}
    return {**rest, **written}
