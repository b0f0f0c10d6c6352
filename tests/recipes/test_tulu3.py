from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from resilin.data.settings import SourceContext
from resilin.data.tokenizer import Tokenizer
from resilin.recipes.cells import cells
from resilin.recipes.findings import Evaluation, RunRecord, Study, Trial
from resilin.recipes.recipe import load_recipe
from resilin.recipes.tulu3 import sums
from resilin.recipes.tulu3.analysis import analyse
from resilin.recipes.tulu3.sums import PARTS, SumsChat, SumsPrompts, judged, problems

FOLDER = Path(__file__).parents[2] / "recipes" / "tulu3"


def test_no_problem_is_in_two_parts_and_each_pair_comes_before_any_comes_again() -> None:
    seen: dict[tuple[int, int], str] = {}
    for part, (first, last) in PARTS.items():
        asked = list(problems(part, "add", last - first))
        pairs = {(a, b) for a, b, _ in asked}
        assert len(pairs) == last - first
        assert not pairs & set(seen)
        seen |= dict.fromkeys(pairs, part)
        more = list(problems(part, "add", last - first + 5))
        assert more[: len(asked)] == asked
        assert len(set(more)) == len(more)
    assert len(seen) == sums.PAIRS
    assert all(10 <= a < 60 and 10 <= b < 60 for a, b in seen)
    with pytest.raises(ValueError, match="validation"):
        list(problems("validation", "add", 751))


def test_answers_to_learn_from_are_right_and_learnt_whole(tmp_path: Path) -> None:
    source = SumsChat(sums=30, maxima=10, cache=tmp_path).build(SourceContext(0, "train", 8))
    (file,) = tmp_path.glob("sums-*/chat.jsonl")
    rows = [json.loads(line)["messages"] for line in file.read_text().splitlines()]
    assert len(rows) == 40
    for user, said in rows:
        words = user["content"].replace("+", " ").split()
        numbers = [int(word) for word in words if word.isdigit()]
        right = max(numbers) if words[0] == "max" else sum(numbers)
        assert judged(said["content"], words[-1], right) >= 4
    batch = source.fetch(0, range(8))
    tokenizer = Tokenizer.load(file.parent / "tokenizer")
    for row in range(8):
        labels = batch["labels"][row]
        text = tokenizer.decode(labels[labels != -100].tolist(), skip_special=False)
        assert text.endswith("<|endoftext|>")
        assert "=" not in text


def test_held_out_prompts_hold_both_tasks_and_training_prompts_one(tmp_path: Path) -> None:
    settings = SumsPrompts(sums=20, held_out=6, cache=tmp_path)
    train = settings.build(SourceContext(0, "train", 4))
    held_out: Any = settings.build(SourceContext(0, "validation", 4))
    assert {train.row(i)["dataset"] for i in range(20)} == {"add"}  # type: ignore[attr-defined]
    assert sorted(held_out.row(i)["dataset"] for i in range(12)) == ["add"] * 6 + ["max"] * 6


def test_the_judge_likes_right_answers_in_the_right_form_and_long_ones_better() -> None:
    assert judged("[46]", "box", 46) > judged("[46]", "num", 46) > judged("[45]", "num", 46)
    assert judged("hm hm 46", "num", 46) > judged("hm 46", "num", 46) > judged("46", "num", 46)
    assert judged("46", "num", 46) > judged("hm hm hm hm 47", "num", 46)
    assert judged("hm ", "num", 46) < judged("47", "num", 46) + 1


def test_the_recipe_is_complete() -> None:
    recipe = load_recipe(FOLDER)
    for preset in ("cpu", "gpu", "paper"):
        found = list(cells(recipe, preset, seeds=(0,)))
        assert {"sft", "grpo", "ppo"} <= {cell.arm for cell in found}
    ppo = next(c for c in cells(recipe, "cpu", seeds=(3,)) if c.arm == "ppo")
    assert type(ppo.settings.objective).__name__ == "Ppo"


def study(**values: Any) -> Study:
    """A study of one seed: arm -> (metrics at first, metrics at last)."""
    trials = []
    for arm, (first, last) in values.items():
        evaluations = tuple(Evaluation(step=s, metrics=m) for s, m in ((0, first), (10, last)))
        trials.append(Trial("main", arm, {}, 0, RunRecord(hash=arm, status="finished", evaluations=evaluations)))
    return Study("tulu3", "cpu", tuple(trials), None)


def metrics(add: float, control: float, length: float) -> dict[str, float | None]:
    return {"verified/add": add, "verified/max": control, "length": length}


OUTCOMES = [
    (0.12, 0.5, [True, True, True]),
    (0.05, 0.4, [True, False, False]),
    (-0.1, 0.49, [False, False, True]),
]


@pytest.mark.parametrize(("gain", "control", "holds"), OUTCOMES)
def test_claims_are_computed(gain: float, control: float, holds: list[bool]) -> None:
    found = analyse(
        study(
            sft=(metrics(0.4, 0.5, 9), metrics(0.4, 0.5, 9)),
            dpo=(metrics(0.5, 0.5, 14), metrics(0.5, 0.5, 14)),
            grpo=(metrics(0.5, 0.5, 11), metrics(0.5 + gain, control, 11)),
            whole=({}, {"loss": 1.0}),
            sum=({}, {"loss": 1.0 + 1e-6}),
            mean_of_means=({}, {"loss": 1.02}),
        )
    )
    claims = {claim.name: claim.holds for claim in found.claims}
    assert [claims[n] for n in ("DPO <= GRPO", "GRPO adds 10%", "GRPO keeps the control task")] == holds
    assert claims["SFT < DPO"]
    assert claims["dpo_norm answers are shorter"]
    assert claims["sums over micro-batches"]
    assert not any("PPO" in name for name in claims)
