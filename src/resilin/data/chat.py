"""Conversations as token ids, with a mask of what the assistant wrote.

The text is rendered by the tokenizer's own Jinja template (sandboxed: a template may come from a stranger), or by
ChatML. What the assistant wrote is found by the template's `{% generation %}` marks where it has them, otherwise by
rendering the conversation up to each turn; the mask covers the turn's text and the token that ends the turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from resilin.data.errors import DataError

if TYPE_CHECKING:
    from resilin.data.tokenizer import Tokenizer

Message = Mapping[str, Any]
"""`role` ("system", "user", "assistant", ...) and `content` (text); templates may know further keys."""

TrainOn = Literal["assistant", "last", "all"]

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The template of tokenizers that bring none."""


@dataclass(frozen=True, slots=True)
class ChatTokens:
    """A conversation.

    Attributes:
        ids: its tokens.
        units: one for each token: True where it is to be learnt.
    """

    ids: list[int]
    units: list[bool]


# Noncharacters: no valid text holds them, so they can mark what is generated while a conversation is rendered.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"


def _refuse(message: str) -> None:
    raise DataError(f"the chat template refuses the conversation: {message}")


@lru_cache(maxsize=8)
def _compile(template: str) -> Callable[..., str]:
    """The template as a function of its variables; what it generates stands between the two marks."""
    import json

    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 - the attribute Jinja reads

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

        def mark(self, caller: Callable[[], str]) -> str:
            return f"{_OPEN}{caller()}{_CLOSE}"

    # A date function is left out on purpose: the same conversation must give the same tokens tomorrow.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = _refuse
    try:
        compiled = environment.from_string(template)
    except TemplateError as error:
        raise DataError(f"the chat template is not valid Jinja: {error}") from None

    def render(**variables: Any) -> str:
        try:
            return compiled.render(**variables)
        except (TemplateError, TypeError) as error:
            raise DataError(f"the chat template fails on this conversation: {error}") from None

    return render


def check_messages(messages: Any) -> None:
    """Refuse what is not a conversation.

    Raises:
        DataError: naming the message and what it should hold.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError("messages should be a list of at least one message")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(f"messages[{number}] should be an object with role and content, not {message!r:.80}")
        content = message.get("content", 0)
        if not isinstance(content, str | list | None):
            raise DataError(f"messages[{number}] ({message['role']}) should have text as its content")
        if isinstance(content, str) and (_OPEN in content or _CLOSE in content):
            raise DataError(f"messages[{number}] holds the noncharacter U+FDD0 or U+FDD1, which is no text")


def _without_marks(text: str) -> tuple[str, list[tuple[int, int]]]:
    """The text between and around the marks, and where the generated spans lie in it."""
    parts, spans, at = [], [], 0
    for index, part in enumerate(text.replace(_CLOSE, _OPEN).split(_OPEN)):
        if index % 2 == 1:
            spans.append((at, at + len(part)))
        parts.append(part)
        at += len(part)
    return "".join(parts), spans


def _spans_by_prefix(render: Callable[..., str], messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
    """Where the assistant's turns lie: what each adds to the conversation before it and the turn's opening."""
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(messages=list(messages[:number]), add_generation_prompt=True)
        after = render(messages=list(messages[: number + 1]), add_generation_prompt=False)
        if not (after.startswith(before) and text.startswith(after)):
            raise DataError(
                f"messages[{number}]: the chat template changes earlier turns once later ones follow, so what the "
                "assistant wrote cannot be told apart: use train_on=all, or put {% generation %} marks into it"
            )
        spans.append((len(before), len(before) + len(after[len(before) :].rstrip())))
    return spans


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    train_on: TrainOn = "assistant",
    add_generation_prompt: bool = False,
) -> ChatTokens:
    """A conversation as ids and mask.

    Args:
        tokenizer: its chat template is used; ChatML where it has none.
        messages: the conversation.
        train_on: learn what the assistant wrote, only its last turn, or every token.
        add_generation_prompt: end with the opening of the assistant's next turn; nothing is then to be learnt.

    Raises:
        DataError: for messages that are none, a template that fails, or ChatML without its tokens.
    """
    check_messages(messages)
    template = tokenizer.chat_template
    if template is None:
        if tokenizer.inner.token_to_id("<|im_start|>") is None or tokenizer.inner.token_to_id("<|im_end|>") is None:
            raise DataError("the tokenizer has no chat template and lacks ChatML's tokens <|im_start|>, <|im_end|>")
        template = CHATML
    compiled = _compile(template)
    names = {
        f"{kind}_token": "" if token is None else tokenizer.inner.id_to_token(token)
        for kind, token in (("eos", tokenizer.eos_id), ("bos", tokenizer.bos_id), ("pad", tokenizer.pad_id))
    }

    def render(**variables: Any) -> str:
        return compiled(**names, **variables)

    text, spans = _without_marks(render(messages=list(messages), add_generation_prompt=add_generation_prompt))
    encoding = tokenizer.inner.encode(text, add_special_tokens=False)
    ids = list(encoding.ids)
    if add_generation_prompt:
        return ChatTokens(ids, [False] * len(ids))
    if train_on == "all":
        return ChatTokens(ids, [True] * len(ids))
    if not spans:
        spans = _spans_by_prefix(render, messages, text)
    if train_on == "last":
        spans = spans[-1:]
    units = [any(first <= start < last for first, last in spans) for start, _ in encoding.offsets]
    return ChatTokens(ids, units)
