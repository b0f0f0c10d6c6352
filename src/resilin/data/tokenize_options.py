"""How documents become tokens."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from resilin.data.chat import TrainOn

OnError = Literal["stop", "skip"]
Kind = Literal["text", "chat", "tokens"]


@dataclass(frozen=True, slots=True)
class TokenizeOptions:
    """How documents become tokens.

    Attributes:
        kind: what a document is: text, a conversation ("chat": a list of messages), or ids that are already tokens.
        key: where it stands in a JSONL line or a table.
        separator: what stands between the documents of a text file; None takes each file as one document.
        add_end: append the end-of-text token to each text.
        parse_special: read the text of a special token inside a document as that token.
        train_on: which tokens of a conversation are to be learnt.
        on_error: stop at the first flaw, or leave flawed documents out and count them.
    """

    kind: Kind = "text"
    key: str = "text"
    separator: str | None = None
    add_end: bool = True
    parse_special: bool = False
    train_on: TrainOn = "assistant"
    on_error: OnError = "stop"

    def contents(self) -> dict[str, Any]:
        """The options that decide what is written; `on_error` only decides whether it may go on."""
        return {name: value for name, value in asdict(self).items() if name != "on_error"}
