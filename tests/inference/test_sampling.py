"""The filters keep exactly what their definitions say, and draws have the stated probabilities."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resilin.inference.sampling import (
    GREEDY,
    Sampling,
    choose,
    draw,
    filtered,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise_repetition,
    uniform_numbers,
)
from resilin.keys import Keys

# Few distinct values, so that ties are common.
logit_rows = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=12)


def kept(logits_RV: torch.Tensor) -> list[list[int]]:
    return [row.isfinite().nonzero()[:, 0].tolist() for row in logits_RV]


def by_probability(row: list[float]) -> list[int]:
    """Token ids, most probable first, equal ones by id."""
    return sorted(range(len(row)), key=lambda token: (-row[token], token))


@given(row=logit_rows, k=st.integers(1, 14))
def test_top_k_keeps_exactly_the_k_most_probable_and_ties_go_to_lower_ids(row: list[float], k: int) -> None:
    got = filtered(torch.tensor([row]), Sampling(top_k=k))
    assert kept(got) == [sorted(by_probability(row)[:k])]


@given(row=logit_rows, p=st.floats(0.01, 0.999))
def test_top_p_keeps_the_smallest_set_that_reaches_p(row: list[float], p: float) -> None:
    total = sum(math.exp(x) for x in row)
    order, mass, size = by_probability(row), 0.0, 0
    borders = []
    for token in order:
        mass += math.exp(row[token]) / total
        borders.append(mass)
    if any(abs(border - p) < 1e-5 for border in borders):
        return  # float32 logits decide such a case either way
    size = next(i for i, border in enumerate(borders) if border >= p) + 1
    assert kept(keep_top_p(torch.tensor([row]), p)) == [sorted(order[:size])]


def test_top_p_of_a_flat_distribution_over_a_large_vocabulary_looks_beyond_the_first_candidates() -> None:
    logits = torch.zeros(2, 10_000)
    logits[1, 77] = 20.0
    got = kept(keep_top_p(logits, 0.5))
    assert got[0] == list(range(5000))
    assert got[1] == [77]


def test_top_p_reached_exactly_needs_no_further_token() -> None:
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log2().mul(math.log(2))[None].float()
    assert kept(keep_top_p(logits, 0.74)) == [[0, 1]]
    assert kept(keep_top_p(logits, 0.76)) == [[0, 1, 2]]
    assert kept(keep_top_p(logits, 1.0)) == [[0, 1, 2, 3]]


@given(row=logit_rows, min_p=st.floats(0.001, 1.0))
def test_min_p_keeps_tokens_at_least_that_fraction_of_the_best(row: list[float], min_p: float) -> None:
    ratios = [math.exp(x - max(row)) for x in row]
    if any(abs(ratio - min_p) < 1e-6 for ratio in ratios if ratio < 1):
        return
    assert kept(keep_min_p(torch.tensor([row]), min_p)) == [[i for i, r in enumerate(ratios) if r >= min_p]]


def test_filters_leave_the_kept_logits_as_they_are() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, -1.0]])
    assert keep_top_k(logits, torch.tensor([2]), 2).tolist() == [[3.0, -math.inf, 2.0, -math.inf]]


def test_rows_of_a_batch_may_keep_different_numbers_of_tokens() -> None:
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
    assert kept(keep_top_k(logits, torch.tensor([1, 3]), 3)) == [[0], [1, 2, 3]]


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_seen_tokens() -> None:
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0]])
    seen = torch.tensor([[True, True, False, False]])
    assert penalise_repetition(logits, seen, 4.0).tolist() == [[0.5, -8.0, 2.0, -2.0]]


def test_temperature_zero_takes_the_most_probable_token_and_the_lower_id_of_equals() -> None:
    logits = torch.tensor([[0.0, 5.0, 5.0, 1.0], [9.0, 5.0, 5.0, 1.0]])
    tokens, logprobs, draw_logprobs = choose(logits, GREEDY, torch.arange(2), torch.zeros(2).long())
    assert tokens.tolist() == [1, 0]
    torch.testing.assert_close(logprobs, logits.log_softmax(1).gather(1, tokens[:, None])[:, 0])
    assert draw_logprobs.tolist() == [0.0, 0.0]


def test_a_repetition_penalty_changes_a_greedy_choice() -> None:
    logits = torch.tensor([[5.0, 4.0]])
    seen = torch.tensor([[True, False]])
    tokens, _, _ = choose(
        logits, Sampling(temperature=0.0, repetition_penalty=2.0), torch.arange(1), torch.tensor([0]), seen
    )
    assert tokens.tolist() == [1]


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=0.5), Sampling(top_k=4), Sampling(top_p=0.8), Sampling(min_p=0.2)],
    ids=["plain", "temperature", "top-k", "top-p", "min-p"],
)
def test_frequencies_follow_the_filtered_distribution(sampling: Sampling) -> None:
    logits = torch.tensor([1.0, 0.2, -0.5, 0.9, -3.0, 0.0])
    expected = filtered(logits[None], sampling)[0].softmax(0).double()
    n = 40_000
    tokens, _, draw_logprobs = choose(logits.expand(n, -1), sampling, torch.arange(n), torch.full((n,), 3))
    counts = torch.bincount(tokens, minlength=6).double()
    possible = expected > 0
    assert counts[~possible].sum() == 0
    # 99.9th percentile of chi-square with up to 5 degrees of freedom is 20.5; the seed is fixed.
    assert chi_square(counts[possible], expected[possible]) < 20.5
    torch.testing.assert_close(draw_logprobs, expected.log()[tokens].float())


def test_frequencies_over_steps_of_one_row_follow_the_distribution_too() -> None:
    logits = torch.tensor([[0.5, 0.0, -1.0]])
    counts = torch.zeros(3, dtype=torch.float64)
    for n in range(3000):
        counts[choose(logits, Sampling(seed=5), torch.tensor([7]), torch.tensor([n]))[0]] += 1
    assert chi_square(counts, logits[0].softmax(0).double()) < 13.8  # 99.9 %, 2 degrees of freedom


@given(rows=st.lists(st.integers(0, 2**40), min_size=1, max_size=6, unique=True), n=st.integers(0, 10_000))
@settings(max_examples=30)
def test_a_rows_numbers_do_not_depend_on_its_batch_and_are_those_of_its_keys(rows: list[int], n: int) -> None:
    ahead = n + torch.arange(3).expand(len(rows), 3)
    together = uniform_numbers(11, torch.tensor(rows), ahead)
    for at in range(3):
        words = Keys(11, n + at, torch.tensor(rows), ("sample",)).bits((2,)).double()
        expected = ((words[:, 0] / 2**5).floor() * 2**26 + (words[:, 1] / 2**6).floor()) / 2**53
        assert torch.equal(together[:, at], expected)
    assert ((together >= 0) & (together < 1)).all()


def test_other_seeds_rows_and_steps_give_other_numbers() -> None:
    rows = torch.arange(100)
    numbers = torch.cat([uniform_numbers(seed, rows, torch.tensor([[0, 1]]).expand(100, 2)) for seed in (0, 1)])
    assert len(numbers.unique()) == 400


@given(u=st.floats(0, 1, exclude_max=True))
def test_a_draw_never_gives_a_token_without_probability(u: float) -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 1.0, -math.inf]])
    assert draw(logits, torch.tensor([u], dtype=torch.float64))[0].item() in (1, 3)


@given(u=st.floats(0, 1, exclude_max=True), seed=st.integers(0, 50), vocabulary=st.sampled_from([3, 64, 65, 200, 1000]))
def test_a_draw_over_blocks_is_the_draw_over_all_tokens(u: float, seed: int, vocabulary: int) -> None:
    logits = 3 * torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(seed))
    logits[logits < -3] = -math.inf
    token, logprob = draw(logits, torch.tensor([u], dtype=torch.float64))
    weights = (logits - logits.amax()).exp().double()[0]
    below, total = float(weights[: token[0]].sum()), float(weights.sum())
    assert below / total - 1e-6 <= u <= (below + float(weights[token[0]])) / total + 1e-6
    assert float(logprob) == pytest.approx(float(logits.double().log_softmax(1)[0, token[0]]), abs=1e-5)


def test_a_draw_inverts_the_cumulative_distribution() -> None:
    logits = torch.tensor([[0.25, 0.5, 0.25]]).log().expand(5, -1)
    u = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.9999999999999999], dtype=torch.float64)
    assert draw(logits, u)[0].tolist() == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling()])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_an_error_that_names_the_row(bad: float, sampling: Sampling) -> None:
    logits = torch.zeros(2, 3)
    logits[1, 2] = bad
    with pytest.raises(FloatingPointError, match=r"row\(s\) \[9\]"):
        choose(logits, sampling, torch.tensor([4, 9]), torch.tensor([0, 5]))


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1), ("top_p", 0), ("top_p", 1.5), ("top_k", -1), ("min_p", 2), ("repetition_penalty", 0)],
)
def test_settings_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        Sampling(**{name: value})
