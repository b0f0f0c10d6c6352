"""Whole runs: off is the plain run, resumes give the same bits, evaluations come by shape, every axis works."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from resilin.config import SettingsError
from resilin.multigrid.sub_batch_norm import SubBatchNorm
from resilin.run.events import Evaluated, Event, Saved, StepDone
from resilin.run.progress import RunProgress
from resilin.run.run import Run

Tree = dict[str, Any]
Make = Callable[..., Run]
Trees = Callable[..., Tree]


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def train_to(run: Run, step: int) -> None:
    while run.step < step:
        assert run._take_step() is None


def heard(run: Run) -> list[Event]:
    events: list[Event] = []
    run.listeners = (events.append,)
    return events


def test_off_is_the_plain_run_to_the_bit(plain_tree: Tree, grid_tree: Trees, make_run: Make) -> None:
    bare = copy.deepcopy(plain_tree)
    bare["model"] = bare["model"]["model"]
    bare["optimizer"] = {"use": "resilin.optim.sgd:SGD", **bare["optimizer"]["optimizer"]}
    off = grid_tree(long_cycle=False, short_cycle=False)
    off["model"] = {**off["model"], "precise_batches": 0}
    runs = [make_run(bare), make_run(off)]
    losses = []
    for run in runs:
        events = heard(run)
        run.train()
        losses.append([event.loss for event in events if isinstance(event, StepDone)])
    assert losses[0] == losses[1]
    assert same(weights(runs[0]), weights(runs[1]))


def test_batches_splits_and_rates_follow_one_schedule(grid_tree: Trees, make_run: Make) -> None:
    run = make_run(grid_tree())
    events, schedule = heard(run), run.source.grid_schedule  # type: ignore[attr-defined]
    assert [s.base.multiplier for s in schedule.segments] == [4, 1, 4, 1, 1]
    norms = [m for m in run.model.modules() if isinstance(m, SubBatchNorm)]
    parameters = [norm.weight for norm in norms]
    for step in range(schedule.total):
        train_to(run, step + 1)
        wanted = schedule.segment(step).base.multiplier * 4 // 2
        assert {norm.splits for norm in norms} == {wanted}
        assert {norm.group for norm in norms} == {schedule.phase(step).multiplier * 4 // wanted}
    assert all(norm.weight is before for norm, before in zip(norms, parameters, strict=True))
    done = [event for event in events if isinstance(event, StepDone)]
    assert [event.units for event in done] == [4 * schedule.phase(i).multiplier for i in range(schedule.total)]
    assert done[0].logs["multigrid/multiplier"] == 4
    assert [(e.logs["multigrid/frames"], e.logs["multigrid/size"]) for e in done] == [
        (schedule.phase(i).grid.frames, schedule.phase(i).grid.size) for i in range(schedule.total)
    ]
    assert done[schedule.segments[1].steps[0]].lr == pytest.approx(0.05)
    assert done[-1].lr == pytest.approx(0.05 * 0.01)
    assert run.train().reason == "completed"


@pytest.mark.parametrize("where", ["inside a shape", "at a boundary", "in the fine-tuning"])
def test_a_resumed_run_gives_the_same_bits(grid_tree: Trees, make_run: Make, tmp_path: Path, where: str) -> None:
    tree = grid_tree()
    whole = make_run(tree)
    segments = whole.source.grid_schedule.segments  # type: ignore[attr-defined]
    stop = {
        "inside a shape": segments[0].steps[1] - 1,
        "at a boundary": segments[0].steps[1],
        "in the fine-tuning": segments[-1].steps[0] + 2,
    }[where]
    assert stop > 0
    whole.train()
    first = make_run(tree, folder=tmp_path)
    train_to(first, stop)
    first.save()
    second = make_run(tree, folder=tmp_path)
    assert second.checkpoints is not None
    second.load_state_dict(second.checkpoints.load(stop))
    assert second.step == stop
    second.train()
    assert same(weights(whole), weights(second))
    moments = [r.optimizer.state_dict()["parameters"] for r in (whole, second)]
    assert all(same(moments[0][name], moments[1][name]) for name in moments[0])


def test_prefetching_around_it_changes_nothing(grid_tree: Trees, make_run: Make) -> None:
    tree = grid_tree()
    ahead = {**tree, "source": {"use": "resilin.data.prefetch:Prefetch", "source": tree["source"]}}
    first, second = make_run(tree), make_run(ahead)
    for run in (first, second):
        run.train()
    assert same(weights(first), weights(second))
    assert any(m.splits > 1 for m in second.model.modules() if isinstance(m, SubBatchNorm))


def test_evaluations_and_checkpoints_come_by_shape(grid_tree: Trees, make_run: Make, tmp_path: Path) -> None:
    tree = grid_tree(evaluations=2)
    tree["checkpoint"] = {"every": 1000, "keep_last": 50}
    run = make_run(tree, folder=tmp_path)
    events, milestones = heard(run), run.source.grid_schedule.milestones  # type: ignore[attr-defined]
    run.train()
    total = run.step
    assert [e.step for e in events if isinstance(e, Evaluated)] == sorted(milestones)
    assert [e.step for e in events if isinstance(e, Saved)] == sorted(milestones)
    assert total in milestones
    quiet = {**grid_tree(), "evaluation": {"every": 0}}
    silent = make_run(quiet)
    events = heard(silent)
    silent.train()
    assert not [e for e in events if isinstance(e, Evaluated | Saved)], "a run that never evaluates is left alone"


def test_precise_statistics_are_means_over_batches_of_the_base_shape(grid_tree: Trees, make_run: Make) -> None:
    run = make_run(grid_tree())
    train_to(run, 3)
    twin = copy.deepcopy(run.model).train()
    precise = run.model.precise_statistics
    assert isinstance(precise, nn.Module)
    precise.before_evaluation(run._view())  # type: ignore[operator]
    norm = next(m for m in run.model.modules() if isinstance(m, SubBatchNorm))
    outputs: list[torch.Tensor] = []
    first = twin.get_submodule("slow_stem.conv.conv")
    first.register_forward_hook(lambda _m, _i, out: outputs.append(out.detach()))
    source: Any = run.source
    for number in range(2):
        batch = source.base_batch(2, number, range(source.base_slots(2, number)))
        assert batch["inputs"].shape == (16, 3, 2, 11, 11)
        twin(batch["inputs"])
    k = norm.splits
    wanted = torch.stack([torch.stack([o[i::k].mean((0, 2, 3, 4)) for o in outputs]).mean(0) for i in range(k)])
    assert torch.allclose(norm.running_mean, wanted, atol=1e-5)
    assert norm.momentum == 0.1
    assert int(norm.num_batches_tracked) == 3


def test_a_run_of_another_length_is_refused_with_the_right_one(grid_tree: Trees, make_run: Make) -> None:
    run = make_run(grid_tree(), steps=100)
    with pytest.raises(SettingsError, match=r"train\.steps is 100 and the grid schedule takes \d+: set train\.steps"):
        run.train()


def test_too_small_batches_for_the_base_are_mentioned_once(
    grid_tree: Trees, make_run: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = grid_tree()
    tree["model"] = {**tree["model"], "base": 8}
    run = make_run(tree)
    train_to(run, 2)
    assert capsys.readouterr().err.count("batch norm sees 4 samples in the finest shape, fewer than base = 8") == 1


def test_throughput_counts_clips_and_no_share_of_a_peak_of_tokens(plain_tree: Tree, make_run: Make) -> None:
    run, progress = make_run(plain_tree, steps=2), RunProgress()
    run.listeners = (progress.see,)
    run.train()
    assert run.started is not None
    assert (run.started.unit, run.started.flops_per_unit) == ("clips", None)
    assert " clips/s" in progress.pace()


def test_validation_averages_over_clips_and_crops(plain_tree: Tree, make_run: Make) -> None:
    tree = copy.deepcopy(plain_tree)
    tree["source"] = {**tree["source"], "validation_clips": 2, "views": {"scale": [16, 20], "validation_crops": 3}}
    run = make_run(tree, steps=1)
    views = run.validation["validation"].fetch(0, range(4))["views"]
    assert views.shape[:2] == (4, 6)
    found = run.evaluate()["validation"]
    run.model.eval()
    with torch.no_grad():
        p_BK = torch.stack([run.model(views[:, v]).softmax(-1) for v in range(6)]).mean(0)
    labels = run.validation["validation"].fetch(0, range(4))["labels"]
    assert found["nll"] == pytest.approx(-p_BK[torch.arange(4), labels].log().mean().item(), rel=1e-4)


def test_a_model_without_batch_norm_is_refused(grid_tree: Trees, make_run: Make) -> None:
    tree = grid_tree()
    tree["model"] = {**tree["model"], "model": {"use": "resilin.vision.vit:ViT", "classes": 2, "layers": 1}}
    with pytest.raises(SettingsError, match="has no batch norm to split"):
        make_run(tree)


@pytest.mark.parametrize(
    ("mode", "multipliers"),
    [
        ({"long_cycle": False}, {4, 2, 1}),
        ({"short_cycle": False}, {4, 1}),
        ({"finetune_short_cycle": False}, {8, 4, 2, 1}),
    ],
)
def test_every_mode_of_the_paper_trains(
    grid_tree: Trees, make_run: Make, mode: dict[str, bool], multipliers: set[int]
) -> None:
    run = make_run(grid_tree(**mode))
    events, schedule = heard(run), run.source.grid_schedule  # type: ignore[attr-defined]
    assert run.train().reason == "completed"
    units = [event.units for event in events if isinstance(event, StepDone)]
    assert units == [4 * schedule.phase(step).multiplier for step in range(schedule.total)]
    assert {unit // 4 for unit in units} == multipliers
    if "finetune_short_cycle" in mode:
        assert set(units[schedule.segments[-1].steps[0] :]) == {4}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_takes_the_same_course(grid_tree: Trees, make_run: Make) -> None:
    losses = []
    for device in ("cpu", "cuda"):
        tree = grid_tree()
        tree["train"] = {**tree["train"], "device": device}
        run = make_run(tree)
        events = heard(run)
        assert run.train().reason == "completed"
        assert {p.device.type for p in run.model.state_dict().values()} == {device}
        losses.append([event.loss for event in events if isinstance(event, StepDone)])
    assert losses[1][:5] == pytest.approx(losses[0][:5], rel=0.02)
    halves = grid_tree()
    halves["train"], halves["precision"] = {**halves["train"], "device": "cuda"}, {"compute": "bf16"}
    assert make_run(halves).train().reason == "completed"


def test_series_train_on_shorter_and_longer_windows(plain_tree: Tree, make_run: Make, tmp_path: Path) -> None:
    waves = np.sin(np.arange(64)[None] * (0.2 + 0.3 * (np.arange(40) % 2))[:, None]).astype(np.float32)
    np.savez(tmp_path / "s.npz", series=waves, labels=np.arange(40) % 2)
    source = {"use": "resilin.vision.series:Series", "path": str(tmp_path / "s.npz"), "points": 32}
    tree = copy.deepcopy(plain_tree)
    tree["source"] = {
        "use": "resilin.multigrid.source:Multigrid", "source": source, "epochs": 30, "stages": [20, 25],
        "steps_per_epoch": 1, "long_factors": [[0.5, 1.0], [1.0, 1.0]],
    }  # fmt: skip
    tree["optimizer"]["optimizer"]["schedule"]["boundaries"] = [20, 25]
    net = {"use": "resilin.vision.resnet:ResNet", "classes": 2, "dims": 1, "channels": 1, "stages": [1], "width": 4}
    tree["model"]["model"] = net
    run = make_run(tree)
    assert run.train().reason == "completed"
    assert run.metrics["validation/top1"] >= 0.5


def test_a_language_model_trains_on_windows_of_its_rows(plain_tree: Tree, make_run: Make, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200, encoding="utf-8")
    tree = copy.deepcopy(plain_tree)
    text = {
        "use": "resilin.data.text_source:TextSource", "paths": [str(tmp_path / "a.txt")], "sequence_length": 32,
        "tokenizer": {"kind": "bytes"}, "cache": str(tmp_path), "workers": 1, "held_out": {"by": "tail"},
    }  # fmt: skip
    tree["source"] = {
        "use": "resilin.multigrid.source:Multigrid", "source": text, "epochs": 40, "stages": [30],
        "steps_per_epoch": 1,
    }  # fmt: skip
    tree["model"] = {"hidden_size": 16, "layers": 1, "heads": 2}
    tree["objective"] = {}
    tree["optimizer"] = {
        "use": "resilin.multigrid.rate:MultigridRate", "scaling": "sqrt",
        "optimizer": {"use": "resilin.optim.adamw:AdamW", "lr": 0.01, "schedule": {"warmup": 4}},
    }  # fmt: skip
    run = make_run(tree)
    events = heard(run)
    assert run.train().reason == "completed"
    units = [event.units for event in events if isinstance(event, StepDone)]
    assert max(units) <= 1.4 * 4 * 32, "as many tokens a step at every length, but for rounding"
    assert len({run.source.fetch(step, [0])["tokens"].shape[1] for step in range(run.step)}) > 3
    losses = [event.loss for event in events if isinstance(event, StepDone)]
    assert losses[-1] < losses[0] - 0.5
