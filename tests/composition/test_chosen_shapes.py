"""Who chooses the samples of a step, and who says how many it has and in what shape: both in one source.

`Selected(Multigrid(samples))` and `Mixed({name: Multigrid(samples)})`, over images, series and rows of tokens.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from resilin.config import SettingsError
from resilin.data.errors import DataError
from resilin.data.packed import Shards
from resilin.data.settings import SourceContext, SourceSettings
from resilin.data.write_shards import write_documents
from resilin.keys import Keys
from resilin.multigrid.source import Multigrid
from resilin.nouns import Batch, StepView
from resilin.objective.next_token import NextToken
from resilin.optim.sgd import SGD
from resilin.run.build import build_run
from resilin.run.events import Evaluated, StepDone
from resilin.run.folder import RunFolder
from resilin.run.run import Run
from resilin.run.settings import RunSettings
from resilin.steer.mix import Mixed
from resilin.steer.select import Selected
from resilin.transforms import SourceTransform

Tree = dict[str, Any]
POOL, BATCH = 60, 4
KINDS = ("images", "series", "rows")
PLAN: Tree = {"epochs": 20, "stages": [10, 16], "steps_per_epoch": 1}


def images(folder: Path) -> Tree:
    """Pictures; the label of each is its number."""
    pixels = np.random.default_rng(0).integers(0, 256, (POOL, 8, 8)).astype(np.uint8)
    np.savez(folder / "images.npz", images=pixels, labels=np.arange(POOL))
    return {"use": "resilin.vision.images:Arrays", "path": str(folder / "images.npz"), "size": 8}


def series(folder: Path) -> Tree:
    """Series; the label of each is its number."""
    waves = np.random.default_rng(0).normal(size=(POOL, 64)).astype(np.float32)
    np.savez(folder / "series.npz", series=waves, labels=np.arange(POOL))
    return {"use": "resilin.vision.series:Series", "path": str(folder / "series.npz"), "points": 32}


def rows(folder: Path) -> Tree:
    """Rows of tokens that count up: 8 for each sample."""
    write_documents(folder / "rows", [np.arange(POOL * 8 + 1) % 509 + 1], 512)
    return {"use": "resilin.data.packed:Shards", "path": str(folder / "rows"), "sequence_length": 8}


def samples_of(kind: str, folder: Path, **more: Any) -> Tree:
    return {**{"images": images, "series": series, "rows": rows}[kind](folder), "held_out": {"fraction": 0.0}, **more}


def gridded(source: Tree, **more: Any) -> Tree:
    return {"use": "resilin.multigrid.source:Multigrid", "source": source, **PLAN, **more}


def chosen(source: Tree, **more: Any) -> Tree:
    return {
        "use": "resilin.steer.select:Selected",
        "source": source,
        "warmup_steps": 1,
        "update_steps": 2,
        "update_times": 3,
        **more,
    }


def settings_of(kind: str, source: Tree, **train: Any) -> RunSettings:
    vision: Tree = {
        "use": "resilin.vision.resnet:ResNet",
        "classes": POOL,
        "stages": [1],
        "width": 4,
        "channels": 1,
        "dims": 2 if kind == "images" else 1,
    }
    model = vision if kind != "rows" else {"hidden_size": 16, "layers": 1, "heads": 2}
    norms = {"use": "resilin.multigrid.norms:SubBatchNorms", "base": 2, "precise_batches": 2, "model": model}
    rate = {
        "use": "resilin.multigrid.rate:MultigridRate",
        "optimizer": {
            "use": "resilin.optim.sgd:SGD",
            "lr": 0.02,
            "schedule": {"use": "resilin.optim.stepwise:Stepwise", "boundaries": PLAN["stages"]},
        },
    }
    return RunSettings.model_validate(
        {
            "source": source,
            "model": norms if kind != "rows" else model,
            "objective": {} if kind == "rows" else {"use": "resilin.vision.classification:Classification"},
            "optimizer": rate,
            "train": {"steps": 1, "batch_size": BATCH, "device": "cpu", "threads": 1, **train},
            "precision": {"compute": "fp32"},
            "evaluation": {"every": 0},
            "checkpoint": {"every": 1, "keep_last": 99},
            "log": {"tensorboard": False, "live": False},
        }
    )


def made(kind: str, source: Tree, folder: Path | None = None) -> Run:
    """A run of as many steps as its shapes take."""
    steps = build_run(settings_of(kind, source)).source.grid_schedule.total  # type: ignore[attr-defined]
    return build_run(settings_of(kind, source, steps=steps), None if folder is None else RunFolder(folder))


def batches_of(run: Run) -> list[Batch]:
    """The batch of every step of a run that is trained to its end."""
    seen: list[Batch] = []
    fetch = run.source.fetch

    def watched(step: int, slots: Sequence[int]) -> Batch:
        batch = fetch(step, slots)
        if run.step == step and len(seen) == step and isinstance(slots, range):
            seen.append(batch)
        return batch

    run.source.fetch = watched  # type: ignore[method-assign]
    assert run.train().reason == "completed"
    assert len(seen) == run.step
    return seen


def shape_of(kind: str, batch: Batch) -> tuple[int, ...]:
    return tuple(batch["tokens" if kind == "rows" else "inputs"].shape)


def same(left: Any, right: Any) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else bool(left == right)


@pytest.mark.parametrize("kind", KINDS)
def test_chosen_samples_come_in_the_shapes_of_the_schedule_each_as_itself(kind: str, tmp_path: Path) -> None:
    selector = {"use": "resilin.steer.loss_band:LossBand", "focus": "high"}
    run = made(kind, chosen(gridded(samples_of(kind, tmp_path)), selector=selector), tmp_path / "run")
    source: Any = run.source
    batches = batches_of(run)
    run.checkpoints.close()  # type: ignore[union-attr]
    wide = source.read(range(POOL))
    for step, batch in enumerate(batches):
        phase = source.grid_schedule.phase(step)
        size = (phase.grid.size,) * 2 if kind == "images" else (phase.grid.frames,)
        assert shape_of(kind, batch) == (phase.multiplier * BATCH, *((1,) if kind != "rows" else ()), *size)
        if kind == "rows":
            for tokens, sample in zip(batch["tokens"], batch["samples"].tolist(), strict=True):
                whole = wide["tokens"][sample]
                windows = whole.unfold(0, len(tokens), 1)
                assert bool((windows == tokens).all(1).any())
        else:
            assert torch.equal(batch["labels"], batch["samples"])
    assert len({shape_of(kind, batch) for batch in batches}) > 2
    # Every window trains on exactly what was chosen for it, as often: each sample once.
    stored = sorted((tmp_path / "run" / "selections").glob("*.json"))
    wanted = [sorted(json.loads(path.read_text())["indices"]["values"]) for path in stored]
    starts = [int(path.name.split("-")[1]) for path in stored]
    assert starts[:4] == [1, 3, 5, 8]  # warm-up, three windows, and again
    for start, indices in zip(starts, wanted, strict=True):
        read = [sample for batch in batches[start : start + 2] for sample in batch["samples"].tolist()]
        assert sorted(read) == indices
        assert len(set(read)) == len(read)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_stopped_inside_a_window_gives_the_same_bits(kind: str, tmp_path: Path) -> None:
    tree = chosen(gridded(samples_of(kind, tmp_path)), selector={"use": "resilin.steer.loss_band:DeltaLoss"})
    whole = made(kind, tree, tmp_path / "run")
    assert whole.train().reason == "completed"
    assert whole.checkpoints is not None
    for step in (2, 3, 6):
        again = made(kind, tree)
        again.load_state_dict(whole.checkpoints.load(step))
        assert again.step == step
        assert again.train().reason == "completed"
        assert same(whole.state_dict(), again.state_dict())
    whole.checkpoints.close()


def test_a_random_selector_covers_the_slots_of_its_steps_exactly(tmp_path: Path) -> None:
    run = made("images", chosen(gridded(samples_of("images", tmp_path)), warmup_steps=2, update_steps=3))
    schedule: Any = run.source.grid_schedule  # type: ignore[attr-defined]
    batches = batches_of(run)
    assert [len(batch) for batch in batches] == [BATCH * schedule.phase(s).multiplier for s in range(schedule.total)]
    assert sum(map(len, batches)) == BATCH * schedule.samples_before(schedule.total)
    for start in range(2, 11, 3):
        samples = [sample for batch in batches[start : start + 3] for sample in batch["samples"].tolist()]
        assert len(set(samples)) == len(samples) == BATCH * sum(schedule.phase(start + k).multiplier for k in range(3))


def test_rates_and_milestones_of_the_shapes_reach_a_run_on_chosen_samples(tmp_path: Path) -> None:
    inner = gridded(samples_of("images", tmp_path, held_out={"fraction": 0.0}))
    held = {**inner, "source": {**inner["source"], "validation_images": "images", "validation_labels": "labels"}}
    found = []
    for source in (held, chosen(held)):
        settings = settings_of("images", source)
        total = build_run(settings).source.grid_schedule.total  # type: ignore[attr-defined]
        settings = settings_of("images", source, steps=total)
        settings = settings.model_copy(
            update={"evaluation": settings.evaluation.model_copy(update={"every": 1000, "batches": 1})}
        )
        run = build_run(settings)
        events: list[Any] = []
        run.listeners = (events.append,)
        assert run.train().reason == "completed"
        rates = [(e.lr, e.logs["multigrid/multiplier"]) for e in events if isinstance(e, StepDone)]
        found.append((rates, [e.step for e in events if isinstance(e, Evaluated)]))
    assert found[0] == found[1]
    assert len({lr for lr, _ in found[0][0]}) > 2
    assert len(found[0][1]) > 3


def test_a_window_of_coarse_steps_larger_than_the_pool_is_refused_when_built(tmp_path: Path) -> None:
    tree = chosen(gridded(samples_of("images", tmp_path)), update_steps=7)
    with pytest.raises(DataError, match=r"steps 1 to 7 needs 68 .* \(up to 16 a step\) .* has 60: .*update_steps to 3"):
        build_run(settings_of("images", tree))


def test_the_wrong_way_round_is_refused_and_says_which_way_is_right(tmp_path: Path) -> None:
    samples = samples_of("images", tmp_path)
    for inside in (chosen(samples), {"use": "resilin.steer.mix:Mixed", "domains": {"a": samples}}):
        settings = Multigrid.model_validate({k: v for k, v in gridded(inside).items() if k != "use"})
        with pytest.raises(SettingsError, match=r"decides which samples a step has and goes outside"):
            settings.build(SourceContext(0, "train", BATCH))


def test_prefetching_around_chosen_samples_changes_nothing(tmp_path: Path) -> None:
    tree = chosen(gridded(samples_of("rows", tmp_path)), selector={"use": "resilin.steer.loss_band:LossBand"})
    plain, ahead = made("rows", tree), made("rows", {"use": "resilin.data.prefetch:Prefetch", "source": tree})
    for run in (plain, ahead):
        assert run.train().reason == "completed"
    assert same(plain.model.state_dict(), ahead.model.state_dict())


# -- domains --------------------------------------------------------------------------------------------------------


def domains(folder: Path, **second: Any) -> Tree:
    """Two domains of pictures, each in shapes of its own schedule."""
    first, other = folder / "first", folder / "second"
    for place in (first, other):
        place.mkdir(exist_ok=True)
    return {
        "use": "resilin.steer.mix:Mixed",
        "update_steps": 3,
        "mixer": {"use": "resilin.steer.mixer:RandomMix"},
        "domains": {
            "a": gridded(samples_of("images", first)),
            "b": gridded(samples_of("images", other), **second),
        },
    }


def test_mixed_domains_come_in_the_shapes_of_one_schedule_and_resume(tmp_path: Path) -> None:
    tree = domains(tmp_path)
    run = made("images", tree, tmp_path / "run")
    source: Any = run.source
    batches = batches_of(run)
    for step, batch in enumerate(batches):
        phase = source.grid_schedule.phase(step)
        assert shape_of("images", batch) == (BATCH * phase.multiplier, 1, phase.grid.size, phase.grid.size)
    for start in range(0, run.step - 3, 3):
        assert {d for batch in batches[start : start + 3] for d in batch["domains"].tolist()} <= {0, 1}
    assert {d for batch in batches for d in batch["domains"].tolist()} == {0, 1}
    assert run.checkpoints is not None
    for step in (2, 4):
        again = made("images", tree)
        again.load_state_dict(run.checkpoints.load(step))
        assert again.train().reason == "completed"
        assert same(run.state_dict(), again.state_dict())
    run.checkpoints.close()


def test_domains_of_different_schedules_are_refused(tmp_path: Path) -> None:
    run = build_run(settings_of("images", domains(tmp_path, short_factors=[0.75]), steps=30))
    run.optimizer = run.optimizer.inner  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"'inputs' in different shapes: .* with one schedule"):
        run.train()


# -- other transforms inside ----------------------------------------------------------------------------------------


class Marked(SourceTransform):
    """Adds to what is shown in a step; outside any step it shows a mark."""

    def shown(self, step: int | None, batch: Batch) -> Batch:
        tokens = batch["tokens"] * 0 - 1 if step is None else batch["tokens"] + 1000 * step
        return Batch(batch.slots_B, {**batch.fields, "tokens": tokens})


class OnlyFetches(SourceTransform):
    """Changes samples where nobody else can see it."""

    def fetch(self, step: int, slots: Sequence[int]) -> Batch:
        return self.inner.fetch(step, slots)


class FewerSlots(SourceTransform):
    """Steps shrink."""

    def slots(self, step: int) -> int:
        return max(0, BATCH - step)


class Given(SourceSettings):
    """A source that is there already."""

    held: Any

    def build(self, context: SourceContext) -> Any:
        return self.held


def select_from(inner: Any) -> Any:
    settings = Selected(source=Given(held=inner), warmup_steps=0, update_steps=2, update_times=2)
    return settings.build(SourceContext(0, "train", BATCH))


def decide(source: Any, step: int) -> None:
    """What happens just before a step."""
    model = nn.Linear(1, 1)
    optimizer = SGD().build(model, 1)
    source.before_step(StepView(step, source, model, NextToken().build(), optimizer, Keys.of_step(0, step)))


@pytest.fixture
def plain(tmp_path: Path) -> Any:
    """Rows of tokens by number."""
    tree = {key: value for key, value in samples_of("rows", tmp_path).items() if key != "use"}
    return Shards.model_validate(tree).build(SourceContext(0, "train", BATCH))


def test_what_a_transform_inside_makes_of_samples_is_seen_in_the_step_and_in_looks(plain: Any) -> None:
    source = select_from(Marked(plain))
    decide(source, 0)
    batch = source.fetch(1, [3, 0])
    exact = plain.read(batch["samples"].tolist())
    assert torch.equal(batch["tokens"], exact["tokens"] + 1000)
    assert bool((source.read([5])["tokens"] == -1).all())


def test_a_transform_whose_work_would_be_gone_round_is_no_pool(plain: Any) -> None:
    with pytest.raises(DataError, match=r"which OnlyFetches cannot give"):
        select_from(OnlyFetches(plain))
    assert not hasattr(OnlyFetches(plain), "resampled")


def test_steps_are_as_long_as_the_source_inside_says_and_end_with_it(plain: Any) -> None:
    source = select_from(FewerSlots(plain))
    assert [source.slots(step) for step in range(6)] == [4, 3, 2, 1, 0, 0]
    decide(source, 0)
    assert len(source._chosen) == 7
    decide(source, 2)
    assert len(source._chosen) == 3
    read = [source.fetch(step, range(source.slots(step)))["samples"].tolist() for step in (2, 3)]
    assert sorted(itertools.chain(*read)) == sorted(source._chosen.tolist())


def test_a_mix_inside_a_schedule_of_shapes_shows_all_its_parts(tmp_path: Path) -> None:
    """A shape asked of a mix is asked of every part: none is left out."""
    trees = domains(tmp_path)["domains"]
    mix = {"use": "resilin.data.mix:Mix", "parts": [{"source": tree["source"]} for tree in trees.values()]}
    run = made("images", chosen(gridded(mix)))
    batches = batches_of(run)
    assert {d for batch in batches for d in batch["domains"].tolist()} == {0, 1}
    for step, batch in enumerate(batches):
        grid = run.source.grid_schedule.phase(step).grid  # type: ignore[attr-defined]
        assert batch["inputs"].shape[-2:] == (grid.size, grid.size)
    settings = Mixed.model_validate({"domains": {"a": mix, "b": trees["b"]["source"]}})
    assert settings.build(SourceContext(0, "train", BATCH)).pool_parts == (2 * POOL, POOL)  # type: ignore[attr-defined]
