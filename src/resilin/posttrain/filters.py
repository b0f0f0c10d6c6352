"""Which written answers are worth learning from: what is empty, cut, refused or speaks of its own maker is left out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from resilin.config import Settings
from resilin.data.chat import check_messages
from resilin.data.errors import DataError
from resilin.data.row_files import Row
from resilin.posttrain.verifiers.refusal import begins_with_refusal

_MAKERS = r"(?:openai|anthropic|google|deepmind|meta|microsoft|mistral|alibaba|cohere|deepseek)"
_MODELS = r"(?:chatgpt|gpt-?[345]\w*|claude|gemini|bard|bing ?chat|copilot|llama|qwen|mistral|deepseek)"
_SELF = re.compile(
    r"\bas an? (?:ai|artificial intelligence|large language|language) ?(?:language )?(?:model|assistant)?\b"
    r"|\bi(?:['’]?m| am) (?:(?:just|only) )?an? (?:ai|artificial intelligence|(?:large )?language model)\b"
    rf"|\bi(?:['’]?m| am) {_MODELS}\b"
    rf"|\bi was (?:trained|developed|created|made|built) by {_MAKERS}\b"
    rf"|\b(?:trained|developed|created) by {_MAKERS},? (?:and )?i\b"
    r"|\bmy (?:knowledge cut-?off|training data|last (?:training|knowledge) update)\b",
    re.IGNORECASE,
)


def identifies_itself(text: str) -> bool:
    """Whether a text says that it was written by a model, or by whose: what a new model should not learn to say."""
    return _SELF.search(text) is not None


class AnswerFilters(Settings):
    """Which answers are kept."""

    min_words: Annotated[int, Field(ge=0)] = 1
    """An answer of fewer words is too short; one of none is empty whatever this is."""
    refusals: bool = False
    """Keep answers that begin with a usual phrase of refusal."""
    self_identification: bool = False
    """Keep answers that call themselves a model or name their maker."""
    cut: bool = False
    """Keep answers that ended for want of tokens."""

    def reason(self, text: str, finish_reason: str = "stop") -> str | None:
        """Why an answer is left out; None where it is kept."""
        words = len(text.split())
        if not words:
            return "empty"
        if words < self.min_words:
            return "too short"
        if finish_reason == "length" and not self.cut:
            return "cut"
        if not self.self_identification and identifies_itself(text):
            return "self-identification"
        if not self.refusals and begins_with_refusal(text):
            return "refused"
        return None


def filter_conversations(
    rows: Sequence[Row], filters: AnswerFilters, *, duplicates: bool = False
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows that are kept, and those left out, each with its `reason`.

    Args:
        rows: with `messages`.
        filters: which answers are kept; a conversation is kept if all of its answers are.
        duplicates: keep rows that differ from an earlier one only in case and white space.

    Raises:
        DataError: with file and line, for a row without messages.
    """
    kept: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    seen: set[str] = set()
    for row in rows:
        messages: Any = row.value.get("messages")
        try:
            check_messages(messages)
        except DataError as error:
            raise row.error(str(error)) from None
        key = plain_key([f"{m['role']}: {m.get('content')}" for m in messages])
        reason = conversation_reason(filters, messages)
        if reason is None and key in seen and not duplicates:
            reason = "duplicate"
        seen.add(key)
        if reason is None:
            kept.append(dict(row.value))
        else:
            left_out.append({**row.value, "reason": reason})
    return kept, left_out


def conversation_reason(filters: AnswerFilters, messages: Sequence[dict[str, Any]]) -> str | None:
    """Why a conversation is left out: for any answer in it, or for having none."""
    said = [m.get("content") for m in messages if isinstance(m, dict) and m.get("role") == "assistant"]
    if not said:
        return "no answer"
    for text in said:
        reason = filters.reason(text if isinstance(text, str) else "")
        if reason is not None:
            return reason
    return None


def plain_key(texts: Sequence[str]) -> str:
    """Equal for texts that differ only in case and white space: how duplicates are found."""
    return "\0".join(" ".join(text.casefold().split()) for text in texts)
