"""Conversations as token ids, with a mask of what the assistant wrote.

The text is rendered by a Jinja template (sandboxed: a template may come from a stranger): the tokenizer's own, ChatML
where it has none, or one that is given. What the assistant wrote is found by the template's `{% generation %}` marks
where it has them, otherwise by rendering the conversation up to each turn; the mask covers the turn's text and the
token that ends the turn.

Two things are checked for each conversation, since what is learnt must be what is met when answers are generated: no
message is lost on the way to tokens, and what stands before an answer is exactly the prompt it would be generated from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from resilin.data.chat_templates import CHATML, TULU
from resilin.data.errors import DataError

if TYPE_CHECKING:
    from resilin.data.tokenizer import Tokenizer

Message = Mapping[str, Any]
"""`role` ("system", "user", "assistant", ...) and `content` (text); templates may know further keys."""

TrainOn = Literal["assistant", "last", "all"]


@dataclass(frozen=True, slots=True)
class ChatTokens:
    """A conversation.

    Attributes:
        ids: its tokens.
        units: one for each token: True where it is to be learnt.
    """

    ids: list[int]
    units: list[bool]

    @property
    def labels(self) -> list[int]:
        """The ids to be learnt at their own places, and -100 at all others."""
        return [token if unit else -100 for token, unit in zip(self.ids, self.units, strict=True)]


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


def _turns(
    render: Callable[..., str], messages: Sequence[Message], text: str, numbers: Sequence[int]
) -> list[tuple[int, int]]:
    """Where some of the assistant's turns lie: what each adds to the prompt it would be generated from.

    Raises:
        DataError: for a turn before which the text is another than that prompt.
    """
    spans = []
    for number in numbers:
        before = render(messages=list(messages[:number]), add_generation_prompt=True) if number else ""
        after = render(messages=list(messages[: number + 1]), add_generation_prompt=False)
        if not (after.startswith(before) and text.startswith(after)):
            raise DataError(
                f"messages[{number}]: the chat template changes earlier turns once later ones follow, so what the "
                "assistant wrote there does not stand behind the prompt it would answer: use train_on=last or all, or "
                "another template (tulu, chatml)"
            )
        spans.append((len(before), len(before) + len(after[len(before) :].rstrip())))
    return spans


_TEXT_ROLES = ("system", "user", "assistant")


def _check_nothing_lost(messages: Sequence[Message], text: str, learnt: str | None) -> None:
    """Every message's text is there, and every assistant's under the mask.

    Raises:
        DataError: naming the message that the template leaves out or rewrites.
    """
    needed: dict[str, int] = {}
    for number, message in enumerate(messages):
        content = message.get("content")
        if not isinstance(content, str) or message["role"] not in _TEXT_ROLES or not (kept := content.strip()):
            continue
        needed[kept] = needed.get(kept, 0) + 1
        if text.count(kept) < needed[kept]:
            raise DataError(
                f"messages[{number}] ({message['role']}): the chat template loses its text {kept[:40]!r}: use another "
                "template (tulu, chatml), or leave such messages out"
            )
        if learnt is not None and message["role"] == "assistant" and kept not in learnt:
            raise DataError(
                f"messages[{number}]: the chat template's {{% generation %}} marks leave out what the assistant wrote"
            )


def _check_all_covered(tokenizer: Tokenizer, text: str, offsets: Sequence[tuple[int, int]]) -> None:
    """Every character that is no white space belongs to a token.

    Raises:
        DataError: naming a character that the tokenizer drops.
    """
    at = 0
    for start, stop in offsets:
        if start > at and (lost := text[at:start].strip()):
            raise DataError(f"the tokenizer loses {lost[:20]!r} of the conversation: its vocabulary does not cover it")
        at = max(at, stop)
    if lost := text[at:].strip():
        raise DataError(f"the tokenizer loses {lost[:20]!r} of the conversation: its vocabulary does not cover it")


def _renderer(tokenizer: Tokenizer, template: str | None) -> Callable[..., str]:
    """The template as a function of messages; generated text stands between the two marks."""
    if template is None:
        template = tokenizer.chat_template
    if template is None:
        template = CHATML
    if template == CHATML and None in (tokenizer.inner.token_to_id(name) for name in ("<|im_start|>", "<|im_end|>")):
        raise DataError("the tokenizer has no chat template and lacks ChatML's tokens <|im_start|>, <|im_end|>")
    if template == TULU and tokenizer.eos_id is None:
        raise DataError("the template tulu ends answers with the end-of-text token, and the tokenizer has none")
    compiled = _compile(template)
    names = {
        f"{kind}_token": "" if token is None else tokenizer.inner.id_to_token(token)
        for kind, token in (("eos", tokenizer.eos_id), ("bos", tokenizer.bos_id), ("pad", tokenizer.pad_id))
    }
    return lambda **variables: compiled(**names, **variables)


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    template: str | None = None,
    train_on: TrainOn | int = "assistant",
    add_generation_prompt: bool = False,
) -> ChatTokens:
    """A conversation as ids and mask.

    Args:
        tokenizer: its chat template is used; ChatML where it has none.
        messages: the conversation.
        template: a Jinja template instead of the tokenizer's own (see `resilin.data.chat_templates`).
        train_on: learn what the assistant wrote, only its last turn, or every token; a number learns the assistant's
            turns from that message on, as the answer to the messages before.
        add_generation_prompt: end with the opening of the assistant's next turn; nothing is then to be learnt.

    Raises:
        DataError: for messages that are none, a template that fails, loses text or rewrites the prompt of an answer,
            a tokenizer that drops characters, or ChatML without its tokens.
    """
    check_messages(messages)
    render_marked = _renderer(tokenizer, template)

    def render(**variables: Any) -> str:
        return _without_marks(render_marked(**variables))[0]

    text, spans = _without_marks(render_marked(messages=list(messages), add_generation_prompt=add_generation_prompt))
    encoding = tokenizer.inner.encode(text, add_special_tokens=False)
    ids = list(encoding.ids)
    _check_all_covered(tokenizer, text, encoding.offsets)
    if train_on == "all" or add_generation_prompt:
        _check_nothing_lost(messages, text, None)
        return ChatTokens(ids, [not add_generation_prompt] * len(ids))
    numbers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    wanted = numbers
    if train_on == "last":
        wanted = numbers[-1:]
    elif isinstance(train_on, int):
        wanted = [number for number in numbers if number >= train_on]
    turns = _turns(render, messages, text, wanted)
    if len(spans) == len(numbers):  # the marks know the turn's end better than its last white space does
        learnt = "\0".join(text[first:last] for first, last in spans)
        turns = spans[len(spans) - len(wanted) :] if wanted else []
    else:
        learnt = None
    _check_nothing_lost(messages, text, learnt)
    units = [any(first <= start < last for first, last in turns) for start, _ in encoding.offsets]
    return ChatTokens(ids, units)


def encode_text_answer(tokenizer: Tokenizer, prompt: str, answer: str) -> ChatTokens:
    """A plain text and its continuation: the continuation and the end-of-text token are to be learnt.

    Raises:
        DataError: the tokenizer drops characters.
    """
    text = prompt + answer
    encoding = tokenizer.inner.encode(text, add_special_tokens=False)
    _check_all_covered(tokenizer, text, encoding.offsets)
    ids, units = list(encoding.ids), [start >= len(prompt) for start, _ in encoding.offsets]
    if tokenizer.config.get("add_bos_token") is True and tokenizer.bos_id is not None:
        ids, units = [tokenizer.bos_id, *ids], [False, *units]
    if tokenizer.eos_id is not None:
        ids, units = [*ids, tokenizer.eos_id], [*units, True]
    return ChatTokens(ids, units)
