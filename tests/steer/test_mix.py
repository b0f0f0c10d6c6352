"""Mixing: snapshots to the sample, ODM's bandit, loads of experts, and runs that can be stopped anywhere."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resilin.data.errors import DataError
from resilin.data.settings import SourceContext
from resilin.keys import Keys
from resilin.models.decoder_settings import MoESettings
from resilin.objective.next_token import NextToken
from resilin.steer.by_domain import ByDomainLoss
from resilin.steer.expert_load import ExpertLoad
from resilin.steer.mix import Mixed, snapshot
from resilin.steer.mixer import Fixed, MixError, RandomMix, Seen, checked_proportions
from resilin.steer.odm import ODM, exploration

NAMES = ("a", "b", "c")


def mixed(kit: Any, folder: Path | None = None, split: Any = "train", **more: Any) -> Any:
    domains = {
        name: kit.Rows(parts=(size,), seed=number)
        for number, (name, size) in enumerate(zip(NAMES, (10, 30, 60), strict=True))
    }
    return Mixed(domains=domains, **{"update_steps": 3} | more).build(SourceContext(0, split, 4, folder))


def domain_run(kit: Any, source: Any, **more: Any) -> Any:
    return kit.make_run(source, ByDomainLoss(NextToken().build(), NAMES), **more)


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=5), st.integers(1, 200))
def test_a_snapshot_has_floor_counts_and_the_rest_in_the_last_domain(weights: list[float], count: int) -> None:
    p = [weight / sum(weights) for weight in weights]
    sizes = [7] * len(p)
    drawn = snapshot(p, sizes, count, Keys.of_step(0, 0))
    assert len(drawn) == count
    counts = torch.bincount(drawn // 7, minlength=len(p)).tolist()
    assert counts[:-1] == [math.floor(count * share) for share in p[:-1]]


@pytest.mark.parametrize(("initial", "expected"), [("uniform", [1 / 3] * 3), ("stratified", [0.1, 0.3, 0.6])])
def test_initial_proportions(kit: Any, initial: Any, expected: list[float]) -> None:
    assert list(mixed(kit, initial=initial).proportions.values()) == pytest.approx(expected)


def test_a_given_mixture_must_name_the_domains(kit: Any) -> None:
    source = mixed(kit, initial="mixture", proportions={"c": 1.0, "a": 3.0, "b": 0.0})
    assert list(source.proportions.values()) == [0.75, 0.0, 0.25]
    with pytest.raises(ValueError, match=r"should name the domains: a, b, c"):
        mixed(kit, initial="mixture", proportions={"a": 1.0})


def test_batches_hold_the_domains_they_name(kit: Any) -> None:
    source = mixed(kit, initial="stratified")
    run = domain_run(kit, source, steps=1)
    source.before_step(run._view())
    domains = []
    for step in range(3):
        batch = source.fetch(step, range(4))
        for row, domain in zip(batch["tokens"], batch["domains"].tolist(), strict=True):
            own = source._mix.sources[domain].rows_NT[:, :-1]
            assert bool((own == row).all(1).any())
        domains += batch["domains"].tolist()
    assert torch.bincount(torch.tensor(domains), minlength=3).tolist() == [1, 3, 8]  # floor(1.2), floor(3.6), rest


@pytest.mark.parametrize("mixer", [Fixed(), RandomMix(), ODM(warmup_steps=2)], ids=["fixed", "random", "odm"])
def test_a_run_stopped_anywhere_and_continued_ends_with_the_same_bits(kit: Any, mixer: Any) -> None:
    kit.check_resume(lambda: domain_run(kit, mixed(kit, mixer=mixer, warmup_steps=1)), 8, cuts=(1, 3, 4, 6))


def test_random_proportions_change_with_every_window(kit: Any) -> None:
    source = mixed(kit, mixer=RandomMix())
    run, seen = domain_run(kit, source, steps=9), []
    run.listeners = [lambda event: seen.append(tuple(source.proportions.values()))]
    run.train()
    assert len(set(seen)) >= 3
    assert all(sum(p) == pytest.approx(1) for p in seen)


def test_decisions_are_logged(kit: Any, tmp_path: Path) -> None:
    domain_run(kit, mixed(kit, tmp_path), steps=7).train()
    lines = [json.loads(line) for line in (tmp_path / "mixing.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 3, 6]
    assert set(lines[0]["proportions"]) == set(NAMES)


def test_weights_of_a_file_are_the_final_runs_proportions(kit: Any, tmp_path: Path) -> None:
    path = tmp_path / "doremi.json"
    path.write_text(json.dumps({"weights": {"b": 0.5, "a": 0.25, "c": 0.25}}))
    source = mixed(kit, mixer=Fixed(weights_file=path))
    source.before_step(domain_run(kit, source)._view())
    assert list(source.proportions.values()) == [0.25, 0.5, 0.25]
    path.write_text(json.dumps({"weights": {"b": 1.0}}))
    source = mixed(kit, mixer=Fixed(weights_file=path))
    with pytest.raises(MixError, match=r"is about b; the domains are a, b, c"):
        source.before_step(domain_run(kit, source)._view())


@pytest.mark.parametrize("bad", [[0.5, 0.5], [1.0, -0.1, 0.1], [0.0, 0.0, 0.0], [float("nan"), 1.0, 1.0]])
def test_impossible_proportions_are_refused(bad: list[float]) -> None:
    with pytest.raises(MixError, match=r"mixer X gave"):
        checked_proportions(bad, NAMES, "mixer X")


def test_validation_takes_the_domains_in_turn(kit: Any) -> None:
    held = mixed(kit, split="validation")
    assert [int(held.fetch(step, range(4))["domains"][0]) for step in range(3)] == [0, 1, 2]
    assert held.slots(len(held)) == 0


def test_odm_needs_to_hear_the_domains(kit: Any) -> None:
    with pytest.raises(MixError, match=r"set objective.use = 'resilin.steer.by_domain:ByDomain'"):
        kit.make_run(mixed(kit, mixer=ODM()), steps=1).train()


def test_reading_ahead_of_the_decision_is_refused(kit: Any) -> None:
    with pytest.raises(DataError, match=r"its proportions are not decided yet"):
        mixed(kit).fetch(0, [0])


def test_odm_explores_evenly_where_exploration_is_all(kit: Any) -> None:
    assert ODM(floor=1.0).proportions([5.0, 1.0, 90.0], 40) == pytest.approx([1 / 3] * 3)
    assert exploration(0, 4, 0.0) == exploration(1, 4, 0.9) == 0.25


@given(st.lists(st.floats(0, 200), min_size=2, max_size=6), st.integers(1, 10_000), st.permutations(range(6)))
def test_odm_keeps_a_floor_and_does_not_care_for_order(rewards: list[float], t: int, order: list[int]) -> None:
    odm, k = ODM(), len(rewards)
    p = odm.proportions(rewards, t)
    assert sum(p) == pytest.approx(1)
    assert min(p) >= exploration(t, k, odm.floor) - 1e-12
    order = [place for place in order if place < k]
    assert [p[place] for place in order] == pytest.approx(odm.proportions([rewards[place] for place in order], t))
    best = max(range(k), key=rewards.__getitem__)
    assert p[best] == max(p)


def test_odm_rewards_every_domain_of_a_mixed_batch() -> None:
    odm, memory = ODM(warmup_steps=3, scale=1.0), {}
    odm.observe(memory, Seen(2, (9.0, 9.0), (0.5, 0.5), (0.5, 0.5)))
    assert memory == {}
    odm.observe(memory, Seen(3, (2.0, 4.0, None), (0.25, 0.75, 0.0), (0.5, 0.25, 0.25)))
    assert memory["rewards"] == pytest.approx([0.1 * 2.0 * 0.25 / 0.5, 0.1 * 4.0 * 0.75 / 0.25, 0.0])
    alone = {}
    odm.observe(alone, Seen(3, (2.0, None), (1.0, 0.0), (0.2, 0.8)))
    assert alone["rewards"] == pytest.approx([0.1 * 2.0 / 0.2, 0.0])  # a batch of one domain: Exp3's loss / p


def test_odm_draws_more_of_the_harder_domain(kit: Any) -> None:
    source = mixed(kit, mixer=ODM(warmup_steps=0))
    run = domain_run(kit, source, steps=4)
    source._memory["rewards"] = [0.0, 50.0, 0.0]
    run.train()
    assert source.proportions["b"] == max(source.proportions.values())


def test_expert_load_draws_more_of_the_domain_that_is_unlike_the_others(kit: Any) -> None:
    load = torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [0, 0, 1.0]])
    p = ExpertLoad(eta=1.0, c=0.3).proportions(load, (1 / 3, 1 / 3, 1 / 3))
    assert sum(p) == pytest.approx(1)
    assert p[2] > p[0] == pytest.approx(p[1])
    assert min(p) >= 0.1
    source = mixed(kit, mixer=ExpertLoad(samples=8))
    model = kit.tiny_model(moe=MoESettings(experts=4, expert_size=8))
    domain_run(kit, source, model=model, steps=2).train()
    assert sum(source.proportions.values()) == pytest.approx(1)
    source = mixed(kit, mixer=ExpertLoad())
    with pytest.raises(MixError, match=r"the model has no experts"):
        source.before_step(domain_run(kit, source)._view())


def test_losses_by_domain_are_those_of_each_domain_alone(kit: Any) -> None:
    model, pool = kit.tiny_model(), kit.RowPool((6, 6))
    batch = pool.read([0, 7, 8, 2, 9])
    domains = torch.tensor([0, 1, 1, 0, 1])
    from resilin.nouns import Batch

    whole = Batch(batch.slots_B, {**batch.fields, "domains": domains})
    inner = NextToken().build()
    found = ByDomainLoss(inner, ("x", "y"))(model, whole, None)
    assert float(found.sum) == float(inner(model, whole, None).sum)
    for number, name in enumerate("xy"):
        rows = [row for row in range(5) if int(domains[row]) == number]
        alone = [inner(model, batch.rows(row, row + 1), None) for row in rows]
        mean = sum(float(loss.sum.detach()) for loss in alone) / sum(float(loss.units) for loss in alone)
        assert found.logs[f"nll/{name}"].value() == pytest.approx(mean, rel=1e-5)
        assert found.logs[f"share/{name}"].value() == pytest.approx(len(rows) / 5)
