from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from resilin.checkpoint.folder import CheckpointFolder
from resilin.config import SettingsError, parse_settings
from resilin.data.settings import SourceContext
from resilin.inference.sampling import Sampling
from resilin.keys import Keys
from resilin.models.settings import ModelContext
from resilin.nouns import StepView
from resilin.objective.settings import ObjectiveContext
from resilin.optim.adamw import AdamW
from resilin.parallel.step import gradient_of_step
from resilin.posttrain.actor_critic import ActorCritic
from resilin.posttrain.grpo import Grpo
from resilin.posttrain.policy import PolicyObjective
from resilin.posttrain.ppo import Ppo
from resilin.posttrain.rollout import sample_answers
from resilin.posttrain.rollout_source import RolloutSource
from resilin.posttrain.rollouts import Rollouts
from resilin.posttrain.verifiers.verifier import Answer, Verifier
from resilin.run.run import Pace, Run

CHARACTERS = "0123456789+= abcdefghijklmnopqrstuvwxyz"


class Digits(Verifier):
    """The share of an answer's characters that are digits: some reward for nearly every answer."""

    def score(self, answer: Answer) -> float:
        return sum(c.isdigit() for c in answer.text) / max(len(answer.text), 1)


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    from resilin.data.train_tokenizer import character_tokenizer

    tokenizer = character_tokenizer(CHARACTERS)
    tokenizer.save(tmp_path / "tokenizer")
    rows = [{"prompt": f"{n}+{n % 7}=", "ground_truth": str(n + n % 7), "dataset": "digits"} for n in range(24)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return {
        "prompts": {
            "use": "resilin.data.prompt_source:PromptSource",
            "paths": [str(tmp_path / "prompts.jsonl")],
            "validation_paths": [str(tmp_path / "prompts.jsonl")],
            "tokenizer": str(tmp_path / "tokenizer"),
        },
        "samples_per_prompt": 4,
        "max_new_tokens": 6,
        "verifiers": {"verifiers": {"digits": {"use": f"{__name__}:Digits"}}},
    }


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def settings_of(tree: dict[str, Any], **changes: Any) -> Rollouts:
    return parse_settings(Rollouts, {**tree, **changes}, "test")


def view_of(model: nn.Module, source: Any, step: int, objective: Any = None) -> StepView:
    return StepView(step, source, model, objective, None, Keys.of_step(0, step))  # type: ignore[arg-type]


def run_of(
    tree: dict[str, Any], tiny: Any, folder: Path | None = None, *, ppo: bool = False, steps: int = 6, batch: int = 8,
    micro: int = 8, lr: float = 3e-3, objective: dict[str, Any] | None = None, **changes: Any,
) -> Run:  # fmt: skip
    settings = settings_of(tree, **changes)
    source = settings.build(SourceContext(0, "train", batch))

    def model_of(seed: int) -> nn.Module:
        policy = tiny(seed, torch.float32, vocab_size=source.vocab_size, init_std=0.1)
        if not ppo:
            return policy
        from resilin.posttrain.actor_critic import ActorCriticModel
        from resilin.posttrain.reward_model import RewardModel

        other = tiny(seed, torch.float32, vocab_size=source.vocab_size, init_std=0.1)
        return ActorCriticModel(policy, RewardModel(other))

    model = model_of(0)
    context = ObjectiveContext(
        0, torch.device("cpu"), source, lambda: model_of(0).eval().requires_grad_(False), None, steps
    )
    kind = Ppo if ppo else Grpo
    from contextlib import nullcontext

    return Run(
        source=source,
        model=model,
        objective=kind(**(objective or {})).build(context),
        optimizer=AdamW(lr=lr).build(model, steps),
        pace=Pace(steps=steps, micro_batch_size=micro, clip_norm=1.0),
        seed=0,
        device=torch.device("cpu"),
        autocast=nullcontext,
        checkpoints=CheckpointFolder(folder, keep_last=2) if folder is not None else None,
        validation={"validation": settings.build(SourceContext(0, "validation", 8))},
    )


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.model.state_dict().items()}


def test_an_answer_does_not_depend_on_its_neighbours_and_stops_at_an_end_token(tiny: Any) -> None:
    model = tiny(0, torch.float32)
    prompts = [[1, 2, 3], [4], [5, 6], [1, 2, 3]]
    sampling = Sampling(seed=7)
    together = sample_answers(model, prompts, sampling, 12, frozenset({0, 1}))
    alone = [sample_answers(model, [p], sampling, 12, frozenset({0, 1}), numbers=[n])[0] for n, p in enumerate(prompts)]
    small = sample_answers(model, prompts, sampling, 12, frozenset({0, 1}), batch_rows=2)
    assert [a.tokens for a in together] == [a.tokens for a in alone] == [a.tokens for a in small]
    assert together[0].tokens != together[3].tokens
    for answer in together:
        ends = [token in (0, 1) for token in answer.tokens]
        assert answer.stopped == ends[-1]
        assert not any(ends[:-1])
        assert answer.stopped or len(answer.tokens) == 12


def test_the_logprobs_of_draws_are_those_of_training(tiny: Any) -> None:
    from resilin.posttrain.rollout import rows_of
    from resilin.posttrain.sequences import frozen_logprobs

    model = tiny(0, torch.float32)
    answers = sample_answers(model, [[1, 2], [3]], Sampling(seed=1, temperature=0.7), 9, frozenset())
    fields = rows_of(answers)
    expected = frozen_logprobs(model, fields["tokens"], fields["labels"], 0.7)
    torch.testing.assert_close(fields["old_logprobs"][fields["labels"] != -100], expected, rtol=1e-4, atol=1e-4)


def test_a_rollout_serves_its_updates_and_every_answer_once_in_each(tree: Any, tiny: Any) -> None:
    settings = settings_of(tree, updates=2, minibatches=3)
    source = settings.build(SourceContext(0, "train", 8))
    model = tiny(0, torch.float32, vocab_size=source.vocab_size)
    seen: list[list[int]] = []
    for step in range(12):
        source.before_step(view_of(model, source, step))
        assert source.fresh == (step % 6 == 0)
        if source.fresh:
            source.rollout["number"] = torch.arange(24)
        batch = source.fetch(step, range(source.slots(step)))
        assert len(batch) == 8
        seen.append(batch["number"].tolist())
        source.after_step(view_of(model, source, step + 1))
        assert (source.rollout is None) == (step % 6 == 5)
    for first in range(0, 12, 3):
        assert sorted(row for step in seen[first : first + 3] for row in step) == list(range(24))
    assert seen[0] != seen[3]


def test_scores_rewards_and_penalties(tree: Any, tiny: Any) -> None:
    source = settings_of(tree).build(SourceContext(0, "train", 8))
    model = tiny(0, torch.float32, vocab_size=source.vocab_size)
    source.before_step(view_of(model, source, 0))
    fields = source.rollout
    expected = torch.where(fields["stopped"], 10.0 * fields["verified"], torch.tensor(-10.0).double())
    assert torch.equal(fields["scores"], expected)
    assert fields["prompts"].view(-1, 4).unique(dim=1).shape == (2, 1)
    free = settings_of(tree, non_stop_penalty="verifier", verification_reward=2.0).build(SourceContext(0, "train", 8))
    free.before_step(view_of(model, free, 0))
    assert torch.equal(free.rollout["scores"], 2.0 * free.rollout["verified"])


def scripted(source: RolloutSource, scores: Sequence[float]) -> None:
    """Verifiers that give these numbers, again and again."""
    given = iter(scores)
    source.rewards.verify = lambda answers, rows: [next(given) for _ in answers]  # type: ignore[method-assign]


def test_equal_groups_are_dropped_or_replaced(tree: Any, tiny: Any) -> None:
    model = None
    for kind, rounds in (("keep", 4), ("drop", 4), ("resample", 4), ("resample", 1)):
        settings = settings_of(tree, equal_groups=kind, resample_rounds=rounds, non_stop_penalty="verifier")
        source = settings.build(SourceContext(0, "train", 8))
        model = model or tiny(0, torch.float32, vocab_size=source.vocab_size)
        equal, mixed = [1.0] * 4, [1.0, 0.0, 0.0, 1.0]
        scripted(source, [*equal, *mixed, *equal, *equal, *equal, *mixed])
        source.before_step(view_of(model, source, 0))
        groups = source.rollout["scores"].view(-1, 4)
        has_labels = (source.rollout["labels"] != -100).any(1).view(-1, 4)
        unequal = (groups.amax(1) > groups.amin(1)).tolist()
        if kind == "resample":
            assert unequal == ([True, True] if rounds == 4 else [True, False])
            assert bool(has_labels.all())
        else:
            assert unequal == [False, True]
            assert bool(has_labels[1].all())
            assert bool(has_labels[0].any()) == (kind == "keep")
    settings = settings_of(tree, equal_groups="drop", non_stop_penalty="verifier")
    source = settings.build(SourceContext(0, "train", 8))
    scripted(source, [1.0] * 8)
    source.before_step(view_of(model, source, 0))
    assert bool((source.rollout["labels"] != -100).any())  # a step needs units: not all can be dropped


@pytest.mark.parametrize("ppo", [False, True])
def test_stopping_amid_a_rollout_and_resuming_gives_the_same_bits(
    tree: Any, tiny: Any, tmp_path: Path, ppo: bool
) -> None:
    changes = {"updates": 2, "minibatches": 2, "ppo": ppo}
    whole = run_of(tree, tiny, steps=7, **changes)
    whole.train()
    first = run_of(tree, tiny, tmp_path, steps=7, **changes)
    first.pace = Pace(steps=3, micro_batch_size=8, clip_norm=1.0)
    first.train()
    first.checkpoints.close()
    again = run_of(tree, tiny, tmp_path, steps=7, **changes)
    again.load_state_dict(again.checkpoints.load(3))
    assert again.source.rollout is not None
    again.train()
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(again)[name]), name


@pytest.mark.parametrize("ppo", [False, True])
@pytest.mark.parametrize("loss", ["dapo", "sequence_mean", "constant", "sequence", "weighed"])
def test_micro_batches_change_nothing(tree: Any, tiny: Any, ppo: bool, loss: str) -> None:
    if ppo and loss not in ("dapo", "weighed"):
        pytest.skip("only GRPO weights answers")
    objective: dict[str, Any] = {} if ppo else {"token_loss": loss}
    if loss == "weighed":
        objective = {"importance_cap": 1.5}
    elif loss == "sequence":
        objective = {"ratio": "sequence"}
    from contextlib import nullcontext

    run = run_of(tree, tiny, steps=1, ppo=ppo, objective=objective, updates=2, non_stop_penalty="verifier")
    run.train()  # the policy has moved once, so that ratios and the KL term are not trivial
    batch = run.source.fetch(1, range(8))
    run.model.double()
    found = []
    for micro in (8, 3, 1):
        run.model.zero_grad(set_to_none=True)
        keys, device = Keys(0, 1, batch.slots_B), torch.device("cpu")
        step = gradient_of_step(
            run.model, run.objective, batch, keys, micro_batch_size=micro, clip_norm=0, device=device,
            autocast=nullcontext,
        )  # fmt: skip
        found.append((step, [p.grad.clone() for p in run.model.parameters() if p.grad is not None]))
    for step, grads in found[1:]:
        assert step.loss == pytest.approx(found[0][0].loss, rel=1e-9)
        assert (
            step.units
            == found[0][0].units
            == (8 if loss in ("sequence_mean", "constant") else float(batch["lengths"].sum()))
        )
        for name, value in step.logs.items():
            assert value == pytest.approx(found[0][0].logs[name], rel=1e-6, abs=1e-9), name
        for a, b in zip(grads, found[0][1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_without_a_kl_penalty_scaling_the_reward_changes_no_update(tree: Any, tiny: Any) -> None:
    for objective in ({"beta": 0.0}, {"beta": 0.0, "token_loss": "sequence_mean"}):
        runs = [
            run_of(tree, tiny, steps=3, objective=objective, verification_reward=r, non_stop_penalty=-r)
            for r in (1.0, 64.0)
        ]
        for run in runs:
            run.train()
        for name, tensor in weights(runs[0]).items():
            assert torch.equal(tensor, weights(runs[1])[name]), name
    # PPO: with values of zero the whitened advantages, and so the policy's update, do not change either.
    runs = [
        run_of(tree, tiny, steps=1, ppo=True, objective={"beta": 0.0, "value_coefficient": 0.0},
               verification_reward=r, non_stop_penalty=-r)
        for r in (1.0, 64.0)
    ]  # fmt: skip
    for run in runs:
        run.train()
    for name, tensor in weights(runs[0]).items():
        torch.testing.assert_close(tensor, weights(runs[1])[name], rtol=1e-5, atol=1e-6)


def test_the_kl_penalty_stands_in_the_rewards_of_ppo_and_in_the_loss_of_grpo(tree: Any, tiny: Any) -> None:
    ppo = run_of(tree, tiny, ppo=True, steps=3, objective={"beta": 0.5, "kl": "k3"})
    ppo.train()
    assert isinstance(ppo.objective, PolicyObjective)
    assert ppo.objective.terms.beta == 0.0
    ppo.source.before_step(view_of(ppo.model, ppo.source, 3))
    ppo.objective.before_step(view_of(ppo.model, ppo.source, 3))
    rollout, mask = ppo.source.rollout, ppo.source.rollout["labels"] != -100
    assert bool((rollout["penalties"] > 0).all())
    assert not rollout["returns"][~mask].any()
    assert ppo.objective.reference.model is not None
    assert not hasattr(ppo.objective.reference.model, "value")
    grpo = run_of(tree, tiny, steps=2, objective={"beta": 0.0})
    grpo.train()
    assert grpo.objective.reference is None
    grpo.source.before_step(view_of(grpo.model, grpo.source, 9))
    grpo.objective.before_step(view_of(grpo.model, grpo.source, 9))
    assert "reference_logprobs" not in grpo.source.rollout


def test_validation_answers_greedily_and_reports_the_verifiers(tree: Any, tiny: Any) -> None:
    run = run_of(tree, tiny, steps=1)
    metrics = run.evaluate()["validation"]
    assert metrics["loss"] == pytest.approx(1 - metrics["verified"])
    assert 0 <= metrics["verified"] <= 1
    assert 1 <= metrics["length"] <= 6
    skills = {name.partition("/")[2] for name in metrics if name.startswith("verified/")}
    assert skills
    assert {f"{measure}/{skill}" for measure in ("length", "stopped") for skill in skills} <= set(metrics)
    again = run.evaluate()["validation"]
    assert metrics == again


@pytest.mark.parametrize("ppo", [False, True])
def test_it_learns_to_be_rewarded(tree: Any, tiny: Any, ppo: bool) -> None:
    run = run_of(
        tree, tiny, steps=40, batch=32, micro=32, lr=2e-2, ppo=ppo, objective={"beta": 0.0}, updates=2,
        non_stop_penalty="verifier",
    )  # fmt: skip
    before = run.evaluate()["validation"]["verified"]
    run.train()
    source = run.source
    source.before_step(view_of(run.model, source, 100))
    assert float(source.rollout["verified"].mean()) > 0.5 > before + 0.05


def test_bad_settings_are_refused(tree: Any, tiny: Any) -> None:
    with pytest.raises(SettingsError, match="samples_per_prompt"):
        settings_of(tree, samples_per_prompt=1, equal_groups="drop")
    with pytest.raises(ValueError, match="whole groups"):
        settings_of(tree).build(SourceContext(0, "train", 6))
    with pytest.raises(Exception, match="no verifier is called"):
        settings_of(tree, verifiers={"known": False}).build(SourceContext(0, "train", 8))
    plain = ObjectiveContext(0, torch.device("cpu"), object(), lambda: nn.Identity())  # type: ignore[arg-type]
    for kind in (Grpo, Ppo):
        with pytest.raises(ValueError, match="rollouts:Rollouts"):
            kind().build(plain)
        with pytest.raises(ValueError, match="needs the run"):
            kind().build(None)
    with pytest.raises(ValueError, match="2 or more"):
        run_of(tree, tiny, samples_per_prompt=1)
    source = settings_of(tree).build(SourceContext(0, "train", 8))
    run = run_of(tree, tiny, steps=1)
    run.objective = Ppo().build(ObjectiveContext(0, torch.device("cpu"), source, lambda: run.model))
    run.source = source
    with pytest.raises(TypeError, match="ActorCritic"):
        run.train()
    with pytest.raises(RuntimeError, match="before_step"):
        settings_of(tree).build(SourceContext(0, "train", 8)).fetch(0, [0])


def test_the_critic_starts_as_the_policy_or_as_a_reward_model(tiny: Any, tmp_path: Path) -> None:
    from resilin.models.huggingface import save_pretrained
    from resilin.posttrain.reward_model import RewardModel, save_reward_model

    policy = tiny(0, torch.float32)
    save_pretrained(policy, tmp_path / "policy")
    reward = RewardModel(tiny(1, torch.float32))
    with torch.no_grad():
        reward.score.weight.fill_(0.5)
    save_reward_model(reward, tmp_path / "reward")
    of_policy = {"model": {"path": str(tmp_path / "policy")}}
    alone = parse_settings(ActorCritic, of_policy, "test").build(ModelContext(0, None))
    tokens = torch.arange(6)[None]
    assert not alone.value(tokens).any()
    torch.testing.assert_close(alone(tokens).hidden_BTD, policy(tokens).hidden_BTD)
    tree = {**of_policy, "value": {"path": str(tmp_path / "reward")}}
    settings = parse_settings(ActorCritic, tree, "test")
    assert parse_settings(ActorCritic, settings.model_dump(mode="json"), "again") == settings
    both = settings.build(ModelContext(0, None))
    torch.testing.assert_close(both.value(tokens), reward(tokens))
    wrong = {**of_policy, "value": {"use": "resilin.models.pretrained:Pretrained", "path": str(tmp_path / "policy")}}
    with pytest.raises(ValueError, match="reward model"):
        parse_settings(ActorCritic, wrong, "test").build(ModelContext(0, None))


def test_the_end_of_the_prompts_ends_the_run(tree: Any, tiny: Any) -> None:
    tree["prompts"]["epochs"] = 1
    run = run_of(tree, tiny, steps=100)
    outcome = run.train()
    assert outcome.reason == "completed"
    assert outcome.step == 24 * 4 // 8


def test_answers_come_from_the_decoder_inside(tiny: Any) -> None:
    from resilin.posttrain.actor_critic import ActorCriticModel
    from resilin.posttrain.reward_model import RewardModel
    from resilin.posttrain.rollout import decoder_of

    policy = tiny(0, torch.float32)
    both = ActorCriticModel(policy, RewardModel(tiny(1, torch.float32)))
    assert decoder_of(policy) is decoder_of(torch.compile(policy)) is decoder_of(both) is policy
    with pytest.raises(TypeError, match="Linear"):
        decoder_of(nn.Linear(2, 2))


@pytest.mark.parametrize("ppo", [False, True])
def test_a_micro_batch_of_dropped_answers_has_no_units_and_no_gradient(tree: Any, tiny: Any, ppo: bool) -> None:
    run = run_of(tree, tiny, steps=1, ppo=ppo, non_stop_penalty="verifier")
    run.train()
    run.source.before_step(view_of(run.model, run.source, 1))
    run.objective.before_step(view_of(run.model, run.source, 1))
    batch = run.source.fetch(1, range(8)).rows(0, 2)
    batch.fields["labels"][:] = -100
    run.model.zero_grad(set_to_none=True)
    loss = run.objective(run.model, batch, Keys(0, 1, batch.slots_B))
    loss.sum.backward()
    assert float(loss.units) == 0
    assert all(p.grad is None or not p.grad.any() for p in run.model.parameters())


def test_a_stop_string_ends_an_answer_and_tokens_labels_and_logprobs_stay_those_of_the_draws(
    tree: Any, tiny: Any
) -> None:
    settings = settings_of(tree, stop=["7", "ab"], max_new_tokens=30, samples_per_prompt=8)
    source = settings.build(SourceContext(0, "train", 64))
    free = settings_of(tree, max_new_tokens=30, samples_per_prompt=8).build(SourceContext(0, "train", 64))
    model = tiny(0, torch.float32, vocab_size=source.vocab_size, init_std=0.1)
    seen: list[str] = []
    inner = source.rewards.verify
    source.rewards.verify = lambda answers, rows: seen.extend(source.rewards.texts(answers)) or inner(answers, rows)
    for one in (source, free):
        one.before_step(view_of(model, one, 0))
    one_letter = source.tokenizer.inner.token_to_id("7")
    stopped = 0
    for row, text in enumerate(seen):
        labels, whole = (one.rollout["labels"][row] for one in (source, free))
        tokens, uncut = labels[labels != -100].tolist(), whole[whole != -100].tolist()
        assert tokens == uncut[: len(tokens)]  # the stop string changes no draw
        assert len(tokens) == int(source.rollout["lengths"][row])
        logprobs = source.rollout["old_logprobs"][row]
        assert bool((logprobs[labels != -100] < 0).all())
        assert not logprobs[labels == -100].any()
        if one_letter in tokens or "ab" in text:
            assert tokens.index(one_letter) == len(tokens) - 1 if one_letter in tokens else text.endswith("ab")
            assert bool(source.rollout["stopped"][row])
            stopped += 1
        else:
            assert len(tokens) == 30 or tokens[-1] in source.end_ids
    assert stopped > 10
    with pytest.raises(SettingsError, match="stop"):
        settings_of(tree, stop=[""])


def test_what_a_token_says_beyond_a_stop_string_is_cut_off() -> None:
    from resilin.posttrain.rollout import Answer as Drawn

    assert Drawn([1], stop="</a>").said("x</a>\n\n<b>") == "x</a>"
    assert Drawn([1], stop="</a>").said("x</a></a>") == "x</a>"
    assert Drawn([1]).said("x</a> y") == "x</a> y"


def test_answers_at_the_limit_are_masked_and_a_step_keeps_units(tree: Any, tiny: Any) -> None:
    settings = settings_of(tree, mask_truncated=True, non_stop_penalty="verifier", max_new_tokens=12, minibatches=2)
    source = settings.build(SourceContext(0, "train", 16))
    model = tiny(0, torch.float32, vocab_size=source.vocab_size, init_std=0.1)
    source.before_step(view_of(model, source, 0))
    rollout = source.rollout
    has_labels = (rollout["labels"] != -100).any(1)
    assert bool(rollout["stopped"].any())
    assert not bool(rollout["stopped"].all())
    assert torch.equal(has_labels, rollout["stopped"])
    assert not rollout["muted"].any()
    # None ends: the step keeps its units, and no answer has an advantage.
    run = run_of(tree, tiny, steps=1, mask_truncated=True, non_stop_penalty="verifier", max_new_tokens=1)
    run.source.end_ids = frozenset()
    run.source.before_step(view_of(run.model, run.source, 0))
    run.objective.before_step(view_of(run.model, run.source, 0))
    rollout = run.source.rollout
    assert bool(rollout["muted"].all())
    assert bool((rollout["labels"] != -100).any(1).all())
    assert rollout["scores"].unique().numel() > 1
    assert not rollout["advantages"].any()


def test_long_answers_lose_more_and_more_of_their_score(tree: Any) -> None:
    from resilin.posttrain.rollout import Answer as Drawn

    settings = settings_of(tree, max_new_tokens=20, overlong_buffer=8, overlong_penalty=4.0)
    score = settings.build(SourceContext(0, "train", 8)).rewards.score
    found = [score(Drawn([1], [2] * length, [0.0] * length, True), 1.0) for length in (1, 12, 14, 16, 20)]
    assert found == [10.0, 10.0, 9.0, 8.0, 6.0]
    for wrong in ({"overlong_buffer": 8}, {"overlong_penalty": 1.0}, {"overlong_buffer": 20, "overlong_penalty": 1.0}):
        with pytest.raises(SettingsError, match="overlong_"):
            settings_of(tree, max_new_tokens=20, **wrong)


def test_tokens_are_weighed_by_training_over_sampling_up_to_a_cap(tree: Any, tiny: Any) -> None:
    from resilin.posttrain.sequences import frozen_logprobs

    for changes in ({}, {"top_k": 3}):
        run = run_of(tree, tiny, steps=1, objective={"importance_cap": 0.9}, **changes)
        run.source.before_step(view_of(run.model, run.source, 0))
        drawn = run.source.rollout["old_logprobs"].clone()
        run.objective.before_step(view_of(run.model, run.source, 0))
        rollout, valid = run.source.rollout, run.source.rollout["labels"] != -100
        trained = frozen_logprobs(run.model, rollout["tokens"], rollout["labels"], 1.0)
        torch.testing.assert_close(rollout["old_logprobs"][valid], trained)
        expected = (trained - drawn[valid]).exp().clamp(max=0.9)
        torch.testing.assert_close(rollout["importance"][valid], expected)
        # Of three tokens some are drawn far more often than the whole policy would; unfiltered, hardly any differ.
        assert float(expected.min()) < 0.8 if changes else float(expected.min()) == pytest.approx(0.9)
        loss = run.objective(run.model, run.source.fetch(0, range(8)), None)
        assert loss.logs["importance"].value() == pytest.approx(float(expected.mean()), rel=1e-5)
    with pytest.raises(ValueError, match="importance_cap"):
        Grpo(importance_cap=2.0, old_logprobs="sampled")


def test_the_constant_norm_divides_every_answers_sum_by_the_limit(tree: Any, tiny: Any) -> None:
    runs = {
        kind: run_of(tree, tiny, steps=1, objective={"token_loss": kind, "beta": 0.0}, non_stop_penalty="verifier")
        for kind in ("constant", "dapo")
    }
    losses = {}
    for kind, run in runs.items():
        run.source.before_step(view_of(run.model, run.source, 0))
        run.objective.before_step(view_of(run.model, run.source, 0))
        run.source.rollout["advantages"] = torch.arange(8).double()
        losses[kind] = run.objective(run.model, run.source.fetch(0, range(8)), None)
    sums = {kind: float(loss.sum.detach()) for kind, loss in losses.items()}
    assert sums["constant"] == pytest.approx(sums["dapo"] / 6)
    assert float(losses["constant"].units) == 8


def test_a_rollout_with_a_reward_model_resumes_to_the_bit(tree: Any, tiny: Any, tmp_path: Path) -> None:
    from resilin.data.tokenizer import Tokenizer
    from resilin.posttrain.reward_model import RewardModel, save_reward_model

    words = Tokenizer.load(Path(tree["prompts"]["tokenizer"]))
    reward = RewardModel(tiny(5, torch.float32, vocab_size=words.vocab_size, init_std=0.1))
    with torch.no_grad():
        reward.score.weight.normal_(generator=torch.Generator().manual_seed(0))
    save_reward_model(reward, tmp_path / "reward")
    words.save(tmp_path / "reward")
    changes = {"updates": 2, "reward_model": str(tmp_path / "reward"), "reward_model_multiplier": 2.0}
    whole = run_of(tree, tiny, steps=5, **changes)
    whole.train()
    first = run_of(tree, tiny, tmp_path / "run", steps=5, **changes)
    first.pace = Pace(steps=3, micro_batch_size=8, clip_norm=1.0)
    first.train()
    first.checkpoints.close()
    again = run_of(tree, tiny, tmp_path / "run", steps=5, **changes)
    again.load_state_dict(again.checkpoints.load(3))
    assert again.source.rollout["liked"].unique().numel() > 2
    again.train()
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(again)[name]), name


def test_a_reward_model_reads_prompt_answer_and_the_token_that_ends_it(tiny: Any) -> None:
    from resilin.data.train_tokenizer import byte_tokenizer
    from resilin.posttrain.reward_judge import RewardJudge
    from resilin.posttrain.reward_model import RewardModel
    from resilin.posttrain.rollout import Answer as Drawn

    words = byte_tokenizer()
    model = RewardModel(tiny(0, torch.float32, vocab_size=words.vocab_size, max_positions=64))
    with torch.no_grad():
        model.score.weight.fill_(0.7)
    judge = RewardJudge(model, words)
    rows = [{"prompt": "ab"}, {"messages": [{"role": "user", "content": "hi"}]}, {"prompt": "x" * 100}]
    answers = [Drawn([1], [2], [0.0], ended) for ended in (False, True, True)]
    texts = ["cd", "yes", "y"]
    read = [judge.tokens(*parts) for parts in zip(rows, answers, texts, strict=True)]
    assert read[0] == words.encode("abcd")
    chat = words.chat([*rows[1]["messages"], {"role": "assistant", "content": "yes"}])
    learnt = max(place for place, unit in enumerate(chat.units) if unit)
    assert read[1] == list(chat.ids)[: learnt + 1]
    assert read[2] == [*words.encode("x" * 100 + "y"), words.eos_id][-64:]
    together = judge.scores(rows, answers, texts, torch.device("cpu"))
    cpu = torch.device("cpu")
    alone = [judge.scores([rows[n]], [answers[n]], [texts[n]], cpu)[0] for n in range(3)]
    assert together == pytest.approx(alone, rel=1e-5)
    with torch.no_grad():
        assert together[1] == pytest.approx(float(model(torch.tensor([read[1]]))[0, -1]), rel=1e-5)
    as_message = RewardJudge(model, words, texts_are_messages=True).tokens(rows[0], answers[0], "cd")
    assert as_message == [
        *words.chat([{"role": "user", "content": "ab"}], add_generation_prompt=True).ids,
        *words.encode("cd"),
    ]
