"""Answers begun before their turn: the order stays, what was begun goes on, and a resume gives the same bits."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from resilin.checkpoint.folder import CheckpointFolder
from resilin.config import SettingsError, parse_settings
from resilin.data.settings import SourceContext
from resilin.data.train_tokenizer import character_tokenizer
from resilin.inference.generate import StopRule, stream
from resilin.inference.sampling import GREEDY
from resilin.keys import Keys
from resilin.nouns import StepView
from resilin.objective.settings import ObjectiveContext
from resilin.optim.adamw import AdamW
from resilin.posttrain.grpo import Grpo
from resilin.posttrain.rollout_source import RolloutSource
from resilin.posttrain.rollouts import Rollouts
from resilin.posttrain.sequences import frozen_logprobs, spread
from resilin.posttrain.verifiers.verifier import Answer, Verifier
from resilin.run.run import Pace, Run


class Vowels(Verifier):
    """The share of an answer's characters that are vowels."""

    def score(self, answer: Answer) -> float:
        return sum(c in "aeiou" for c in answer.text) / max(len(answer.text), 1)


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    character_tokenizer("0123456789+= abcdefghijklmnopqrstuvwxyz").save(tmp_path / "tokenizer")
    rows = [{"prompt": f"{n}=", "ground_truth": "", "dataset": "vowels", "thought": "abcdef", "pass_rate": n / 24}
            for n in range(24)]  # fmt: skip
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return {
        "prompts": {"paths": [str(tmp_path / "prompts.jsonl")], "tokenizer": str(tmp_path / "tokenizer"), "epochs": 1},
        "samples_per_prompt": 4,
        "max_new_tokens": 24,
        "non_stop_penalty": "verifier",
        "verifiers": {"verifiers": {"vowels": {"use": f"{__name__}:Vowels"}}},
    }


def source_of(tree: dict[str, Any], **changes: Any) -> RolloutSource:
    source = parse_settings(Rollouts, {**tree, **changes}, "test").build(SourceContext(0, "train", 8))
    assert isinstance(source, RolloutSource)
    return source


def view_of(model: Any, source: Any, step: int) -> StepView:
    return StepView(step, source, model, None, None, Keys.of_step(0, step))  # type: ignore[arg-type]


def rollouts(source: RolloutSource, model: Any, steps: int) -> list[dict[str, torch.Tensor]]:
    found = []
    for step in range(steps):
        source.before_step(view_of(model, source, step))
        if source.rollout is None:
            break
        found.append(dict(source.rollout))
        source.after_step(view_of(model, source, step + 1))
    return found


def model_of(tiny: Any, source: RolloutSource) -> Any:
    return tiny(0, torch.float32, vocab_size=source.vocab_size, init_std=0.4, max_positions=128)


def test_each_rollout_learns_from_the_prompts_it_has_without_a_buffer(tree: Any, tiny: Any) -> None:
    plain = source_of(tree)
    model = model_of(tiny, plain)
    expected = rollouts(plain, model, 40)
    ahead = rollouts(source_of(tree, ahead=2), model, 40)
    assert [r["prompts"].tolist() for r in ahead] == [r["prompts"].tolist() for r in expected]
    assert len(ahead) > 8  # the pool ends with the prompts, and none is left out
    for name in ("tokens", "labels", "scores"):
        assert torch.equal(ahead[0][name], expected[0][name]), name  # nothing is begun before the first
    torch.testing.assert_close(ahead[0]["old_logprobs"], expected[0]["old_logprobs"])
    # Each answer ended or reached the limit, what was drawn earlier counted.
    for rollout in ahead:
        assert bool((rollout["stopped"] | (rollout["lengths"] == 24)).all())
        assert int(rollout["lengths"].max()) <= 24


def test_what_was_begun_goes_on_where_it_stopped(tree: Any, tiny: Any) -> None:
    source = source_of(tree, ahead=1)
    model = model_of(tiny, source)
    earlier = 0
    for step in range(6):
        begun = {} if source.buffer is None else {
            (turn.number, at): list(answer.tokens)
            for turn in source.buffer.turns for at, answer in enumerate(turn.answers)
        }  # fmt: skip
        source.before_step(view_of(model, source, step))
        rollout = source.rollout
        assert rollout is not None
        for at in range(8):
            said = rollout["labels"][at][rollout["labels"][at] != -100].tolist()
            first = begun.get((step, at), [])
            assert said[: len(first)] == first
            assert int(rollout["earlier"][at]) == len(first)
        earlier += int(rollout["earlier"].sum())
        # Each token carries the log-probability it was drawn with: of this unchanged model, those of training.
        again = spread(frozen_logprobs(model, rollout["tokens"], rollout["labels"]), rollout["labels"])
        torch.testing.assert_close(rollout["old_logprobs"], again, rtol=1e-3, atol=1e-3)
        source.after_step(view_of(model, source, step + 1))
    assert earlier > 30


def test_a_failing_verifier_leaves_the_pool_as_it_was(tree: Any, tiny: Any, monkeypatch: Any) -> None:
    source, other = source_of(tree, ahead=1), source_of(tree, ahead=1)
    model = model_of(tiny, source)
    rollouts(source, model, 2), rollouts(other, model, 2)
    before = source.own_state()

    def fail(*_: Any) -> None:
        raise RuntimeError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(source.rewards, "of", fail)
        with pytest.raises(RuntimeError, match="gone"):
            source.before_step(view_of(model, source, 2))
    assert source.own_state() == before
    source.before_step(view_of(model, source, 2))
    other.before_step(view_of(model, other, 2))
    assert source.rollout is not None
    assert other.rollout is not None
    for name, tensor in other.rollout.items():
        assert torch.equal(source.rollout[name], tensor), name


def run_of(tree: dict[str, Any], tiny: Any, folder: Path | None, steps: int, objective: dict[str, Any]) -> Run:
    source = source_of(tree, ahead=2, hints={"share": 0.5, "decay": 0.3}, updates=2)
    model = model_of(tiny, source)
    context = ObjectiveContext(
        0, torch.device("cpu"), source, lambda: model_of(tiny, source).eval().requires_grad_(False), None, steps
    )
    return Run(
        source=source, model=model, objective=Grpo(**objective).build(context),
        optimizer=AdamW(lr=0.01).build(model, 7),
        pace=Pace(steps=steps, micro_batch_size=8, clip_norm=1.0), seed=0, device=torch.device("cpu"),
        autocast=nullcontext, checkpoints=CheckpointFolder(folder, keep_last=2) if folder is not None else None,
    )  # fmt: skip


def test_a_run_with_all_of_it_stops_and_goes_on_with_the_same_bits(tree: Any, tiny: Any, tmp_path: Path) -> None:
    objective = {
        "ratio": "sequence", "token_loss": "sequence_mean", "clip_low": 0.01, "clip_high": 0.01,
        "importance_band": (0.5, 5.0), "well_learned": {"entropy": 5.0, "success": 0.0, "cut": 0.5}, "beta": 0.0,
    }  # fmt: skip
    whole = run_of(tree, tiny, None, 7, objective)
    seen: list[dict[str, float]] = []
    whole.listeners = (lambda event: seen.append(event.logs) if hasattr(event, "logs") else None,)
    whole.train()
    assert {"left_out", "hinted", "earlier_tokens", "well_learned", "importance"} <= set(seen[-1])
    assert seen[2]["earlier_tokens"] > 0
    assert seen[-1]["hinted"] < seen[0]["hinted"] == pytest.approx(0.5)
    assert any(logs["well_learned"] > 0 for logs in seen)
    first = run_of(tree, tiny, tmp_path, 3, objective)
    first.train()
    assert first.checkpoints is not None
    first.checkpoints.close()
    again = run_of(tree, tiny, tmp_path, 7, objective)
    assert again.checkpoints is not None
    again.load_state_dict(again.checkpoints.load(3))
    again.train()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name


def test_answers_that_are_begun_count_for_the_limit_and_for_stop_strings(tree: Any, tiny: Any) -> None:
    source = source_of(tree)
    model, tokenizer = model_of(tiny, source), source.tokenizer
    prompt = tokenizer.encode("12=")
    rule = StopRule(9)
    whole = [p.token for p in stream(model, [prompt], rule, sampling=GREEDY)]
    rest = list(stream(model, [prompt + whole[:4]], rule, sampling=GREEDY, begun=[4]))
    assert [p.token for p in rest] == whole[4:]
    assert rest[-1].reason == "max_new_tokens"
    text = tokenizer.inner.decode(whole, skip_special_tokens=False)
    mark = text[1:5]
    stops = StopRule(9, strings=(mark,))
    expected = [p.token for p in stream(model, [prompt], stops, sampling=GREEDY, tokenizer=tokenizer)]
    assert len(expected) == 5  # the stop string lies across the border
    found = list(stream(model, [prompt + whole[:4]], stops, sampling=GREEDY, tokenizer=tokenizer, begun=[4]))
    assert [p.token for p in found] == expected[4:]
    assert found[-1].reason == "stop_string"


def test_what_answers_decide_cannot_be_begun_ahead(tree: Any) -> None:
    with pytest.raises(SettingsError, match="set ahead = 0"):
        parse_settings(Rollouts, {**tree, "ahead": 1, "equal_groups": "resample"}, "test")
