"""Batched generation with a cache says what the plain model says, whatever the batch."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resilin.data.tokenizer import Tokenizer
from resilin.inference.generate import Continuation, PromptError, StopRule, generate, stream
from resilin.inference.sampling import Sampling
from resilin.models.decoder import Decoder

prompts = st.lists(st.lists(st.integers(0, 257), min_size=1, max_size=20), min_size=1, max_size=6)


def greedy_without_cache(model: Decoder, prompt: list[int], steps: int) -> tuple[list[int], list[float]]:
    tokens, logprobs = list(prompt), []
    with torch.no_grad():
        for _ in range(steps):
            logits = model.logits(model(torch.tensor([tokens])).hidden_BTD[0, -1])
            tokens.append(int(logits.argmax()))
            logprobs.append(float(logits.log_softmax(0)[tokens[-1]]))
    return tokens[len(prompt) :], logprobs


@given(prompts=prompts)
@settings(max_examples=15, deadline=None)
def test_any_ragged_batch_gives_greedily_what_the_model_without_a_cache_gives(
    tiny: Decoder, prompts: list[list[int]]
) -> None:
    together = generate(tiny, prompts, StopRule(8))
    for prompt, got in zip(prompts, together, strict=True):
        tokens, logprobs = greedy_without_cache(tiny, prompt, 8)
        assert got.tokens == tokens
        assert got.logprobs == pytest.approx(logprobs, abs=1e-4)
        assert got.reason == "max_new_tokens"


@given(prompts=prompts, seed=st.integers(0, 100), top_k=st.sampled_from([0, 5]))
@settings(max_examples=15, deadline=None)
def test_a_sampled_row_does_not_depend_on_its_batch(
    tiny: Decoder, prompts: list[list[int]], seed: int, top_k: int
) -> None:
    # In float64: in float32 a batch of another shape rounds otherwise, and a draw at a token's edge falls beside it.
    tiny = copy.deepcopy(tiny).double()
    sampling = Sampling(seed=seed, top_k=top_k, repetition_penalty=1.2)
    together = generate(tiny, prompts, StopRule(8), sampling=sampling)
    in_small_batches = generate(tiny, prompts, StopRule(8), sampling=sampling, batch_rows=2)
    alone = [generate(tiny, [p], StopRule(8), sampling=sampling, rows=[i])[0] for i, p in enumerate(prompts)]
    tokens = [[row.tokens for row in rows] for rows in (together, in_small_batches, alone)]
    assert tokens[0] == tokens[1] == tokens[2]


def test_samples_of_one_prompt_differ_and_the_same_seed_repeats_them(tiny: Decoder) -> None:
    first, again = (generate(tiny, [[1, 2, 3]] * 4, StopRule(8), sampling=Sampling(seed=1)) for _ in range(2))
    assert first == again
    assert len({tuple(row.tokens) for row in first}) == 4
    other = generate(tiny, [[1, 2, 3]] * 4, StopRule(8), sampling=Sampling(seed=2))
    assert [row.tokens for row in other] != [row.tokens for row in first]


def test_logprobs_are_those_the_model_gives_when_it_reads_the_answer(tiny: Decoder) -> None:
    prompt, sampling = [5, 6, 7], Sampling(temperature=0.7, top_k=20)
    row = generate(tiny, [prompt], StopRule(10), sampling=sampling)[0]
    whole = torch.tensor([prompt + row.tokens])
    logits = tiny.logits(tiny(whole).hidden_BTD[0, len(prompt) - 1 : -1]).detach()
    chosen = torch.tensor(row.tokens)[:, None]
    assert row.logprobs == pytest.approx(logits.log_softmax(1).gather(1, chosen)[:, 0].tolist(), abs=1e-4)
    top = (logits / 0.7).topk(20, dim=1)
    drawn_from = torch.full_like(logits, -math.inf).scatter(1, top.indices, top.values)
    expected = drawn_from.log_softmax(1).gather(1, chosen)[:, 0].tolist()
    assert row.draw_logprobs == pytest.approx(expected, abs=1e-4)


def test_a_stop_token_ends_only_its_own_row(tiny: Decoder) -> None:
    batch = [[n, n + 1, n + 2] for n in range(12)]
    free = generate(tiny, batch, StopRule(12))
    ends = frozenset(row.tokens[index] for index, row in enumerate(free[:6]))
    stopped = generate(tiny, batch, StopRule(12, ends))
    for before, after in zip(free, stopped, strict=True):
        cut = next((i + 1 for i, token in enumerate(before.tokens) if token in ends), 12)
        assert after.tokens == before.tokens[:cut]
        assert after.reason == ("stop_token" if before.tokens[cut - 1] in ends else "max_new_tokens")
    assert len({len(row.tokens) for row in stopped}) > 2  # else this test compares nothing


def test_rows_that_are_done_cost_nothing_more(tiny: Decoder) -> None:
    batch = [[n, n + 1, n + 2] for n in range(12)]
    ends = frozenset(row.tokens[2] for row in generate(tiny, batch, StopRule(3))[:10])
    rows_fed = []
    handle = tiny.register_forward_pre_hook(lambda _, args: rows_fed.append(len(args[0])))
    try:
        answers = generate(tiny, batch, StopRule(12, ends))
    finally:
        handle.remove()
    for step, rows in enumerate(rows_fed[1:], start=1):
        live = sum(len(row.tokens) > step for row in answers)
        assert rows <= live / 0.75 + 1e-9
    assert rows_fed[-1] < 12


def test_equal_prompts_are_read_once(tiny: Decoder) -> None:
    shapes = []
    handle = tiny.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    try:
        generate(tiny, [[1, 2, 3], [4, 5, 6], [1, 2, 3], [1, 2, 3]], StopRule(2), sampling=Sampling())
    finally:
        handle.remove()
    assert shapes == [(2, 3), (4, 1)]


def test_a_prompt_read_in_parts_and_a_cache_that_grows_change_nothing(
    tiny: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = [list(range(n, n + 3 * n)) for n in (1, 4, 9)]
    expected = generate(tiny, batch, StopRule(20))
    monkeypatch.setattr("resilin.inference.decoding.PREFILL_POSITIONS", 12)
    monkeypatch.setattr("resilin.inference.decoding._FIRST_ROOM", 3)
    got = generate(tiny, batch, StopRule(20))
    assert [row.tokens for row in got] == [row.tokens for row in expected]


def test_an_answer_ends_where_the_models_positions_end(tiny: Decoder) -> None:
    long, short = generate(tiny, [list(range(60)), [1]], StopRule(30))
    assert (len(long.tokens), long.reason) == (4, "max_positions")
    assert (len(short.tokens), short.reason) == (30, "max_new_tokens")
    assert short.tokens == generate(tiny, [[1]], StopRule(30))[0].tokens


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ([], "prompt 1 is empty"),
        ([0] * 64, "64 tokens; the model takes 64"),
        ([3, 258], "token id 258"),
        ([-1], "-1"),
    ],
)
def test_a_prompt_that_cannot_be_continued_is_named(tiny: Decoder, prompt: list[int], says: str) -> None:
    with pytest.raises(PromptError, match=says):
        generate(tiny, [[1], prompt], StopRule(3))


def test_the_models_mode_and_the_callers_gradients_are_left_alone(tiny: Decoder) -> None:
    tiny.train()
    try:
        for _ in stream(tiny, [[1, 2]], StopRule(3)):
            assert tiny.training
            assert torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()
    finally:
        tiny.eval()


class Spelling:
    """A stand-in for the model's choice: patches the drawn tokens to spell given ids."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answers: list[list[int]]) -> None:
        def choose(logits, sampling, rows, n, seen, uniform):  # type: ignore[no-untyped-def]
            said = [(answers[row], at) for row, at in zip(rows.tolist(), n.tolist(), strict=True)]
            tokens = torch.tensor([answer[at] if at < len(answer) else 0 for answer, at in said])
            return tokens, torch.zeros(len(rows)), torch.zeros(len(rows))

        monkeypatch.setattr("resilin.inference.decoding.choose", choose)


def spelled(
    monkeypatch: pytest.MonkeyPatch, model: Decoder, tokenizer: Tokenizer, answers: list[list[int]], stop: StopRule
) -> tuple[list[list[str]], list[Continuation]]:
    Spelling(monkeypatch, answers)
    batch = [[n] for n in range(len(answers))]
    pieces: list[list[str]] = [[] for _ in answers]
    for piece in stream(model, batch, stop, tokenizer=tokenizer):
        pieces[piece.row].append(piece.text)
    return pieces, generate(model, batch, stop, tokenizer=tokenizer)


def test_streamed_pieces_join_to_the_text_and_never_break_a_character(
    monkeypatch: pytest.MonkeyPatch, tiny: Decoder, byte_tokenizer: Tokenizer
) -> None:
    texts = ["héllo ✓ 🙂!", "naïve café 中文"]
    answers = [[*byte_tokenizer.encode(text), 256] for text in texts]
    assert len(answers[0]) > len(texts[0]) + 5
    pieces, results = spelled(monkeypatch, tiny, byte_tokenizer, answers, StopRule(60, frozenset([256])))
    assert ["".join(row) for row in pieces] == texts == [row.text for row in results]
    assert all("\ufffd" not in piece for row in pieces for piece in row)
    assert [row.tokens for row in results] == answers
    assert {row.reason for row in results} == {"stop_token"}


def test_a_stop_string_across_tokens_is_cut_off_and_its_tokens_are_kept(
    monkeypatch: pytest.MonkeyPatch, tiny: Decoder, byte_tokenizer: Tokenizer
) -> None:
    answers = [byte_tokenizer.encode(text) for text in ("one END two", "EN EN", "a🙂ENENDx")]
    pieces, results = spelled(monkeypatch, tiny, byte_tokenizer, answers, StopRule(11, strings=("END",)))
    assert ["".join(row) for row in pieces] == [row.text for row in results]
    assert [row.text for row in results][:1] == ["one "]
    assert results[1].text.startswith("EN EN")
    assert results[2].text == "a🙂EN"
    assert [row.reason for row in results] == ["stop_string", "max_new_tokens", "stop_string"]
    assert byte_tokenizer.decode(results[0].tokens) == "one END"


def test_an_answer_cut_in_a_character_ends_in_the_replacement_character(
    monkeypatch: pytest.MonkeyPatch, tiny: Decoder, byte_tokenizer: Tokenizer
) -> None:
    _, results = spelled(monkeypatch, tiny, byte_tokenizer, [byte_tokenizer.encode("ab🙂")], StopRule(4))
    assert results[0].text == "ab\ufffd"


def test_text_held_back_for_a_stop_string_is_shown_when_the_answer_ends_otherwise(
    monkeypatch: pytest.MonkeyPatch, tiny: Decoder, byte_tokenizer: Tokenizer
) -> None:
    answer = [*byte_tokenizer.encode("yes EN"), 256]
    _, results = spelled(monkeypatch, tiny, byte_tokenizer, [answer], StopRule(20, frozenset([256]), ("END",)))
    assert (results[0].text, results[0].reason) == ("yes EN", "stop_token")


def test_a_stop_string_that_names_a_special_token_stops_at_that_token(
    monkeypatch: pytest.MonkeyPatch, tiny: Decoder, byte_tokenizer: Tokenizer
) -> None:
    answer = [*byte_tokenizer.encode("yes"), 257, *byte_tokenizer.encode("no")]
    _, results = spelled(monkeypatch, tiny, byte_tokenizer, [answer], StopRule(20, strings=("<|im_end|>",)))
    assert (results[0].text, results[0].reason) == ("yes", "stop_token")


def test_stop_strings_without_a_tokenizer_are_refused(tiny: Decoder) -> None:
    with pytest.raises(ValueError, match="need a tokenizer"):
        generate(tiny, [[1]], StopRule(3, strings=("x",)))


def test_no_prompts_give_no_answers(tiny: Decoder) -> None:
    assert generate(tiny, [], StopRule(3)) == []
