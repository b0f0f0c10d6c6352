"""Perplexity and bits per byte of held-out text: every token is scored exactly once.

A text longer than the model's window is read in windows that overlap, so that every scored token but the first ones
has at least `window - stride` tokens before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from resilin.config.errors import UserError
from resilin.data.tokenizer import Tokenizer
from resilin.inference.scoring import Passage, evaluating, head_logprobs, score
from resilin.models.decoder import Decoder
from resilin.nouns import Source

IGNORED_LABEL = -100


class TextError(UserError):
    """A text that cannot be evaluated; the message names the file."""


@dataclass(frozen=True, slots=True)
class TextScore:
    """How well a model foretells a text.

    Attributes:
        nats: minus the sum of the tokens' log-probabilities.
        tokens: how many were scored.
        bytes: how many bytes of UTF-8 they stand for; 0 where that is not known.
    """

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0

    def __add__(self, other: TextScore) -> TextScore:
        return TextScore(self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes)

    @property
    def loss(self) -> float:
        """Nats per token; NaN for no tokens."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp(nats per token); infinity where that is beyond a float."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers; NaN where the bytes are not known."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan


def windows(tokens: Sequence[int], window: int, stride: int) -> Iterator[Passage]:
    """Cut a long text so that each token but the first is scored once, with as much context as fits.

    Args:
        tokens: of the text; the first one is only context.
        window: the most tokens the model reads at a time.
        stride: how many new tokens each window after the first scores, in [1, window]; smaller gives more context
            and costs more.

    Yields:
        passages of at most `window + 1` tokens (the last one is foretold, not read).
    """
    if not 1 <= stride <= window:
        raise TextError(f"stride is {stride}: expected 1 to {window}, the window")
    scored_to = 1
    while scored_to < len(tokens):
        end = min(len(tokens), window + 1 if scored_to == 1 else scored_to + stride)
        begin = max(0, end - window - 1)
        yield Passage(tokens[begin:end], scored_to - begin)
        scored_to = end


def text_score(
    model: Decoder,
    tokenizer: Tokenizer,
    text: str,
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_tokens: int = 4096,
    progress: Callable[[float], None] | None = None,
) -> TextScore:
    """Perplexity and bits per byte of one text.

    The first token is foretold from the tokenizer's begin token (its end token where there is none, which divides
    texts in training); without either it is context only, and its bytes are not counted.

    Args:
        model: whose `max_positions` bounds the window.
        tokenizer: of the model.
        text: read as plain text: the name of a special token in it stays text.
        window: tokens the model reads at a time; None: all its positions.
        stride: see `windows`; None: half the window.
        batch_tokens: positions in a batch.
        progress: called with the share done, in [0, 1].
    """
    window = model.settings.max_positions if window is None else window
    if not 1 <= window <= model.settings.max_positions:
        raise TextError(f"window is {window}: expected 1 to {model.settings.max_positions}, the model's positions")
    stride = max(1, window // 2) if stride is None else stride
    tokens, counted = tokenizer.encode(text, parse_special=False), len(text.encode())
    prefix = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    if prefix is not None:
        tokens = [prefix, *tokens]
    elif tokens:
        counted -= int(tokenizer.byte_lengths[tokens[0]])
    passages = list(windows(tokens, window, stride))
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done / len(passages))

    scores = score(model, passages, batch_tokens=batch_tokens, progress=advance)
    nats = -math.fsum(float(logprobs.double().sum()) for logprobs, _ in scores)
    return TextScore(nats, sum(len(logprobs) for logprobs, _ in scores), counted)


def read_text(path: Path) -> str:
    """A text file as it is, newlines included.

    Raises:
        TextError: it is not there, is empty, or is not UTF-8 (naming the byte).
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise TextError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise TextError(f"{path}: byte {error.start} is not UTF-8; expected a text file in UTF-8") from None
    if not text:
        raise TextError(f"{path}: the file is empty")
    return text


def source_score(
    model: Decoder,
    source: Source,
    batches: int,
    *,
    tokenizer: Tokenizer | None = None,
    progress: Callable[[float], None] | None = None,
) -> TextScore:
    """Perplexity of the labels of a source's first `batches` batches, as the next-token loss counts them.

    Args:
        model: whose mode is left as it was.
        source: of tokens, labels, and, where documents are packed, positions and documents.
        batches: `len(source)` covers a validation source once.
        tokenizer: tells how many bytes a token stands for (an end of text: none); None: bytes stay 0.
        progress: called with the share done.
    """
    device = next(model.parameters()).device
    total = TextScore()
    for step in range(batches):
        batch = source.fetch(step, range(source.slots(step))).to(device)
        labels_BT = batch["labels"]
        counted_BT = labels_BT != IGNORED_LABEL
        with evaluating(model):
            hidden_BTD = model(batch["tokens"], batch.get("positions"), batch.get("documents")).hidden_BTD
            labels_N = labels_BT[counted_BT]
            logprobs_N, _ = head_logprobs(model, hidden_BTD[counted_BT], labels_N)
        spelled = 0 if tokenizer is None else int(tokenizer.byte_lengths[labels_N.cpu()].sum())
        total += TextScore(-float(logprobs_N.double().sum()), len(labels_N), spelled)
        if progress is not None:
            progress((step + 1) / batches)
    return total
