"""Tables that commands write into Markdown pages, between marks, so that no figure is typed by hand."""

from __future__ import annotations

from pathlib import Path

from resilin.config import UserError


def replace_between_marks(page: Path, mark: str, text: str) -> None:
    """Replace what stands between `<!-- mark -->` and `<!-- /mark -->` in a page."""
    start, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    whole = page.read_text(encoding="utf-8")
    head, found_start, rest = whole.partition(start)
    _, found_end, tail = rest.partition(end)
    if not found_start or not found_end:
        raise UserError(f"{page}: has no place for the table: put {start} and {end} on lines of their own")
    page.write_text(f"{head}{start}\n{text.strip()}\n{end}{tail}", encoding="utf-8")
