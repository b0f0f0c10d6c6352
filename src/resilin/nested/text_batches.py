"""Held-out text as rows of tokens, for comparing the members of a family on the same prefixes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from resilin.nouns import Batch
from resilin.objective.next_token import IGNORE


def text_batches(tokens: Sequence[int], window: int, batch_tokens: int = 4096) -> Iterator[Batch]:
    """Rows of `window` tokens one after another; each token but the first of the text is a label once.

    Args:
        tokens: of the text.
        window: of a row; the last one may be shorter.
        batch_tokens: of the rows of a batch together, at least one row.
    """
    rows = [tokens[start : start + window + 1] for start in range(0, max(len(tokens) - 1, 0), window)]
    count = max(1, batch_tokens // window)
    for start in range(0, len(rows), count):
        part = rows[start : start + count]
        width = max(len(row) for row in part) - 1
        tokens_BT = torch.zeros(len(part), width, dtype=torch.int64)
        labels_BT = torch.full((len(part), width), IGNORE, dtype=torch.int64)
        for number, row in enumerate(part):
            tokens_BT[number, : len(row) - 1] = torch.as_tensor(row[:-1])
            labels_BT[number, : len(row) - 1] = torch.as_tensor(row[1:])
        yield Batch(torch.arange(start, start + len(part)), {"tokens": tokens_BT, "labels": labels_BT})
