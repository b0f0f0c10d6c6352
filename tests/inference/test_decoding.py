"""Rows that take the places of those that are done say what they would have said alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilin.inference.decoding import Decoding
from resilin.inference.sampling import Sampling
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings

Prompts = list[list[int]]


@pytest.fixture(scope="module")
def exact(tiny: Decoder) -> Decoder:
    """In float64: in float32 a batch of another shape rounds otherwise, and a draw may fall beside a token's edge."""
    return copy.deepcopy(tiny).double()


def written(
    model: Decoder, prompts: Prompts, sampling: Sampling, lengths: Sequence[int], lines: int | None
) -> tuple[Prompts, list[list[float]]]:
    """Tokens and log-probabilities of answers that end after the given numbers of tokens."""
    tokens: Prompts = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    longest = max(len(prompt) + length for prompt, length in zip(prompts, lengths, strict=True))
    decoding = Decoding(model, prompts, sampling, longest, lines=lines)
    while decoding.going:
        done = []
        for new in decoding.step():
            tokens[new.row].append(new.token)
            logprobs[new.row].append(new.draw_logprob)
            if len(tokens[new.row]) == lengths[new.row]:
                done.append(new.row)
        decoding.drop(done)
    return tokens, logprobs


prompts_and_lengths = st.lists(
    st.tuples(
        st.sampled_from([[5], [5, 6, 7], [9] * 12, list(range(20)), [8, 8], [1, 2, 3, 4, 5, 6]]), st.integers(1, 9)
    ),
    min_size=1,
    max_size=14,
)


@given(rows=prompts_and_lengths, lines=st.integers(1, 9), penalty=st.sampled_from([1.0, 1.3]))
@settings(max_examples=25, deadline=None)
def test_an_answer_does_not_depend_on_whose_place_it_takes(
    exact: Decoder, rows: list[tuple[list[int], int]], lines: int, penalty: float
) -> None:
    prompts, lengths = [row[0] for row in rows], [row[1] for row in rows]
    sampling = Sampling(seed=3, top_k=50, repetition_penalty=penalty)
    together, logprobs = written(exact, prompts, sampling, lengths, None)
    in_turn, again = written(exact, prompts, sampling, lengths, lines)
    assert in_turn == together
    for a, b in zip(logprobs, again, strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    assert [len(answer) for answer in together] == lengths


def test_the_cache_grows_with_rows_that_come_later_and_draws_go_on_beyond_a_block(
    exact: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, lengths = [[n + 1] * (1 + n % 3) for n in range(9)], [30, 2, 3, 2, 40, 2, 35, 1, 38]
    expected = written(exact, prompts, Sampling(seed=1), lengths, None)[0]
    monkeypatch.setattr("resilin.inference.decoding._FIRST_ROOM", 3)
    monkeypatch.setattr("resilin.inference.decoding._AHEAD", 5)
    for lines in (2, 4):
        assert written(exact, prompts, Sampling(seed=1), lengths, lines)[0] == expected


@contextmanager
def fed(model: Decoder) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of all tokens the model is given."""
    shapes: list[tuple[int, ...]] = []
    handle = model.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    try:
        yield shapes
    finally:
        handle.remove()


def test_the_batch_stays_full_while_rows_wait(tiny: Decoder) -> None:
    lengths = [40 if n % 8 == 0 else 5 for n in range(32)]
    with fed(tiny) as shapes:
        written(tiny, [[n + 1, n + 2] for n in range(32)], Sampling(), lengths, 8)
    steps = [rows for rows, columns in shapes if columns == 1]
    # In batches of eight each would wait for its longest answer: 4 x 39 steps.
    assert len(steps) < 70
    assert sum(steps) < 1.6 * (sum(lengths) - len(lengths))


def test_a_prompt_that_still_stands_in_the_cache_is_not_read_again(tiny: Decoder) -> None:
    prompts = [[1, 2, 3]] * 12 + [[4, 5]]
    with fed(tiny) as shapes:
        written(tiny, prompts, Sampling(), [3 + n % 4 for n in range(13)], 4)
    assert [shape for shape in shapes if shape[1] > 1] == [(1, 3), (1, 2)]


def test_a_window_and_another_number_of_key_heads_follow_too() -> None:
    settings = DecoderSettings(
        vocab_size=50, hidden_size=32, layers=2, heads=4, kv_heads=1, mlp_size=48, max_positions=64, init_std=0.4,
        sliding_window=6, window_layers=(0,),
    )  # fmt: skip
    model = Decoder(settings, seed=1).double().eval()
    prompts, lengths = [[n] * (1 + 3 * (n % 4)) for n in range(1, 11)], [3, 17, 4, 9, 12, 1, 20, 2, 5, 8]
    expected = written(model, prompts, Sampling(seed=2), lengths, None)
    assert written(model, prompts, Sampling(seed=2), lengths, 3)[0] == expected[0]
