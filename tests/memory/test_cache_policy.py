from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilin.memory import CachePolicy


class Plain:
    """The rule, said with a list of [key, hits] in the order of insertion."""

    def __init__(self, capacity, threshold, period, decay):
        self.capacity, self.threshold, self.period, self.decay = capacity, threshold, period, decay
        self.rows, self.requests = [], 0

    def get(self, key, pinned):
        row = next((row for row in self.rows if row[0] == key), None)
        evicted, cached = None, True
        if row is not None:
            row[1] += 1
        else:
            if len(self.rows) == self.capacity:
                free = [r for r in self.rows if r[0] not in pinned]
                free = [r for r in free if r[1] >= self.threshold] or free
                if free:
                    worst = free[0]
                    for candidate in free[1:]:
                        if candidate[1] < worst[1]:
                            worst = candidate
                    self.rows.remove(worst)
                    evicted = worst[0]
                else:
                    cached = False
            if cached:
                self.rows.append([key, 1.0])
        self.requests += 1
        if self.requests % self.period == 0:
            for r in self.rows:
                r[1] *= self.decay
        return row is not None, cached, evicted


keys = st.tuples(st.integers(0, 1), st.integers(0, 4))


@settings(max_examples=150, deadline=None)
@given(
    trace=st.lists(st.tuples(keys, st.frozensets(keys, max_size=4)), max_size=60),
    capacity=st.integers(0, 6),
    threshold=st.sampled_from([1.0, 2.0, 3.0]),
    period=st.integers(1, 9),
    decay=st.sampled_from([1.0, 0.5, 0.9]),
)
def test_every_trace_goes_by_the_rule(trace, capacity, threshold, period, decay):
    policy = CachePolicy(capacity, threshold=threshold, period=period, decay=decay)
    plain = Plain(capacity, threshold, period, decay)
    for key, pinned in trace:
        assert tuple(policy.get(key, pinned)) == plain.get(key, pinned)
        assert list(policy.hits.items()) == [tuple(row) for row in plain.rows]
        assert len(policy.hits) <= capacity


def hit_rate(requests, capacity, **options) -> float:
    policy = CachePolicy(capacity, **options)
    return sum(policy.get((0, expert)).hit for expert in requests) / len(requests)


def zipf(count, seed, order=range(64)):
    weights = [1 / (1 + place) for place in range(64)]
    return random.Random(seed).choices(list(order), weights, k=count)


@pytest.mark.parametrize("capacity", [8, 16, 32])
def test_frequencies_beat_recency_when_some_experts_are_popular(capacity):
    requests = zipf(20000, 0)
    lfu = hit_rate(requests, capacity, period=500, decay=0.5)
    assert lfu > hit_rate(requests, capacity, kind="lru") + 0.03


def test_forgetting_helps_when_other_experts_become_popular():
    order = list(range(64))
    random.Random(1).shuffle(order)
    requests = zipf(10000, 0) + zipf(10000, 2, order)
    assert hit_rate(requests, 8, period=500, decay=0.5) > hit_rate(requests, 8, decay=1.0) + 0.03


def test_the_least_recent_goes_under_lru():
    policy = CachePolicy(2, kind="lru")
    for expert in (1, 2, 1):
        policy.get((0, expert))
    assert policy.get((0, 3)).evicted == (0, 2)


@pytest.mark.parametrize("wrong", [{"capacity": -1}, {"capacity": 1, "period": 0}, {"capacity": 1, "decay": 0.0}])
def test_impossible_caches_are_refused(wrong):
    with pytest.raises(ValueError, match="capacity should be at least 0"):
        CachePolicy(**wrong)
