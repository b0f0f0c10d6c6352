"""What to train with so much data and compute: laws are recovered, bands hold the truth, short data change it."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from resilin.cli.main import app
from resilin.config import UserError
from resilin.planner.bootstrap import Band, bootstrap_power_law, resample
from resilin.planner.buy import buy, read_runs
from resilin.planner.family import FamilyCost
from resilin.planner.regularisers import TUNED, short_of_data
from resilin.planner.rho import Rho
from resilin.planner.scaling_law import Run, ScalingLaw, bootstrap_scaling_law, fit_scaling_law

CHINCHILLA = ScalingLaw(1.69, 406.4, 0.34, 410.7, 0.28)
SIZES, LENGTHS = (1e7, 1e8, 1e9, 1e10), (1e8, 1e9, 1e10, 1e11)


def runs(law: ScalingLaw, noise: float = 0.0, seed: int = 0) -> list[Run]:
    draw = random.Random(seed)
    return [Run(p, t, law.loss(p, t) * math.exp(draw.gauss(0, noise))) for p in SIZES for t in LENGTHS]


@given(
    floor=st.floats(0.5, 2.5), a=st.floats(5, 1000), alpha=st.floats(0.2, 0.6), b=st.floats(5, 1000),
    beta=st.floats(0.2, 0.6),
)  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_a_planted_law_is_recovered(floor: float, a: float, alpha: float, b: float, beta: float) -> None:
    planted = ScalingLaw(floor, a, alpha, b, beta)
    found = fit_scaling_law(runs(planted))
    for p, t in ((3e8, 3e9), (1e11, 1e12)):  # the second is far beyond the runs
        assert found.loss(p, t) == pytest.approx(planted.loss(p, t), rel=1e-3)
    assert found.residual < 1e-5


def test_the_best_split_is_that_of_least_loss_on_its_budget() -> None:
    for flops in (1e18, 1e21, 1e24):
        for unique in (math.inf, 1e9):
            best = CHINCHILLA.best(flops, unique)
            assert 6 * best.parameters * best.tokens == pytest.approx(flops)
            least = CHINCHILLA.loss(best.parameters, best.tokens, unique)
            for factor in (0.5, 0.9, 1.1, 2.0):
                size = best.parameters * factor
                assert CHINCHILLA.loss(size, flops / 6 / size, unique) > least


def test_where_data_are_short_models_are_larger_and_data_are_repeated() -> None:
    fresh, short = CHINCHILLA.best(1e21), CHINCHILLA.best(1e21, 1e9)
    assert short.parameters > fresh.parameters
    assert 1e9 < short.tokens < fresh.tokens
    plenty = CHINCHILLA.best(1e21, 1e12)
    assert plenty == fresh


def test_bands_hold_the_truth_of_noisy_runs_and_narrow_with_the_noise() -> None:
    wide, narrow = (bootstrap_scaling_law(runs(CHINCHILLA, noise), draws=20) for noise in (0.01, 0.001))
    true = CHINCHILLA.best(1e21).parameters
    bands = [one.band(lambda law: law.best(1e21).parameters) for one in (wide, narrow)]
    assert all(band.low < true * 1.2 and true < band.high * 1.2 for band in bands)
    assert all(band.low <= band.value <= band.high for band in bands)
    assert bands[1].high / bands[1].low < bands[0].high / bands[0].low
    again = bootstrap_scaling_law(runs(CHINCHILLA, 0.001), draws=20)
    assert again.others == narrow.others


def test_a_loss_curve_has_bands() -> None:
    draw = random.Random(1)
    t = [100 * 1.2**k for k in range(30)]
    losses = [(5 * x**-0.2 + 1.0) * math.exp(draw.gauss(0, 0.005)) for x in t]
    found = bootstrap_power_law(t, losses, floor=True)
    band = found.band(lambda law: law.loss(2 * t[-1]))
    assert band.low < 5 * (2 * t[-1]) ** -0.2 + 1.0 < band.high
    exact = bootstrap_power_law(t, [5 * x**-0.2 for x in t]).band(lambda law: law.k)
    assert exact == Band(pytest.approx(0.2), pytest.approx(0.2), pytest.approx(0.2))


def test_resampled_points_are_drawn_evenly_and_by_seed() -> None:
    drawn = resample(5, 2000, seed=3)
    counts = [sum(points.count(at) for points in drawn) for at in range(5)]
    assert all(abs(count / 2000 - 1) < 0.1 for count in counts)
    assert drawn == resample(5, 2000, seed=3) != resample(5, 2000, seed=4)


@pytest.mark.parametrize(
    "bad",
    [
        runs(CHINCHILLA)[:5],
        [Run(1e8, t, 3.0) for t in (1e8, 1e9, 1e10, 2e10, 3e10, 4e10)],
        [Run(p, t, 3.0 + 0.1 * math.log10(p * t)) for p in SIZES for t in LENGTHS],
    ],
)
def test_runs_that_no_law_goes_through_are_refused(bad: list[Run]) -> None:
    with pytest.raises(ValueError, match="law"):
        fit_scaling_law(bad)


def test_short_data_are_trained_as_the_tuned_models_were() -> None:
    for unique, sizes in TUNED.items():
        for size, (epochs, lr, decay) in sizes.items():
            found = short_of_data(size, unique)
            assert (found.epochs, found.lr, found.weight_decay) == pytest.approx((epochs, lr, decay))
            assert found.inside
    between = short_of_data(212e6, 209.7e6)
    assert 0.8 < between.weight_decay < 1.6
    far = short_of_data(1e12, 1e6)
    assert not far.inside
    assert far.weight_decay == pytest.approx(3.2)
    assert (far.of_member().epochs, far.of_member().weight_decay) == pytest.approx((2 * far.epochs, 1.6))


def test_a_nested_family_costs_the_mean_of_its_members() -> None:
    family = FamilyCost((1e8, 2e8, 4e8, 8e8), 1e10)
    assert family.separate == pytest.approx(6 * 15e8 * 1e10)
    assert family.nested == pytest.approx(family.separate / 4)
    assert family.nested < family.largest == pytest.approx(6 * 8e8 * 1e10)
    assert family.stored == pytest.approx(8 / 15)
    assert FamilyCost((8e8,), 1e10).nested == family.largest
    with pytest.raises(ValueError, match="ascending"):
        FamilyCost((2e8, 1e8), 1e10)


def test_the_rule_is_shown_beside_the_law() -> None:
    bought = buy(1e21, math.inf, Rho(20.0, "as given"), runs(CHINCHILLA), draws=20)
    assert bought.best is not None
    assert bought.best.parameters == pytest.approx(CHINCHILLA.best(1e21).parameters, rel=1e-3)
    assert bought.rule.tokens == pytest.approx(20 * bought.rule.parameters)
    assert bought.loss is not None
    assert bought.rule_loss is not None
    assert bought.loss.value <= bought.rule_loss.value
    assert bought.recipe is None
    assert buy(1e21, 1e8, Rho(20.0, "as given"), []).recipe is not None


def write(path: Path, rows: list[str]) -> Path:
    path.write_text("\n".join(["name,parameters,tokens,loss", *rows]))
    return path


def call(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["plan", "budget", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def test_the_command_tells_law_rule_short_data_and_family(tmp_path: Path) -> None:
    rows = [f"run,{run.parameters},{run.tokens},{run.loss}" for run in runs(CHINCHILLA, 0.002)]
    path = write(tmp_path / "runs.csv", rows)
    said = call(path, "--flops", "1e21", "--draws", 20)
    assert "by the law" in said
    assert "by rho = 20" in said
    assert "epochs" not in said
    said = call(path, "--flops", "1e21", "--unique", "1e8", "--family", "0.25,0.5,1", "--draws", 20)
    for words in ("data are short", "weight decay", "ensemble", "a family of", "nested with one member a step"):
        assert words in said
    assert "by the law" not in call("--flops", "1e20")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give a budget"),
        (["--flops", "1e20", "--rho", "many"], "auto or a positive number"),
        (["--flops", "1e20", "--family", "1,-1"], "positive numbers"),
        (["--flops", "-1"], "positive"),
        (["none.csv", "--flops", "1e20"], "cannot be read"),
    ],
)
def test_what_cannot_be_is_said(arguments: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        call(*arguments)


def test_a_wrong_line_of_runs_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"runs\.csv:3: 1e8,1e9,-2"):
        read_runs(write(tmp_path / "runs.csv", ["a,1e8,1e9,3", "b,1e8,1e9,-2"]))
    (tmp_path / "other.csv").write_text("size,loss\n1,2\n")
    with pytest.raises(UserError, match="columns parameters, tokens, loss"):
        read_runs(tmp_path / "other.csv")
