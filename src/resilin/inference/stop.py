"""Stop strings: end a text as soon as one of them is complete, and cut it off, however the text was split."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Watches a growing text for stop strings and lets through only what can no longer belong to one.

    The stop string that is complete first ends the text; of several that end at the same character, the longest
    one. The result depends on the text alone and not on the pieces it came in.

    Args:
        stops: non-empty strings; none at all lets everything through.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not stop for stop in stops):
            raise ValueError("a stop string is empty: it would end every text before its first character")
        self._stops = tuple(sorted(set(stops), key=len, reverse=True))
        self._held = ""
        self.found: str | None = None
        """The stop string that ended the text."""

    def push(self, piece: str) -> str:
        """Add the next piece; returns the text that is now certain to stay (nothing once a stop was found)."""
        if self.found is not None:
            return ""
        if not self._stops:
            return piece
        # A complete stop string ends inside the new piece, for otherwise an earlier call had found it.
        text, old = self._held + piece, len(self._held)
        for end in range(old + 1, len(text) + 1):
            for stop in self._stops:
                if text.endswith(stop, 0, end):
                    self.found, self._held = stop, ""
                    return text[: end - len(stop)]
        keep = self._begun(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The text held back for a stop string that never came; call when no more pieces follow."""
        held, self._held = self._held, ""
        return held

    def _begun(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for length in range(min(len(text), len(self._stops[0]) - 1), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
