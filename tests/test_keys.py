"""Keyed randomness: the published generator, and numbers that belong to the slot and not to who computes it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resilin.keys import Keys, dropout, hash64, philox, philox_of

SEEDS = st.integers(0, 2**70)
STEPS = st.integers(0, 2**40)
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


def keys_of(slots: list[int], seed: int = 3, step: int = 5) -> Keys:
    return Keys(seed, step, torch.tensor(slots, dtype=torch.int64))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    assert philox(torch.tensor(counter), key).tolist() == list(expected)


def philox_in_plain_integers(counter: list[int], key: tuple[int, int]) -> list[int]:
    """The published round with Python's unbounded integers, to check the wrapping tensor arithmetic."""
    (c0, c1, c2, c3), (k0, k1), word = counter, key, 2**32
    for _ in range(10):
        high0, low0 = divmod(c0 * 0xD2511F53, word)
        high1, low1 = divmod(c2 * 0xCD9E8D57, word)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % word, (k1 + 0xBB67AE85) % word
    return [c0, c1, c2, c3]


WORDS = st.integers(0, 2**32 - 1)


@given(st.lists(st.lists(WORDS, min_size=4, max_size=4), min_size=1, max_size=4), st.tuples(WORDS, WORDS))
def test_any_counter_and_key_match_unbounded_integer_arithmetic(
    counters: list[list[int]], key: tuple[int, int]
) -> None:
    expected = [philox_in_plain_integers(counter, key) for counter in counters]
    assert philox(torch.tensor(counters), key).tolist() == expected
    assert [list(philox_of((a, b, c, d), key)) for a, b, c, d in counters] == expected


@settings(max_examples=60, deadline=None)
@given(SEEDS, STEPS, st.lists(st.integers(0, 2**40), max_size=5), SHAPES)
def test_few_words_are_those_that_many_would_be(seed: int, step: int, slots: list[int], shape: tuple[int, ...]) -> None:
    """Few are drawn in Python's numbers, as part of many by tensors."""
    keys, more = keys_of(slots, seed, step), keys_of([*slots, *range(100)], seed, step)
    assert torch.equal(keys.bits(shape), more.bits(shape)[: len(slots)])


@given(st.data(), SEEDS, STEPS, SHAPES, st.integers(1, 9))
def test_any_split_into_micro_batches_draws_the_same_words(
    data: st.DataObject, seed: int, step: int, shape: tuple[int, ...], batch: int
) -> None:
    keys = Keys(seed, step, torch.arange(batch)).fold("layer").fold(2)
    cuts = sorted(data.draw(st.sets(st.integers(1, batch)))) if batch > 1 else []
    edges = [0, *[cut for cut in cuts if cut < batch], batch]
    parts = [keys.rows(start, stop).bits(shape) for start, stop in itertools.pairwise(edges)]
    assert torch.equal(torch.cat(parts), keys.bits(shape))


@given(st.permutations(range(8)), SHAPES)
def test_a_slot_draws_the_same_words_wherever_it_stands_in_the_batch(order: list[int], shape: tuple[int, ...]) -> None:
    assert torch.equal(keys_of(order).bits(shape), keys_of(list(range(8))).bits(shape)[order])


@given(st.lists(st.tuples(STEPS, st.integers(0, 2**31)), min_size=1, max_size=5), SHAPES)
def test_slots_of_several_steps_draw_what_each_draws_in_its_step(
    places: list[tuple[int, int]], shape: tuple[int, ...]
) -> None:
    steps_B, slots_B = (torch.tensor(part, dtype=torch.int64) for part in zip(*places, strict=True))
    drawn = Keys(3, 0, slots_B, ("view",), steps_B).bits(shape)
    single = [keys_of([slot], step=step).fold("view").bits(shape) for step, slot in places]
    assert torch.equal(drawn, torch.cat(single))
    last = Keys(3, 0, slots_B, ("view",), steps_B).rows(len(places) - 1, len(places))
    assert torch.equal(last.bits(shape), single[-1])


def test_seed_step_slot_layer_and_call_each_change_the_words() -> None:
    base = keys_of([7]).fold("attention").fold(0)
    others = [
        keys_of([7], seed=4).fold("attention").fold(0),
        keys_of([7], step=6).fold("attention").fold(0),
        keys_of([7], step=5 + 2**32).fold("attention").fold(0),
        keys_of([8]).fold("attention").fold(0),
        keys_of([7]).fold("mlp").fold(0),
        keys_of([7]).fold("attention").fold(1),
        keys_of([7]).fold("attention").fold("0"),
        keys_of([7]).fold("attention0"),
        keys_of([7]).fold("attention"),
    ]
    drawn = {tuple(keys.bits((4,)).flatten().tolist()) for keys in (base, *others)}
    assert len(drawn) == 1 + len(others)


def test_a_hash_tells_where_one_part_ends_and_the_next_begins() -> None:
    parts: list[tuple[int | str | bytes, ...]] = [
        ("ab", "c"),
        ("a", "bc"),
        ("abc",),
        (1, 2),
        (12,),
        ("1", 2),
        (b"ab", "c"),
    ]
    assert len({hash64(*each) for each in parts}) == len(parts)
    assert hash64(0, "embed") == 6578579153981726296  # blake2b of "int:1:0str:5:embed", on any machine


def test_each_word_is_uniform_and_independent_of_its_neighbour() -> None:
    words = keys_of(list(range(64))).bits((1024,)).flatten()
    counts = torch.bincount(words >> 26, minlength=64).double()
    expected = words.numel() / 64
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 63 + 5 * math.sqrt(2 * 63)
    assert words.min() >= 0
    assert words.max() < 2**32
    pairs = torch.corrcoef(torch.stack((words[:-1], words[1:])).double())[0, 1]
    assert abs(float(pairs)) < 5 / math.sqrt(words.numel())
    ones = torch.stack([(words >> bit) & 1 for bit in range(32)]).double().mean(dim=1)
    assert float((ones - 0.5).abs().max()) < 5 * 0.5 / math.sqrt(words.numel())


def test_uniform_numbers_lie_in_zero_to_one_and_are_exact_in_float32() -> None:
    u = keys_of(list(range(16))).uniform((4096,))
    assert u.dtype == torch.float32
    assert 0 <= float(u.min()) < 1e-3
    assert 1 - 1e-3 < float(u.max()) < 1
    assert torch.equal((u * 2**24).round(), u * 2**24)
    assert abs(float(u.double().mean()) - 0.5) < 5 / math.sqrt(12 * u.numel())


def test_normal_numbers_have_the_moments_of_the_normal_distribution() -> None:
    z = keys_of(list(range(16))).normal((8192,)).double()
    n = z.numel()
    assert bool(z.isfinite().all())
    assert abs(float(z.mean())) < 5 / math.sqrt(n)
    assert abs(float((z**2).mean()) - 1) < 5 * math.sqrt(2 / n)
    assert abs(float((z**4).mean()) - 3) < 5 * math.sqrt(96 / n)


@given(st.integers(1, 2**40), STEPS)
def test_an_integer_stays_in_its_range_and_every_rank_draws_the_same(high: int, step: int) -> None:
    first, second = (Keys.of_step(9, step).fold("budget").integer(high) for _ in range(2))
    assert first == second
    assert 0 <= first < high


def test_integers_are_spread_evenly() -> None:
    counts = torch.zeros(5)
    for step in range(2000):
        counts[Keys.of_step(1, step).integer(5)] += 1
    assert float(((counts - 400) ** 2 / 400).sum()) < 4 + 5 * math.sqrt(8)


def test_the_generator_is_the_same_each_time_and_differs_by_step() -> None:
    draws = [torch.rand(4, generator=keys_of([0], step=step).generator()).tolist() for step in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


@settings(deadline=None)
@given(st.sampled_from([0.1, 0.25, 0.5, 0.9]), st.integers(0, 1000))
def test_dropout_keeps_the_mean_and_drops_the_share_it_was_told(p: float, step: int) -> None:
    x = torch.ones(8, 32, 64)
    y = dropout(x, p, keys_of(list(range(8)), step=step))
    dropped = float((y == 0).double().mean())
    assert abs(dropped - p) < 6 * math.sqrt(p * (1 - p) / x.numel())
    assert torch.allclose(y[y != 0], torch.tensor(1 / (1 - p)))


def test_dropout_of_a_sample_does_not_depend_on_the_micro_batch_it_sits_in() -> None:
    x = torch.randn(6, 5, 7)
    keys = keys_of(list(range(6))).fold("mlp")
    whole = dropout(x, 0.3, keys)
    for size in (1, 2, 4):
        parts = [dropout(x[i : i + size], 0.3, keys.rows(i, i + size)) for i in range(0, 6, size)]
        assert torch.equal(torch.cat(parts), whole)


def test_dropout_draws_the_same_mask_again_when_an_activation_is_recomputed() -> None:
    x = torch.randn(4, 9, requires_grad=True)
    keys = keys_of(list(range(4)))
    assert torch.equal(dropout(x, 0.5, keys), dropout(x, 0.5, keys))
    dropout(x, 0.5, keys).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad == 0, dropout(torch.ones(4, 9), 0.5, keys) == 0)


def test_dropout_leaves_everything_in_evaluation_or_at_rate_zero() -> None:
    x = torch.randn(3, 4)
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, keys_of([0, 1, 2])) is x


def test_asking_for_more_numbers_than_a_counter_holds_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"at most 2\*\*34"):
        keys_of([0]).bits((2**35,))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_does_not_change_the_words() -> None:
    keys = keys_of(list(range(5)), seed=2**60, step=2**33).fold("x")
    assert torch.equal(keys.bits((37,), "cuda").cpu(), keys.bits((37,)))


@settings(max_examples=50, deadline=None)
@given(tokens=st.integers(1, 9), width=st.integers(1, 9), slots=st.lists(st.integers(0, 9), min_size=1, max_size=3))
def test_keys_of_some_tokens_draw_those_rows_of_the_whole_sample(tokens: int, width: int, slots: list[int]) -> None:
    places = torch.randperm(tokens, generator=torch.Generator().manual_seed(width))[: (tokens + 1) // 2]
    keys = keys_of(slots).fold("mlp")
    assert torch.equal(keys.at(places).bits((len(places), width)), keys.bits((tokens, width))[:, places])


def test_keys_of_some_tokens_refuse_numbers_of_another_shape() -> None:
    with pytest.raises(ValueError, match="keys of 3 tokens"):
        keys_of([0]).at(torch.arange(3)).bits((4, 2))
