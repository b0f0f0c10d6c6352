"""Selection: which steps train on what, what is refused, and that stopping changes nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resilin.data.errors import DataError
from resilin.data.settings import SourceContext
from resilin.run.settings import RunSettings
from resilin.steer.flex import FlexSchedule
from resilin.steer.less import LESS
from resilin.steer.look import Look
from resilin.steer.loss_band import DeltaLoss, LossBand
from resilin.steer.near import NEAR
from resilin.steer.select import Selected
from resilin.steer.selector import SelectionError, Selector
from resilin.steer.tsds import TSDS
from resilin.steer.uniform import Random


@given(st.integers(0, 7), st.integers(1, 5), st.integers(0, 4), st.integers(0, 60))
def test_windows_tile_the_steps_exactly(warmup: int, update: int, times: int, step: int) -> None:
    if not warmup and not times:
        return
    schedule = FlexSchedule(warmup, update, times)
    assert schedule.epoch_steps == warmup + update * times
    window = schedule.window(step)
    assert window.start <= step < window.start + window.steps
    assert window.epoch == step // (warmup + update * times)
    following = schedule.window(window.start + window.steps)
    assert following.start == window.start + window.steps
    if window.update:
        assert window.steps == update
        assert following.update == (window.update + 1 if window.update < times else (0 if warmup else 1))


def selected(kit: Any, folder: Path | None = None, seed: int = 0, **more: Any) -> Any:
    settings = {"warmup_steps": 2, "update_steps": 3, "update_times": 2, "selector": Random()} | more
    rows = settings.pop("source", None) or kit.Rows()
    return Selected(source=rows, **settings).build(SourceContext(seed, "train", 4, folder))


def walk(kit: Any, source: Any, steps: int) -> list[list[int]]:
    seen: list[list[int]] = []

    class Watch:
        def after_step(self, view: Any) -> None:
            seen.append(source.fetch(view.step - 1, range(4))["samples"].tolist())

    run = kit.make_run(source, steps=steps)
    watch = Watch()
    run._parts = lambda: iter([source, watch])
    run.train()
    return seen


def test_a_random_selector_fills_every_window_with_different_samples_and_warm_up_may_repeat(kit: Any) -> None:
    seen = walk(kit, selected(kit), 16)
    assert len(seen) == 16
    for start in (2, 5, 10, 13):
        window = [sample for step in seen[start : start + 3] for sample in step]
        assert len(set(window)) == len(window) == 12
    assert seen[0] + seen[1] != seen[8] + seen[9]  # a new warm-up draw in the second flex epoch
    assert all(0 <= sample < 48 for step in seen for sample in step)


def test_a_batch_says_which_samples_and_parts_it_holds(kit: Any) -> None:
    source = selected(kit)
    run = kit.make_run(source, steps=1)
    source.before_step(run._view())
    batch = source.fetch(0, [2, 0])
    assert torch.equal(batch["tokens"], source.pool.read(batch["samples"].tolist())["tokens"])
    assert torch.equal(batch["domains"], (batch["samples"] >= 24).long())
    assert batch.slots_B.tolist() == [2, 0]
    assert torch.equal(source.fetch(0, [0])["tokens"][0], batch["tokens"][1])


@pytest.mark.parametrize(
    "selector",
    [
        Random(),
        LossBand(focus="high"),
        DeltaLoss(),
        LESS(dimensions=32, accumulate=True),
        LESS(direction="sgd", aggregate="max", dimensions=16),
        NEAR(refresh=True),
        TSDS(fill=True, refresh=False),
    ],
    ids=["random", "loss", "delta", "less adam", "less sgd", "near", "tsds"],
)
def test_a_run_stopped_anywhere_and_continued_ends_with_the_same_bits(kit: Any, selector: Selector) -> None:
    def build() -> Any:
        return kit.make_run(selected(kit, selector=selector))

    # Without a look every step is cheap to stop at.
    kit.check_resume(build, 7, cuts=range(1, 7) if isinstance(selector, Random) else (2, 4))


def test_looking_leaves_no_trace_on_the_model(kit: Any) -> None:
    source = selected(kit, warmup_steps=0, selector=LESS(direction="sgd", dimensions=8))
    run = kit.make_run(source)
    run.model.train()
    run.model.blocks[0].eval()
    for parameter in run.model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    modes = [module.training for module in run.model.modules()]
    weights = kit.copied(run.model.state_dict())
    source.before_step(run._view())
    assert [module.training for module in run.model.modules()] == modes
    assert kit.same(weights, run.model.state_dict())
    assert all(bool((parameter.grad == 3.0).all()) for parameter in run.model.parameters())


class Broken(Selector):
    kind: str

    def select(self, look: Look) -> Sequence[int]:
        return {
            "few": list(range(look.count - 1)),
            "repeats": [5, 5, *range(6, 4 + look.count)],
            "foreign": [*range(look.count - 1), 48],
            "negative": [-1, *range(look.count - 1)],
            "fractions": [0.5] * look.count,
        }[self.kind]  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("few", "selector Broken gave 11 samples; this window needs exactly 12"),
        ("repeats", r"gave sample 5 2 times \(1 repeats in all\)"),
        ("foreign", "gave sample 48; the pool has samples 0 to 47"),
        ("negative", "gave sample -1"),
        ("fractions", "should give a list of whole numbers"),
    ],
)
def test_a_selection_that_cannot_be_trained_on_is_refused_by_name(kit: Any, kind: str, message: str) -> None:
    source = selected(kit, warmup_steps=0, selector=Broken(kind=kind))
    with pytest.raises(SelectionError, match=message):
        source.before_step(kit.make_run(source)._view())


def test_a_window_larger_than_the_pool_is_refused_when_built(kit: Any) -> None:
    expected = (
        r"steps 2 to 14 needs 52 different samples \(up to 4 a step\) and the pool has 48: lower .*update_steps to 12"
    )
    with pytest.raises(DataError, match=expected):
        selected(kit, update_steps=13)
    with pytest.raises(DataError, match=r"needs 4 different samples .* and the pool has 3: lower train.batch_size"):
        selected(kit, update_steps=1, source=kit.Rows(parts=(3,)))
    with pytest.raises(DataError, match=r"both 0"):
        selected(kit, warmup_steps=0, update_times=0)


def test_steps_that_are_not_decided_yet_cannot_be_read(kit: Any) -> None:
    source = selected(kit)
    with pytest.raises(DataError, match=r"step 0: its samples are not chosen yet"):
        source.fetch(0, [0])


class Counting(Selector):
    def select(self, look: Look) -> list[int]:
        calls = look.cache.setdefault("calls", [0])
        calls[0] += 1
        look.memory["calls"] = look.memory.get("calls", 0) + 1
        return list(range(look.count))


def test_a_stored_selection_is_used_again_only_where_everything_is_the_same(kit: Any, tmp_path: Path) -> None:
    def calls(**more: Any) -> tuple[int, int]:
        seed = more.pop("model_seed", 0)
        source = selected(kit, tmp_path, warmup_steps=0, selector=Counting(), **more)
        source.before_step(kit.make_run(source, model=kit.tiny_model(seed))._view())
        return source._cache.get("calls", [0])[0], source._memory["calls"]

    assert calls() == (1, 1)
    assert calls() == (0, 1)  # read back, with what the selector remembered
    assert calls(model_seed=1) == (1, 1)  # other weights
    assert calls(update_steps=2) == (1, 1)  # other settings
    assert calls(source=kit.Rows(seed=7)) == (1, 1)  # other data
    stored = sorted((tmp_path / "selections").glob("*.json"))
    assert len(stored) == 4
    assert set(json.loads(stored[0].read_text())) == {"indices", "metrics", "memory"}
    stored[0].write_text("{")  # cut short by a kill: made again, not an error
    again = sum(calls(**more)[0] for more in ({}, {"model_seed": 1}, {"update_steps": 2}, {"source": kit.Rows(seed=7)}))
    assert again == 1
    lines = [json.loads(line) for line in (tmp_path / "selections.jsonl").read_text().splitlines()]
    assert [line["from_cache"] for line in lines[:3]] == [False, True, False]
    assert lines[0]["parts"] == [12, 0]


def test_an_endless_flex_epoch_is_a_pass_over_the_pool(kit: Any) -> None:
    source = selected(kit, update_times=-1)
    assert source.schedule.update_times == 4  # 48 samples / 4 slots = 12 steps = 2 + 4 * 3 (the last one is cut short)


def test_another_selector_decides_anew_where_a_checkpoint_stands_and_other_data_are_refused(kit: Any) -> None:
    one, other, elsewhere = selected(kit), selected(kit, selector=LossBand()), selected(kit, source=kit.Rows(seed=5))
    run = kit.make_run(one, steps=3)
    run.train()
    with pytest.raises(DataError, match="other rows"):
        elsewhere.load_state_dict(one.state_dict())
    again = selected(kit)
    again.load_state_dict(one.state_dict())
    assert torch.equal(again._chosen, one._chosen)
    other.load_state_dict(one.state_dict())
    with pytest.raises(DataError, match="not chosen yet"):
        other.fetch(3, [0])
    other.before_step(kit.make_run(other)._view())
    assert len(other._chosen) > 0


class Later(Selector):
    """Right at first; what it does at its second selection is up to the file `how`."""

    how: Path

    def select(self, look: Look) -> list[int]:
        look.memory["calls"] = look.memory.get("calls", 0) + 1
        start = look.memory["calls"] * 3
        made = list(range(start, start + look.count))
        if look.memory["calls"] == 2:
            kind = self.how.read_text()
            made = {"right": made, "few": made[:-1], "repeats": [made[0], *made[:-1]]}[kind]
        return made


@pytest.mark.parametrize(
    ("kind", "message"),
    [("few", r"selector Later gave 11 samples; this window needs exactly 12"),
     ("repeats", r"selector Later gave sample 6 2 times")],
)  # fmt: skip
def test_a_selector_that_fails_in_a_run_loses_nothing_and_the_run_goes_on_once_it_is_mended(
    kit: Any, tmp_path: Path, kind: str, message: str
) -> None:
    from resilin.run.build import build_run
    from resilin.run.start import start_run

    how = tmp_path / "how"
    settings = RunSettings.model_validate(
        {
            "source": Selected(
                source=kit.Rows(), selector=Later(how=how), warmup_steps=2, update_steps=3, update_times=2
            ),
            "model": {"vocab_size": 16, "hidden_size": 16, "layers": 1, "heads": 2},
            "train": {"steps": 8, "batch_size": 4, "device": "cpu", "threads": 1},
            "precision": {"compute": "fp32"},
            "evaluation": {"every": 0},
            "checkpoint": {"every": 0},
            "log": {"live": False, "tensorboard": False},
        }
    )
    how.write_text("right")
    whole = build_run(settings)
    whole.train()
    how.write_text(kind)
    with pytest.raises(SelectionError, match=message):
        start_run(settings, tmp_path / "run")
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    failure = next(event for event in events if event["event"] == "failure")
    assert failure["step"] == 5
    assert "selector Later" in failure["message"]
    assert [event["step"] for event in events if event["event"] == "save"] == [5], "five steps were committed"
    how.write_text("right")
    run, outcome = start_run(settings, tmp_path / "run", resume=True)
    assert outcome.reason == "completed"
    assert kit.same(whole.state_dict(), run.state_dict())
    lines = [json.loads(line) for line in (tmp_path / "run" / "selections.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 5]
    stored = json.loads((tmp_path / "run" / lines[2]["file"]).read_text())
    assert stored["indices"]["values"] == list(range(6, 18))


def test_a_selector_of_the_users_own_file_is_found_by_its_path(
    kit: Any, in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (in_folder / "my_selectors.py").write_text(
        "from resilin.steer.selector import Selector\n\n"
        "class Lightest(Selector):\n"
        "    def select(self, look):\n"
        "        sums = look.pool.read(range(look.size))['tokens'].sum(1)\n"
        "        return sums.argsort()[: look.count]\n"
    )
    monkeypatch.syspath_prepend(str(in_folder))
    settings = Selected.model_validate(
        {"source": kit.Rows(), "warmup_steps": 0, "selector": {"use": "my_selectors:Lightest"}, "update_steps": 2}
    )
    source: Any = settings.build(SourceContext(0, "train", 4))
    source.before_step(kit.make_run(source)._view())
    sums = source.pool.read(range(48))["tokens"].sum(1)
    assert sums[source._chosen].max() <= sums.sort().values[7]


def test_target_samples_are_a_fixed_few_of_the_target(kit: Any) -> None:
    source = selected(kit, target=kit.Rows(parts=(9, 9)), target_samples=5)
    target = source._find_target()
    assert sum(target.pool_parts) == 5
    assert torch.equal(target.read(range(5))["tokens"], source._find_target().read(range(5))["tokens"])
    assert sum(selected(kit)._find_target().pool_parts) == 6  # the validation split of the source


def test_the_validation_split_is_the_sources_own(kit: Any) -> None:
    built = Selected(source=kit.Rows()).build(SourceContext(0, "validation", 4))
    assert built.pool_parts == (6,)  # type: ignore[attr-defined]


def test_selection_is_a_function_of_the_seed(kit: Any) -> None:
    first, again, other = (walk(kit, selected(kit, seed=seed), 5) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_a_target_of_another_vocabulary_is_refused(kit: Any) -> None:
    class Wide(kit.Rows):  # type: ignore[name-defined, misc]
        def build(self, context: SourceContext) -> Any:
            rows = super().build(context)
            rows.vocab_size = 99
            return rows

    with pytest.raises(DataError, match=r"different tokenizers \(vocabularies of \[16, 99\]\)"):
        selected(kit, target=Wide())._find_target()
