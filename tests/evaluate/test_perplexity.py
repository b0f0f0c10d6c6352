"""Every token is scored once, and the figures are those of a plain computation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resilin.data.tokenizer import Tokenizer
from resilin.evaluate.perplexity import TextError, TextScore, read_text, source_score, text_score, windows
from resilin.nouns import Batch, State


@given(data=st.data())
def test_each_token_but_the_first_is_scored_exactly_once_with_enough_context(data: st.DataObject) -> None:
    length = data.draw(st.integers(0, 80))
    window = data.draw(st.integers(1, 20))
    stride = data.draw(st.integers(1, window))
    tokens = list(range(length))
    scored: list[int] = []
    for passage in windows(tokens, window, stride):
        assert len(passage.tokens) <= window + 1
        first = passage.tokens[passage.first]
        assert first <= window or passage.first >= window + 1 - stride
        assert passage.tokens == tokens[passage.tokens[0] : passage.tokens[-1] + 1]
        scored += passage.tokens[passage.first :]
    assert scored == tokens[1:]


@pytest.mark.parametrize("stride", [0, 9])
def test_a_stride_outside_the_window_is_refused(stride: int) -> None:
    with pytest.raises(ValueError, match="expected 1 to 8"):
        list(windows([1, 2, 3], 8, stride))


def test_a_short_text_has_the_loss_that_transformers_reports(twins, tokenizer: Tokenizer) -> None:
    text = "Once upon a time there was a café."
    got = text_score(twins.ours, tokenizer, text)
    ids = torch.tensor([[tokenizer.eos_id, *tokenizer.encode(text)]])
    with torch.no_grad():
        loss = float(twins.theirs(ids, labels=ids).loss)
    assert got.tokens == ids.shape[1] - 1
    assert got.bytes == len(text.encode())
    assert got.loss == pytest.approx(loss, abs=1e-5)
    assert got.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    assert got.bits_per_byte == pytest.approx(loss * got.tokens / math.log(2) / len(text.encode()), rel=1e-5)


@pytest.mark.parametrize(("window", "stride", "batch_tokens"), [(64, 64, 64), (64, 16, 500), (20, 7, 4096)])
def test_a_long_text_is_scored_as_by_sliding_windows_in_transformers(
    twins, tokenizer: Tokenizer, window: int, stride: int, batch_tokens: int
) -> None:
    text = "The quick brown fox, the lazy dog and the answer. " * 14
    got = text_score(twins.ours, tokenizer, text, window=window, stride=stride, batch_tokens=batch_tokens)
    ids = [tokenizer.eos_id, *tokenizer.encode(text)]
    assert len(ids) > 2 * window
    expected, done = 0.0, 1
    while done < len(ids):
        end = min(window + 1 if done == 1 else done + stride, len(ids))
        begin = max(0, end - window - 1)
        part = torch.tensor([ids[begin:end]])
        with torch.no_grad():
            logprobs = twins.theirs(part[:, :-1]).logits[0].log_softmax(-1)
        expected -= sum(float(logprobs[i - begin - 1, ids[i]]) for i in range(done, end))
        done = end
    assert got.tokens == len(ids) - 1
    assert got.nats == pytest.approx(expected, rel=1e-5)


def test_a_tokenizer_without_begin_or_end_leaves_the_first_token_and_its_bytes_out(twins, tokenizer: Tokenizer) -> None:
    bare = Tokenizer(tokenizer.inner.to_str())
    bare.eos_id = None
    text = "The quick brown fox"
    got = text_score(twins.ours, bare, text)
    ids = bare.encode(text)
    assert got.tokens == len(ids) - 1
    assert got.bytes == len(text.encode()) - len(bare.decode(ids[:1]).encode())


def test_a_special_tokens_name_in_a_text_stays_text(twins, tokenizer: Tokenizer) -> None:
    got = text_score(twins.ours, tokenizer, "a<|endoftext|>b")
    assert got.tokens == len(tokenizer.encode("a<|endoftext|>b", parse_special=False)) > 3


def test_scores_of_several_texts_add_up() -> None:
    total = TextScore(10.0, 5, 20) + TextScore(2.0, 1, 4)
    assert total == TextScore(12.0, 6, 24)
    assert total.loss == 2.0
    assert total.bits_per_byte == pytest.approx(12 / math.log(2) / 24)
    assert math.isnan(TextScore().loss)
    assert math.isnan(TextScore(1.0, 1).bits_per_byte)
    assert TextScore(1e6, 1).perplexity == math.inf


class Held:
    """A validation source of two batches with ignored labels and packed documents."""

    def __init__(self, tokens_BT: torch.Tensor) -> None:
        self.tokens_BT = tokens_BT

    def __len__(self) -> int:
        return 2

    def slots(self, step: int) -> int:
        return (2, 1)[step]

    def fetch(self, step: int, slots: Sequence[int]) -> Batch:
        rows = self.tokens_BT[2 * step :][list(slots)]
        labels = rows[:, 1:].clone()
        labels[:, 4] = -100
        place = torch.arange(labels.shape[1])
        documents = (place >= 5).int().expand(len(rows), -1)
        positions = torch.where(place >= 5, place - 5, place).expand(len(rows), -1)
        fields = {"tokens": rows[:, :-1], "labels": labels, "positions": positions, "documents": documents}
        return Batch(torch.tensor(list(slots)), fields)

    def state_dict(self) -> State:
        return {}

    def load_state_dict(self, state: State) -> None:
        pass


def test_a_source_is_scored_by_its_labels_inside_its_documents(twins, tokenizer: Tokenizer) -> None:
    tokens_BT = torch.randint(1, tokenizer.vocab_size, (3, 12), generator=torch.Generator().manual_seed(1))
    tokens_BT[0, 9] = tokenizer.eos_id
    got = source_score(twins.ours, Held(tokens_BT), 2, tokenizer=tokenizer)
    nats, spelled = 0.0, 0
    for row in tokens_BT:
        for document in (row[:5], row[5:]):  # the label at place 4, which crosses the border, is ignored
            with torch.no_grad():
                logprobs = twins.theirs(document[None, :-1]).logits[0].log_softmax(-1)
            nats -= float(logprobs.gather(1, document[1:, None]).sum())
            spelled += sum(int(tokenizer.byte_lengths[int(token)]) for token in document[1:])
    assert got.tokens == 3 * 10
    assert got.nats == pytest.approx(nats, rel=1e-5)
    assert got.bytes == spelled


def test_progress_ends_at_one(twins, tokenizer: Tokenizer) -> None:
    shares: list[float] = []
    text_score(twins.ours, tokenizer, "The quick fox " * 40, batch_tokens=64, progress=shares.append)
    assert shares == sorted(shares)
    assert len(shares) > 2
    assert shares[-1] == 1.0


def test_a_text_file_is_read_to_the_byte_or_named(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes("één\r\n".encode())
    assert read_text(path) == "één\r\n"
    path.write_bytes(b"abc\xff")
    with pytest.raises(TextError, match="byte 3 is not UTF-8"):
        read_text(path)
    path.write_bytes(b"")
    with pytest.raises(TextError, match="empty"):
        read_text(path)
    with pytest.raises(TextError, match=r"nothere\.txt: cannot be read"):
        read_text(tmp_path / "nothere.txt")
