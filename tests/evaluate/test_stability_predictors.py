from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resilin.evaluate.critical_size import predict_critical
from resilin.evaluate.epsilon import eps_advice, update_kept

SIZES = (2.4e6, 9.4e6, 4.2e7, 1.5e8, 8.2e8)


@given(st.floats(0.05, 0.4), st.floats(7.5, 11.0), st.floats(0.5, 3.0))
def test_a_planted_quadratic_and_its_crossing_are_recovered(curvature, crossing, slope):
    # y = 4 at log10(N) = crossing, rising there with the given slope; the vertex lies left of the first size or the
    # first size is still below the threshold on the rising branch.
    def log_norm(x: float) -> float:
        return 4.0 + slope * (x - crossing) + curvature * (x - crossing) ** 2

    points = [(n, 10.0 ** log_norm(math.log10(n))) for n in SIZES]
    found = predict_critical(points)
    assert found.degree == 2
    for got, want in zip(
        found.coefficients,
        (curvature, slope - 2 * curvature * crossing, 4.0 - slope * crossing + curvature * crossing**2),
        strict=True,
    ):
        assert got == pytest.approx(want, rel=1e-6, abs=1e-6)
    assert found.residual < 1e-9
    if points[0][1] < 1e4:
        # The other root of the parabola may come first, when the planted one is on the far side.
        other = crossing - slope / curvature
        first = min(x for x in (crossing, other) if x >= math.log10(SIZES[0]))
        assert math.log10(found.size) == pytest.approx(first, abs=1e-5)
        assert found.lowest == pytest.approx(found.size, rel=1e-3)
        assert found.highest == pytest.approx(found.size, rel=1e-3)


def test_fewer_than_four_sizes_get_a_line_and_it_says_so():
    found = predict_critical([(1e6, 1e1), (1e7, 1e2), (1e8, 1e3)])
    assert found.degree == 1
    assert found.size == pytest.approx(1e9, rel=1e-6)
    assert "line (fewer than four sizes)" in str(found)


def test_a_falling_norm_is_never_critical_and_one_above_is_critical_at_once():
    assert predict_critical([(1e6, 1e3), (1e7, 1e2)]).size is None
    assert "none below" in str(predict_critical([(1e6, 1e3), (1e7, 1e2)]))
    assert predict_critical([(1e6, 2e4), (1e7, 3e4)]).size == pytest.approx(1e6)


def test_a_crossing_beyond_the_horizon_is_none():
    points = [(1e6, 1e1), (1e7, 1e2)]
    assert predict_critical(points, horizon=1e8).size is None
    assert predict_critical(points, horizon=2e9).size == pytest.approx(1e9)


def test_leaving_one_size_out_spreads_the_prediction_of_noisy_points():
    found = predict_critical([(1e6, 1e1), (1e7, 1.3e2), (1e8, 0.9e3)])
    assert found.lowest < found.size < found.highest


@pytest.mark.parametrize("points", [[], [(1e6, 1.0)], [(1e6, 1.0), (1e6, 2.0)], [(1e6, 0.0), (1e7, 1.0)]])
def test_points_that_cannot_be_fitted_are_refused(points):
    with pytest.raises(ValueError):
        predict_critical(points)


def test_gradients_that_shrink_with_size_cross_ten_eps_where_the_line_says():
    advice = eps_advice([(1e6, 1e-4), (1e7, 1e-5), (1e8, 1e-6)], eps=1e-8)
    assert advice.slope == pytest.approx(-1.0)
    assert advice.critical_size == pytest.approx(1e9)
    assert not advice.warns(0.9e9)
    assert advice.warns(1.1e9)
    assert advice.too_large_by(1e10) == pytest.approx(10.0)
    assert advice.proposal(1e10) == pytest.approx(1e-11)
    assert "too large by 10" in advice.text(1e10)
    assert "fine" in advice.text(1e8)
    assert eps_advice([(1e6, 1e-4), (1e7, 1e-4)], eps=1e-8).critical_size is None


@settings(deadline=None)  # the first call imports the compiler
@given(st.floats(-12.0, 0.0), st.sampled_from([1e-6, 1e-8, 1e-15]))
def test_first_adam_step_of_a_constant_gradient_is_cut_as_predicted(log_rms, eps):
    rms = 10.0**log_rms
    p = torch.nn.Parameter(torch.zeros(8, dtype=torch.float64))
    optimizer = torch.optim.AdamW([p], lr=1.0, eps=eps, weight_decay=0.0, betas=(0.9, 0.95))
    p.grad = torch.full_like(p, rms)
    optimizer.step()
    assert p.abs().max().item() == pytest.approx(update_kept(rms, eps), rel=1e-9)
