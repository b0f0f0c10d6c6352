"""`resilin plan` as a user meets it: the table, the plan, what is missing, and errors that name the option."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from resilin.cli.plan import plan
from resilin.config import UserError, load_settings, settings_to_toml
from resilin.data.write_shards import write_documents
from resilin.planner.family import Architecture
from resilin.planner.measure import step_seconds
from resilin.planner.regularisers import without_regularisers
from resilin.planner.request import PlanRequest, answer_request
from resilin.planner.run_laws import run_law
from resilin.run.events import StepDone
from resilin.run.jsonl_log import JsonlLog
from resilin.run.settings import RunSettings

RUN = """
train = { steps = 200, batch_size = 4, device = "cpu", threads = 1 }
model = { hidden_size = 32, layers = 2, heads = 4, dropout = 0.1 }
optimizer.weight_decay = 0.1
precision.compute = "fp32"
evaluation = { every = 0 }
[source]
use = "resilin.data.packed:Shards"
path = "PATH"
sequence_length = 16
"""


def quiet(line: str) -> None:
    """Nobody listens."""


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    documents = [rng.integers(1, 300, 500) for _ in range(20)]
    shards = write_documents(tmp_path / "shards", documents, 300)
    file = tmp_path / "run.toml"
    file.write_text(RUN.replace("PATH", str(shards.folder)), encoding="utf-8")
    return file


@pytest.fixture
def command() -> Callable[..., str]:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(plan)

    def call(*arguments: object) -> str:
        result = CliRunner().invoke(app, [str(word) for word in arguments], env={"COLUMNS": "100"})
        if result.exception is not None:
            raise result.exception
        return re.sub(r"\s+", " ", result.output)

    return call


def test_without_a_settings_file_the_table_the_plan_and_its_overrides_are_printed(command: Callable[..., str]) -> None:
    text = command("--flops", "1e19", "--available-tokens", "1e11")
    for part in (
        "Candidates for 1e+19 FLOPs",
        "rho = 20 tokens per parameter (practical default",
        "every token once, dropout 0",
        "Train it with these overrides: model.layers=",
        "train.steps=",
    ):
        assert part in text
    assert "warning" not in text


def test_the_faithful_mode_says_that_it_uses_five(command: Callable[..., str]) -> None:
    assert "rho = 5 tokens per parameter (faithful default, the paper's value" in command(
        "--tokens", 1e10, "--faithful"
    )
    assert "rho = 7 tokens per parameter (as given)" in command("--tokens", 1e10, "--rho", 7)


def test_the_settings_of_a_run_give_family_batch_and_tokens_and_lose_their_dropout(
    command: Callable[..., str], run_file: Path
) -> None:
    text = command(run_file, "--tokens", 6400)
    assert "9.5k unique tokens" in text or "9.4k unique tokens" in text or "9.49k unique tokens" in text
    assert "100 steps of 64 tokens" in text
    assert "model.dropout is set to 0 (it was 0.1)" in text
    assert "optimizer.weight_decay = 0.1 is left" in text
    kept = command(run_file, "--tokens", 6400, "--keep-dropout")
    assert "model.dropout=0.1" in kept
    assert "is kept as insisted on" in kept


def test_more_tokens_than_there_are_is_a_warning_with_what_to_ask_for(
    command: Callable[..., str], run_file: Path
) -> None:
    text = command(run_file, "--tokens", 64000, "--available-tokens", 32000, "--duplicate-rate", 0)
    assert "2 epochs" in text
    assert "get 32k more tokens" in text
    halved = command(run_file, "--tokens", 64000, "--available-tokens", 32000, "--duplicate-rate", 0.5)
    assert "4 epochs" in halved
    assert "50.0% of the corpus repeats" in halved


def test_an_existing_run_is_divided_anew_at_the_same_cost(command: Callable[..., str], run_file: Path) -> None:
    text = command(run_file, "--adjust", "--rho", 5, "--available-tokens", 1e9)
    assert "now: 2x32/4" in text
    before = Architecture.of(load_settings(RunSettings, run_file).model)
    answer = answer_request(PlanRequest(file=run_file, rho="5", available_tokens=1e9), True, quiet)
    chosen = answer.plan.chosen
    cost = 6 * before.parameters * 200 * 64
    assert 6 * chosen.architecture.parameters * chosen.tokens == pytest.approx(cost, rel=0.05)


def test_a_wall_clock_budget_is_measured_here_at_three_sizes(run_file: Path) -> None:
    said: list[str] = []
    answer = answer_request(PlanRequest(file=run_file, hours=0.01, available_tokens=1e12), False, said.append)
    assert sum("ms a step" in line for line in said) == 3
    chosen = answer.plan.chosen
    assert chosen.step_seconds is not None
    assert chosen.steps * chosen.step_seconds == pytest.approx(36, rel=0.05)


def test_measuring_a_step_trains_the_model_it_is_asked_for(run_file: Path) -> None:
    settings = load_settings(RunSettings, run_file)
    large = settings.model.model_copy(update={"hidden_size": 256, "layers": 6})
    small = step_seconds(settings, 16, 300)
    assert 0 < small < step_seconds(settings.model_copy(update={"model": large}), 16, 300)


def test_pilot_runs_measure_rho_or_say_why_they_cannot(run_file: Path) -> None:
    said: list[str] = []
    answer = answer_request(
        PlanRequest(file=run_file, flops=1e9, pilots=True, available_tokens=1e9), False, said.append
    )
    assert any("no pilot runs: 2% of this budget does not pay" in line for line in said)
    assert answer.plan.rho.value == 20


def log_of_a_run(folder: Path, source: Path, a: float, k: float, *overrides: str, peak: int = 400) -> None:
    """A run's folder whose loss is a power law of the steps until the rate decays."""
    folder.mkdir()
    settings = load_settings(RunSettings, source, ["train.steps=500", *overrides])
    (folder / "settings.toml").write_text(settings_to_toml(settings), encoding="utf-8")
    log = JsonlLog(folder / "events.jsonl")
    for step in range(1, 501):
        lr = 1e-3 * (step / 10 if step < 10 else 1.0 if step <= peak else 0.5)
        loss = a * step**-k * (1.0 if step <= peak else 0.8)
        log(StepDone(step=step, loss=loss, lr=lr, grad_norm=1.0, units=64, seconds=0.1))
    log.close()


def test_the_law_of_a_run_is_read_from_its_folder_in_tokens_and_without_the_decay(
    tmp_path: Path, run_file: Path
) -> None:
    log_of_a_run(tmp_path / "run", run_file, 6.0, 0.2)
    parameters, law = run_law(tmp_path / "run")
    assert parameters == Architecture.of(load_settings(RunSettings, run_file).model).parameters
    assert law.k == pytest.approx(0.2, abs=1e-6)
    assert law.loss(64 * 1000) == pytest.approx(6.0 * 1000**-0.2, rel=1e-6)


def test_predicted_losses_of_fitted_runs_stand_in_the_table(
    tmp_path: Path, run_file: Path, command: Callable[..., str]
) -> None:
    log_of_a_run(tmp_path / "run", run_file, 6.0, 0.2)
    assert "predicted loss" in command(run_file, "--tokens", 6400, "--fit", tmp_path / "run")
    assert "predicted loss" not in command(run_file, "--tokens", 6400)


def test_two_fitted_runs_say_where_they_cross(tmp_path: Path, run_file: Path) -> None:
    log_of_a_run(tmp_path / "small", run_file, 6.0, 0.2)
    log_of_a_run(tmp_path / "large", run_file, 12.0, 0.3, "model.layers=4")
    fits = (tmp_path / "small", tmp_path / "large")
    answer = answer_request(PlanRequest(file=run_file, tokens=6400, fits=fits), False, quiet)
    # 6 t^-0.2 = 12 t^-0.3 at t = 2^10 steps of 64 tokens
    assert any("cross at 65.5k tokens, loss 1.5" in note for note in answer.notes)


def test_watching_a_run_tells_its_law_without_the_decay(
    tmp_path: Path, run_file: Path, command: Callable[..., str]
) -> None:
    schedule = "optimizer.schedule={use='resilin.optim.schedule:WarmupStableDecay',warmup=10,decay=100}"
    log_of_a_run(tmp_path / "run", run_file, 6.0, 0.2, schedule)
    text = command("--watch", tmp_path / "run")
    assert "step 1: loss 6.0000; too few points for a power law" in text
    assert re.search(r"step 431: .* t\^-0\.200.*final loss 1\.73", text)
    with pytest.raises(UserError, match="no run was started here"):
        command("--watch", tmp_path / "nothing")


def test_a_folder_without_a_run_or_with_too_short_a_plateau_cannot_be_fitted(tmp_path: Path, run_file: Path) -> None:
    with pytest.raises(UserError, match="there is no log"):
        run_law(tmp_path / "nothing")
    log_of_a_run(tmp_path / "run", run_file, 6.0, 0.2, peak=30)
    with pytest.raises(UserError, match="peak learning rate are too few"):
        run_law(tmp_path / "run")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "give one budget"),
        (("--flops", "1e18", "--hours", "1"), "give one budget"),
        (("--hours", "1"), "--hours needs a settings file"),
        (("--adjust",), "--adjust needs a settings file"),
        (("--flops", "1e18", "--pilots"), "--pilots needs a settings file"),
        (("--flops", "-3"), "--flops -3: a budget should be positive"),
        (("--flops", "1e18", "--rho", "many"), "--rho many: should be auto or a positive number"),
        (("--flops", "1e18", "--batch-tokens", "0"), "--batch-tokens 0: should be at least 1"),
        (("--flops", "1e18", "--available-tokens", "0"), "--available-tokens 0: should be positive"),
        (("--flops", "1e18", "--duplicate-rate", "1.5"), "--duplicate-rate 1.5: is a share of the corpus"),
        (("--flops", "1e18", "model.hiden_size=3"), "did you mean 'hidden_size'"),
        (("nowhere.toml", "--flops", "1e18"), "nowhere.toml: no such settings file"),
    ],
)
def test_a_wrong_option_is_named_with_what_to_do(
    command: Callable[..., str], arguments: tuple[str, ...], says: str
) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        command(*arguments)


def test_regularisers_are_switched_off_unless_the_user_insists(run_file: Path) -> None:
    settings = load_settings(RunSettings, run_file, ["objective.label_smoothing=0.1"])
    overrides, notes = without_regularisers(settings)
    assert overrides == ("model.dropout=0.0", "objective.label_smoothing=0.0")
    assert len(notes) == 3
    kept, notes = without_regularisers(settings, insist=True)
    assert kept == ()
    assert sum("as insisted on" in note for note in notes) == 2
    plain = load_settings(RunSettings, run_file, ["model.dropout=0", "optimizer.weight_decay=0"])
    assert without_regularisers(plain) == ((), ())


def test_copied_documents_are_found_in_the_settings_source_and_common_phrases_are_not(
    tmp_path: Path, run_file: Path
) -> None:
    rng = np.random.default_rng(1)
    once = [rng.integers(1, 300, 2000) for _ in range(10)]
    phrase = np.arange(1, 41)
    common = [np.concatenate([phrase, rng.integers(1, 300, 400)]) for _ in range(50)]
    for name, documents, expected in (("copies", [*once, *once], 0.5), ("phrases", common, 0.0)):
        shards = write_documents(tmp_path / name, documents, 300)
        overrides = (f"source.path={shards.folder}", "source.sequence_length=16")
        answer = answer_request(PlanRequest(file=run_file, overrides=overrides, tokens=6400), False, quiet)
        assert answer.plan.data.duplicate_rate == pytest.approx(expected, abs=0.07)
