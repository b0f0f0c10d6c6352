from hypothesis import given
from hypothesis import strategies as st

from resilin.parallel.micro_batches import even_batches, in_runs, micro_batches


@given(st.integers(1, 200), st.integers(0, 20), st.integers(1, 17))
def test_every_worker_has_its_share_of_the_slots_in_as_few_micro_batches_as_can_be(count: int, size: int, workers: int):
    micros = even_batches(count, size, workers)
    assert [slot for micro in micros for slot in micro] == list(range(count))
    assert all(1 <= len(micro) <= (size or count) for micro in micros)
    dealt = [[micros[number] for number in run] for run in in_runs(len(micros), workers)]
    shares = [sum(map(len, mine)) for mine in dealt]
    assert max(shares) - min(shares) <= 1
    most = -(-count // workers)
    assert max(len(mine) for mine in dealt) == (-(-most // size) if size else 1)
    assert all(max(map(len, mine)) - min(map(len, mine)) <= 1 for mine in dealt if mine)


@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 8))
def test_where_micro_batches_come_out_even_they_are_the_usual_ones(each: int, size: int, workers: int):
    count = each * size * workers
    assert even_batches(count, size, workers) == micro_batches(count, size, workers)
