"""Conversations as a source."""

from __future__ import annotations

from pathlib import Path

from resilin.data.chat import TrainOn
from resilin.data.chat_templates import find_template
from resilin.data.file_source import FileSourceSettings
from resilin.data.rows import Packing
from resilin.data.tokenize_options import TokenizeOptions
from resilin.data.tokenizer import Tokenizer


class ChatSource(FileSourceSettings):
    """Conversations: only what the assistant wrote is learnt."""

    packing: Packing = "documents"
    """`documents` packs whole conversations; `pad` gives each a row; `stream` cuts them anywhere."""
    separate_documents: bool = True
    """Attention stays inside a conversation."""
    messages_key: str = "messages"
    """Where the list of messages stands."""
    train_on: TrainOn = "assistant"
    """Learn what the assistant wrote, only its last turn, or every token."""
    chat_template: Path | None = None
    """`tulu`, `chatml` or a Jinja file, instead of the tokenizer's own template."""

    def options(self) -> TokenizeOptions:
        """How the conversations become tokens."""
        return TokenizeOptions(
            kind="chat", key=self.messages_key, train_on=self.train_on, on_error=self.on_error, parse_special=True
        )

    def made_tokenizer(self) -> Tokenizer:
        """The tokenizer, with the given template in place of its own."""
        made = super().made_tokenizer()
        if self.chat_template is None:
            return made
        return Tokenizer(made.json, {**made.config, "chat_template": find_template(str(self.chat_template))})
