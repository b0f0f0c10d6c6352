"""Replicas that are lost: what is played in one process, what real processes do, and what the claims follow from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from resilin.config import SettingsError, UserError, parse_settings
from resilin.data.settings import SourceContext
from resilin.keys import Keys
from resilin.models.settings import ModelContext
from resilin.nouns import Batch
from resilin.recipes.cells import cells
from resilin.recipes.elaswave import losses as losses_module
from resilin.recipes.elaswave.analysis import BASELINES, ORDER, TASKS, analyse, throughput
from resilin.recipes.elaswave.digits import DigitNetworkSettings, Digits
from resilin.recipes.elaswave.losses import blows_of, train_with_losses
from resilin.recipes.elaswave.replicas import ReplicaLoss, Replicas
from resilin.recipes.execute import Job, train
from resilin.recipes.findings import Evaluation, RunRecord, Study, Trial
from resilin.recipes.recipe import load_recipe
from resilin.run.chaos_report import Told
from resilin.run.settings import RunSettings

RECIPE = Path(__file__).parents[2] / "recipes" / "elaswave"
INNER = {"use": "resilin.vision.classification:Classification"}
pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


def replicas(**more: Any) -> ReplicaLoss:
    made = parse_settings(Replicas, {"inner": INNER, "replicas": 4, "micro": 2, **more}, "test").build()
    assert isinstance(made, ReplicaLoss)
    return made


def digits(slots: int = 16, step: int = 0) -> Batch:
    return Digits().build(SourceContext(batch_size=slots)).fetch(step, range(slots))


def gradient(objective: Any, batch: Batch, step: int, dropout: float = 0.5) -> torch.Tensor:
    """All gradients of a step, divided by its units, in one vector."""
    model = DigitNetworkSettings(dropout=dropout).build(ModelContext(0))
    loss = objective(model, batch, Keys(0, step, batch.slots_B))
    (loss.sum / loss.units).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


@pytest.mark.parametrize("orphans", ["whole", "reshape"])
def test_with_random_numbers_of_slots_a_loss_changes_no_gradient_beyond_rounding(orphans: str) -> None:
    batch = digits()
    alone = gradient(parse_settings(Replicas, {"inner": INNER}, "test").inner.build(), batch, 5)
    assert alone.abs().max() > 0
    for lost in ([], [[3, 1]], [[3, 1], [5, 0]], [[3, 1], [4, 0], [5, 3]]):
        torch.testing.assert_close(gradient(replicas(lost=lost, orphans=orphans), batch, 5), alone)


def test_with_streams_of_ranks_the_masks_are_others_from_the_loss_on() -> None:
    batch = digits()
    before, after = replicas(randomness="rank"), replicas(randomness="rank", lost=[[1, 2]])
    assert torch.equal(gradient(before, batch, 0), gradient(after, batch, 0))
    mine, other = gradient(before, batch, 1), gradient(after, batch, 1)
    assert not torch.allclose(mine, other, rtol=0.1)
    # Without dropout nobody draws: what is left of the difference is rounding.
    torch.testing.assert_close(gradient(before, batch, 2, dropout=0.0), gradient(after, batch, 2, dropout=0.0))


def test_a_dropped_shard_leaves_the_mean_over_the_others() -> None:
    batch = digits()
    inner = parse_settings(Replicas, {"inner": INNER}, "test").inner.build()
    left = [slot for slot in range(16) if not 4 <= slot < 8]  # replica 1 has micro-batches 2 and 3
    rows = Batch(batch.slots_B[left], {name: tensor[left] for name, tensor in batch.fields.items()})
    dropped = gradient(replicas(lost=[[0, 1]], orphans="dropped"), batch, 0)
    torch.testing.assert_close(dropped, gradient(inner, rows, 0))
    assert not torch.allclose(dropped, gradient(inner, batch, 0), rtol=0.1)


def test_streams_go_on_where_they_were_saved() -> None:
    batch, first = digits(), replicas(randomness="rank")
    gradient(first, batch, 0)
    saved = first.state_dict()
    expected = gradient(first, batch, 1)
    again = replicas(randomness="rank")
    again.load_state_dict(saved)
    assert torch.equal(gradient(again, batch, 1), expected)
    assert not torch.equal(gradient(replicas(randomness="rank"), batch, 1), expected)
    assert "transform" not in replicas().state_dict()


def test_held_out_data_are_not_shared_out() -> None:
    batch = digits(5)
    model = DigitNetworkSettings().build(ModelContext(0))
    objective = replicas()
    assert torch.equal(objective(model, batch, None).sum, objective.inner(model, batch, None).sum)
    with pytest.raises(ValueError, match="micro_batch_size = 0"):
        objective(model, digits(16).rows(2, 4), Keys(0, 0, torch.tensor([2, 3])))


def test_settings_that_make_no_sense_are_refused() -> None:
    for more, message in (
        ({"lost": [[1, 0], [2, 0]]}, "each can be lost once"),
        ({"replicas": 1, "lost": [[1, 0]]}, "one has to be left"),
        ({"lost": [[1, 7]]}, "each can be lost once"),
        ({"lost": [[2, 0], [1, 1]]}, "in the order of steps"),
        ({"processes": True, "orphans": "reshape"}, "real processes move whole"),
        ({"processes": True, "randomness": "rank"}, "real processes move whole"),
    ):
        with pytest.raises(SettingsError, match=message):
            parse_settings(Replicas, {"inner": INNER, **more}, "test")


def test_digits_are_scikit_learn_s() -> None:
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    found = Digits(held_out={"fraction": 0.0}, shuffle=False).build(SourceContext(batch_size=10))  # type: ignore[arg-type]
    batch, there = found.fetch(3, range(10)), load_digits()
    assert torch.equal(batch["labels"], torch.from_numpy(there.target[30:40]))
    assert torch.equal(batch["inputs"].flatten(1) * 16, torch.from_numpy(there.data[30:40]).float())
    assert found.epoch_length == 1797


# ---- real processes ------------------------------------------------------------------------------------------------


def run_settings(steps: int = 8, **objective: Any) -> RunSettings:
    tree = {
        "source": {"use": "resilin.recipes.elaswave.digits:Digits"},
        "model": {"use": "resilin.recipes.elaswave.digits:DigitNetworkSettings", "widths": [64, 16, 10]},
        "objective": {
            "use": "resilin.recipes.elaswave.replicas:Replicas", "inner": INNER, "replicas": 3, "micro": 2, **objective,
        },
        "optimizer": {"lr": 1e-2, "schedule": {"use": "resilin.optim.schedule:Constant", "warmup": 1}},
        "train": {"steps": steps, "batch_size": 12, "micro_batch_size": 2, "threads": 1, "device": "cpu"},
        "precision": {"compute": "fp32"},
        "evaluation": {"every": 4, "batches": 1},
        "checkpoint": {"every": 0},
        "log": {"tensorboard": False, "live": False},
    }  # fmt: skip
    return parse_settings(RunSettings, tree, "test")


def record(settings: RunSettings, folder: Path) -> RunRecord:
    runner = f"{train_with_losses.__module__}:{train_with_losses.__name__}"
    found = train(Job("x", "x", settings, folder, ("loss", "grad_norm"), runner), 1)
    assert found is not None
    return found


def test_killed_processes_leave_the_bits_of_one_process(tmp_path: Path) -> None:
    # Steps of so small a model are quicker than the moment within which a kill falls: many, for the last to be struck.
    quiet = record(run_settings(60, processes=True), tmp_path / "quiet")
    struck = record(run_settings(60, processes=True, lost=[[2, 1], [5, 2]]), tmp_path / "struck")
    assert struck.weights == quiet.weights
    assert struck.series == quiet.series
    assert len(struck.series["loss"]) == 60
    assert struck.final["loss"] == quiet.final["loss"]
    assert struck.final["cluster/killed"] == 2
    assert struck.final["cluster/members"] == 1
    assert struck.final["cluster/recovery"] > 0  # type: ignore[operator]


def test_a_kill_that_did_not_happen_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses_module, "run_told", lambda *_: Told(changes=[{"members": [0, 1, 2]}]))
    with pytest.raises(UserError, match="2 workers were to be killed; 0 were"):
        record(run_settings(processes=True, lost=[[2, 1], [5, 2]]), tmp_path)
    monkeypatch.setattr(losses_module, "run_told", lambda *_: Told(ended="nobody is left"))
    with pytest.raises(UserError, match="nobody is left"):
        record(run_settings(processes=True, lost=[[2, 1]]), tmp_path)


def test_kills_hit_the_replicas_that_are_named() -> None:
    objective = parse_settings(Replicas, {"inner": INNER, "lost": [[3, 2], [5, 0], [7, 3]]}, "test")
    blows, left, hit = blows_of(objective, 0), [0, 1, 2, 3], []
    for blow in blows:
        hit.append(left.pop(int(blow.whom * len(left))))  # as whoever strikes picks one of those that train
    assert (hit, [blow.step for blow in blows]) == ([2, 0, 3], [3, 5, 7])
    assert [b.after for b in blows] != [b.after for b in blows_of(objective, 1)]


# ---- the analysis --------------------------------------------------------------------------------------------------


def study(off: dict[str, float], exact_weights: str = "a") -> Study:
    trials = []
    for cell in cells(load_recipe(RECIPE), "cpu"):
        objective = cell.settings.model_dump(mode="json")["objective"]
        steps = range(5, cell.settings.train.steps + 1, 5)
        first = min((when for when, _ in objective["lost"]), default=10**9)
        gap = off.get(cell.arm, 0.0)
        found = [Evaluation(step=s, metrics={"loss": 1.0 + (gap if s > first else 0.0)}) for s in steps]
        found[-1].metrics["cluster/killed"] = 2.0 * (cell.arm in ("exact", "tolerance"))
        series = {"loss": tuple((s, 1.0) for s in steps)}
        weights = exact_weights if cell.arm == "exact" else "a"
        made = RunRecord(
            hash="x", status="finished", evaluations=tuple(found), series=series, weights=weights,
            settings={"objective": objective},
        )  # fmt: skip
        trials.append(Trial(cell.grid, cell.arm, cell.axes, cell.seed, made))
    return Study("elaswave", "cpu", tuple(trials), None)


BAD_BASELINE = {"kept_rank": 0.016, "dropped_rank": 0.02}


def test_claims_follow_from_the_runs() -> None:
    good = analyse(study({**BAD_BASELINE, "tolerance": 1e-6, "reshape": 1e-6}))
    assert all(claim.holds for claim in good.claims)
    assert len(good.claims) == 1 + 4 * len(TASKS)
    assert any(row.name.startswith("digits: deviation removed, real kills, exact") for row in good.rows)
    loose = analyse(study({**BAD_BASELINE, "tolerance": 0.004, "reshape": 0.003}))
    assert sum(not claim.holds for claim in loose.claims) == len(TASKS)  # 25 % is too much, 19 % is not
    other = analyse(study(BAD_BASELINE, exact_weights="b"))
    assert {claim.name for claim in other.claims if not claim.holds} == {f"{t.title}: the same bits" for t in TASKS}
    level = analyse(study({"kept_rank": 0.02, "dropped_rank": 0.016}))
    assert {c.name for c in level.claims if not c.holds} == {f"{t.title}: dropping deviates more" for t in TASKS}
    late = analyse(study({**BAD_BASELINE, "exact": 1e-9}))
    assert {claim.name for claim in late.claims if not claim.holds} == {f"{t.title}: the same bits" for t in TASKS}


@pytest.mark.parametrize("stage", range(4))
def test_the_simulated_order_is_that_of_the_parts(stage: int) -> None:
    found = throughput(16, stage)
    rates = [found[name].throughput for name in ORDER]
    assert rates == sorted(rates, reverse=True)
    assert rates[1] > rates[2] > rates[3]


def test_every_cell_of_the_recipe_is_what_its_arm_says() -> None:
    for cell in cells(load_recipe(RECIPE), "cpu"):
        objective = cell.settings.objective
        assert isinstance(objective, Replicas)
        assert len(objective.lost) == (0 if cell.arm.startswith("undisturbed") else 2)
        assert (objective.randomness == "rank") == (cell.arm == "undisturbed_rank" or cell.arm in BASELINES)
        assert max((step for step, _ in objective.lost), default=0) < cell.settings.train.steps
        micro = cell.settings.train.micro_batch_size
        assert micro == (objective.micro if objective.processes else 0)
        assert cell.settings.train.batch_size % objective.micro == 0
