"""What a stage takes for a micro-batch."""

from __future__ import annotations

import pytest

from resilin.parallel.pipeline.pace import Pace


def test_the_first_step_and_a_pause_do_not_count():
    pace = Pace()
    pace.step([9.0, 9.0, 9.0])
    assert (pace.steps, pace.seconds) == (0, 0.0)
    pace.step([1.0, 1.0, 50.0])
    pace.step([])
    pace.step([2.0, 2.0, 2.0])
    assert (pace.steps, pace.seconds) == (2, pytest.approx(1.5))
