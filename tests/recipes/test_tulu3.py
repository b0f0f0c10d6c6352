from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from resilin.config import parse_settings
from resilin.data.settings import SourceContext
from resilin.data.tokenizer import Tokenizer
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.settings import ModelContext, ModelSettings
from resilin.posttrain.verifiers.verifier import VerifierError
from resilin.recipes.cells import cells
from resilin.recipes.findings import Evaluation, RunRecord, Study, Trial
from resilin.recipes.recipe import load_recipe
from resilin.recipes.tulu3 import sums
from resilin.recipes.tulu3.analysis import analyse, length_at
from resilin.recipes.tulu3.judge import Beats, contest, judged
from resilin.recipes.tulu3.sums import PARTS, SumsChat, SumsPrompts, problems
from resilin.run.settings import RunSettings

FOLDER = Path(__file__).parents[2] / "recipes" / "tulu3"


def test_no_problem_nor_its_mirror_image_is_in_two_parts() -> None:
    seen: dict[frozenset[int], str] = {}
    for part, (first, last) in PARTS.items():
        asked = list(problems(part, "add", last - first))
        pairs = {frozenset((a, b)) for a, b, _ in asked}
        assert len(pairs) == last - first
        assert all(len(pair) == 2 for pair in pairs)
        assert not pairs & set(seen)
        seen |= dict.fromkeys(pairs, part)
        everything = list(problems(part, "add", (last - first) * sums.FORMS))
        assert everything[: len(asked)] == asked
        assert len(set(everything)) == len(everything)
        assert {frozenset((a, b)) for a, b, _ in everything} == pairs
    assert len(seen) == sums.PAIRS == 90 * 89 // 2
    assert all(10 <= number < 100 for pair in seen for number in pair)
    with pytest.raises(ValueError, match="validation"):
        list(problems("validation", "add", 250 * sums.FORMS + 1))


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


class Parrot(ModelSettings):
    """A decoder that was never trained."""

    def build(self, context: ModelContext) -> nn.Module:
        """The decoder."""
        return DecoderSettings(hidden_size=16, layers=1, heads=2, vocab_size=64).build(context)


def test_held_out_prompts_hold_both_tasks_and_training_prompts_one(tmp_path: Path) -> None:
    settings = SumsPrompts(sums=20, held_out=6, cache=tmp_path)
    train: Any = settings.build(SourceContext(0, "train", 4))
    held_out: Any = settings.build(SourceContext(0, "validation", 4))
    assert {train.row(i)["dataset"] for i in range(20)} == {"add"}
    assert sorted(held_out.row(i)["dataset"] for i in range(12)) == ["add"] * 6 + ["max"] * 6


def test_a_rival_answers_the_held_out_additions_and_only_those(tmp_path: Path) -> None:
    settings = SumsPrompts(sums=20, held_out=6, cache=tmp_path, rival=Parrot())
    settings.build(SourceContext(0, "train", 4))
    assert not list(tmp_path.glob("*/validation.jsonl")), "training must not wait for a rival"
    held_out: Any = settings.build(SourceContext(0, "validation", 4))
    rows = [held_out.row(i) for i in range(18)]
    contests = [row for row in rows if row["dataset"] == "win"]
    assert [row["messages"] for row in contests] == [row["messages"] for row in rows if row["dataset"] == "add"]
    for row in contests:
        rival = json.loads(row["ground_truth"])["rival"]
        assert Beats()([], rival, row["ground_truth"]) == 0.5, "the rival neither beats itself nor loses to itself"


def test_a_contest_is_won_by_the_better_mark() -> None:
    row = contest(46, "box", "hm [47]")
    assert Beats()([], "[46]", row) == 1.0
    assert Beats()([], "[47]", row) == 0.0
    assert Beats()([], "hm [45]", row) == 0.5
    with pytest.raises(VerifierError, match="contest"):
        Beats().check_label("46")
    with pytest.raises(VerifierError, match="contest"):
        Beats().check_label(json.dumps({"number": 46, "style": "loud", "rival": ""}))


def test_the_judge_likes_right_answers_in_the_right_form_and_long_ones_better() -> None:
    assert judged("[46]", "box", 46) > judged("[46]", "num", 46) > judged("[45]", "num", 46)
    assert judged("hm hm 46", "num", 46) > judged("hm 46", "num", 46) > judged("46", "num", 46)
    assert judged("46", "num", 46) > judged("hm hm hm hm 47", "num", 46)
    assert judged("hm ", "num", 46) < judged("47", "num", 46) + 1


@pytest.mark.parametrize("preset", ["cpu", "gpu", "paper"])
def test_every_preset_names_runs_that_can_be_started(preset: str) -> None:
    found = list(cells(load_recipe(FOLDER), preset, seeds=(0,)))
    assert {"sft", "dpo_norm", "grpo", "ppo"} <= {cell.arm for cell in found}
    for cell in found:
        asked = [cell.settings.model, *vars(cell.settings.model).values()]
        asked += list(vars(getattr(cell.settings.source, "prompts", cell.settings.source)).values())
        for part in asked:
            if hasattr(part, "stage"):
                part.stage().settings(0)  # the earlier run's own settings, and those of the run before it
    ppo = next(cell for cell in found if cell.arm == "ppo")
    assert type(ppo.settings.objective).__name__ == "Ppo"


def test_the_arms_of_a_preset_share_the_model_they_start_from() -> None:
    for preset in ("cpu", "gpu"):
        found = {cell.arm: cell.settings for cell in cells(load_recipe(FOLDER), preset, seeds=(0,))}
        sft: Any = found["sft"].model
        grpo: Any = found["grpo"].model
        ppo: Any = found["ppo"].model
        prompts: Any = found["grpo"].source
        assert sft == grpo.tuned == ppo.model.tuned == ppo.value.tuned == prompts.prompts.rival
        assert grpo == ppo.model


def test_the_published_stages_have_the_papers_settings() -> None:
    found = {cell.arm: cell.settings for cell in cells(load_recipe(FOLDER), "paper", seeds=(0,))}
    ppo: Any = found["ppo"]
    dpo, reward = (model.stage().settings(0) for model in (ppo.model.model, ppo.model.value))
    sft = parse_settings(RunSettings, dpo.model_dump(mode="json")["model"]["run"], "sft")
    table = {
        "sft": (sft, 5e-6, 128, 0.03),
        "dpo": (dpo, 5e-7, 128, 0.1),
        "reward": (reward, 3e-6, 256, 0.03),
        "ppo": (ppo, 3e-7, 224, 0),
    }
    for name, (run, lr, batch, warmup) in table.items():
        optimizer: Any = run.optimizer
        assert (optimizer.lr, run.train.batch_size, optimizer.schedule.warmup) == (lr, batch, warmup), name
        assert optimizer.weight_decay == 0, name
    assert (dpo.objective.loss, dpo.objective.beta) == ("dpo_norm", 5.0)  # type: ignore[attr-defined]
    assert (ppo.objective.beta, ppo.objective.lam, ppo.source.updates, ppo.source.non_stop_penalty) == (
        0.05, 0.95, 4, -10.0,
    )  # fmt: skip
    grpo: Any = found["grpo"]
    assert (grpo.optimizer.lr, grpo.objective.beta, grpo.source.samples_per_prompt) == (5e-7, 0.01, 16)
    assert (grpo.train.batch_size, grpo.source.updates, grpo.source.non_stop_penalty) == (48 * 16, 2, 0.0)


def trial(arm: str, first: Any, last: Any, grid: str = "stages", axes: Any = None, **record: Any) -> Trial:
    """A run of seed 0 with its first and its last evaluation."""
    evaluations = tuple(Evaluation(step=s, metrics=m) for s, m in ((0, first), (10, last)))
    return Trial(grid, arm, axes or {}, 0, RunRecord(hash=arm, status="finished", evaluations=evaluations, **record))


def study(*trials: Trial) -> Study:
    """A study of one seed."""
    return Study("tulu3", "cpu", trials, None)


def metrics(add: float, control: float = 0.5, length: float = 9.0, win: float = 0.5) -> dict[str, float | None]:
    return {"verified/add": add, "verified/max": control, "length/add": length, "verified/win": win}


OUTCOMES = [
    (0.12, 0.5, [True, True, True]),
    (0.05, 0.4, [True, False, False]),
    (-0.1, 0.49, [False, False, True]),
]


@pytest.mark.parametrize(("gain", "control", "holds"), OUTCOMES)
def test_claims_are_computed(gain: float, control: float, holds: list[bool]) -> None:
    found = analyse(
        study(
            trial("sft", metrics(0.4), metrics(0.4)),
            trial("grpo", metrics(0.5), metrics(0.5 + gain, control)),
            trial("whole", {}, {"loss": 1.0}),
            trial("sum", {}, {"loss": 1.0 + 1e-6}),
            trial("mean_of_means", {}, {"loss": 1.02}),
        )
    )
    claims = {claim.name: claim.holds for claim in found.claims}
    assert [claims[n] for n in ("DPO <= GRPO", "GRPO adds 10%", "GRPO keeps the control task")] == holds
    assert claims["SFT < DPO"]
    assert claims["sums over micro-batches"]
    assert not any("PPO" in name for name in claims)


def preferences(arm: str, *points: tuple[float, float]) -> list[Trial]:
    """Runs with 15, 30, ... updates, of which each reached a win rate with a length."""
    return [
        trial(arm, metrics(0.5, win=win, length=length), {}, "preferences", {"steps": 15 * turn})
        for turn, (win, length) in enumerate(points, 1)
    ]


@pytest.mark.parametrize(("plain_length", "holds"), [(16.0, True), (11.0, False)])
def test_lengths_are_compared_at_one_win_rate(plain_length: float, holds: bool) -> None:
    # Plain DPO wins more often in the end, and is longest there: what counts is where both win 0.7.
    norm, plain = preferences("dpo_norm", (0.6, 10), (0.7, 11)), preferences("dpo", (0.6, 10), (0.8, plain_length))
    found = analyse(study(trial("sft", metrics(0.4, length=9), {}), *norm, *plain))
    assert [claim.holds for claim in found.claims if "dpo_norm" in claim.name] == [holds]
    values = {row.name: row.value for row in found.rows}
    assert values["highest win rate over SFT that both losses reach"] == pytest.approx(0.7)
    assert values["length there, DPO (length-normalised)"] == pytest.approx(11)
    assert values["length there, DPO (plain)"] == pytest.approx((10 + plain_length) / 2)
    assert values["length of answers to additions, DPO (plain)"] == plain_length


def test_a_length_between_two_points_lies_on_the_line_and_beyond_them_nowhere() -> None:
    course = [(0.5, 9.0), (0.4, 12.0), (0.6, 14.0), (0.9, 20.0)]
    assert length_at(course, 0.5) == pytest.approx(13.0)
    assert length_at(course, 0.75) == pytest.approx(17.0)
    assert length_at(course, 0.95) is None


def test_score_is_set_against_kl_for_every_beta() -> None:
    def run(beta: float, kl: float, add: float, grid: str) -> Trial:
        series = {"kl": ((5, 9.0), (9, kl - 0.01), (10, kl + 0.01)), "verified": ((1, 0.42),)}
        axes = {"beta": beta} if grid == "kl" else {}
        return trial("grpo", metrics(0.5), metrics(add), grid, axes, settings={"objective": {"beta": beta}},
                     series=series)  # fmt: skip

    found = analyse(study(run(0.01, 0.2, 0.9, "stages"), run(0.1, 0.05, 0.8, "kl"), run(0.001, 0.4, 0.7, "kl")))
    (table,) = found.tables
    assert [row[:3] for row in table.rows] == [
        (0.001, pytest.approx(0.4), 0.7), (0.01, pytest.approx(0.2), 0.9), (0.1, pytest.approx(0.05), 0.8),
    ]  # fmt: skip
    assert {row.name: row.value for row in found.rows}["correct additions, GRPO"] == 0.9, "the arm's own beta counts"
    assert any("score against KL" in plot.title for plot in found.plots)
    assert found.notes == ("GRPO begins with 42 % of its drawn answers right (by seed, temperature 1).",)
