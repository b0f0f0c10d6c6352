"""A hybrid decoder is divided by its batches only, and says so."""

from __future__ import annotations

import pytest
from hybrid_cases import hybrid

from resilin.parallel.errors import ParallelError
from resilin.parallel.pipeline.stage import decoder_in
from resilin.parallel.sequence.ulysses import undivided
from resilin.parallel.tensor.parallelise import plan_of


@pytest.mark.parametrize(
    ("divide", "words"),
    [(decoder_in, "pipeline = 1"), (undivided, "context = 1"), (plan_of, "tensor = 1")],
    ids=["pipeline", "context", "tensor"],
)
def test_it_cannot_be_divided_inside(divide, words):
    with pytest.raises(ParallelError, match=words):
        divide(hybrid())
