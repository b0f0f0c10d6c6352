"""The messages of a conversation in a column of a row."""

from __future__ import annotations

from typing import Any

from resilin.data.chat import check_messages
from resilin.data.errors import DataError
from resilin.data.row_files import Row

Messages = list[dict[str, Any]]


def messages_in(row: Row, column: str, value: Any) -> Messages:
    """The messages of a column, without the fields that a table fills up with nothing.

    Raises:
        DataError: with file, line and column, for what is no list of messages.
    """
    try:
        check_messages(value)
    except DataError as error:
        raise row.error(f"{column}: {error}") from None
    return [{name: field for name, field in message.items() if field is not None} for message in value]
