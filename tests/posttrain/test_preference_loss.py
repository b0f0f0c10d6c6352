from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resilin.config import SettingsError, parse_settings
from resilin.keys import Keys
from resilin.models.decoder import Decoder
from resilin.nouns import Batch, StepView
from resilin.objective.settings import ObjectiveContext
from resilin.posttrain.pair_terms import Answers, PairTerms
from resilin.posttrain.preference_loss import Preference, PreferenceLoss

LENGTHS = [(4, 2), (3, 6), (1, 5), (6, 6), (2, 1)]


class Fixed:
    """The same batches again and again."""

    digest = "fixed"

    def __init__(self, *batches: Batch) -> None:
        self.batches = batches
        self.mine = range(sum(len(b) for b in batches))

    def slots(self, step: int) -> int:
        return len(self.batches[step % len(self.batches)])

    def fetch(self, step: int, slots: Sequence[int]) -> Batch:
        return self.batches[step % len(self.batches)]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None: ...


def loss_of(
    frozen: nn.Module | None = None, source: Any = None, folder: Path | None = None, **changes: Any
) -> PreferenceLoss:
    settings = Preference(**{"reference": "live", **changes})
    made = lambda: frozen  # noqa: E731
    return settings.build(ObjectiveContext(0, torch.device("cpu"), source, made, folder, 4))


def view_of(model: nn.Module, source: Any, step: int = 0) -> StepView:
    return StepView(step, source, model, None, None, Keys.of_step(0, step))  # type: ignore[arg-type]


def gradient(model: Decoder, objective: Any, *parts: Batch) -> tuple[list[Tensor], float, float]:
    model.zero_grad()
    total = units = 0.0
    for part in parts:
        loss = objective(model, part, None)
        loss.sum.backward()
        total, units = total + float(loss.sum.detach()), units + float(loss.units)
    return [p.grad.clone() for p in model.parameters() if p.grad is not None], total, units


def swapped(batch: Batch) -> Batch:
    names = {"chosen": "rejected", "rejected": "chosen", "pair": "pair"}
    return Batch(
        batch.slots_B, {n.replace(n.split("_")[0], names[n.split("_")[0]]): t for n, t in batch.fields.items()}
    )


def test_by_hand(tiny: Any, pairs: Any) -> None:
    policy, reference, batch = tiny(0), tiny(1), pairs([(3, 2)])
    expected = {}
    for side in ("chosen", "rejected"):
        labels = batch[f"{side}_labels"][0]
        at = (labels != -100).nonzero()[:, 0]
        for name, model in (("policy", policy), ("reference", reference)):
            logp = model.logits(model(batch[f"{side}_tokens"]).hidden_BTD)[0].log_softmax(-1)
            expected[side, name] = float(logp[at, labels[at]].sum())
    dpo = 0.1 * (
        expected["chosen", "policy"] - expected["chosen", "reference"]
        - expected["rejected", "policy"] + expected["rejected", "reference"]
    )  # fmt: skip
    found = loss_of(reference, loss="dpo")(policy, batch, None)
    assert float(found.sum) == pytest.approx(math.log1p(math.exp(-dpo)), abs=1e-12)
    norm = 5 * (
        (expected["chosen", "policy"] - expected["chosen", "reference"]) / 3
        - (expected["rejected", "policy"] - expected["rejected", "reference"]) / 2
    )
    assert float(loss_of(reference)(policy, batch, None).sum) == pytest.approx(math.log1p(math.exp(-norm)), abs=1e-12)
    simpo = 2 * (expected["chosen", "policy"] / 3 - expected["rejected", "policy"] / 2 - 0.3)
    found = loss_of(loss="simpo")(policy, batch, None)
    assert float(found.sum) == pytest.approx(math.log1p(math.exp(-simpo)), abs=1e-12)
    assert found.logs["lengths/chosen"].value() == 3


@pytest.mark.parametrize("n", [1, 4, 7])
def test_dpo_norm_is_dpo_with_beta_over_n_where_all_answers_have_length_n(tiny: Any, pairs: Any, n: int) -> None:
    policy, reference, batch = tiny(0), tiny(1), pairs([(n, n)] * 4)
    normed = gradient(policy, loss_of(reference, beta=5.0), batch)
    plain = gradient(policy, loss_of(reference, loss="dpo", beta=5.0 / n), batch)
    assert normed[1] == pytest.approx(plain[1], rel=1e-12)
    for a, b in zip(normed[0], plain[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss", ["dpo", "dpo_norm", "wpo", "ipo"])
def test_a_policy_equal_to_its_reference_has_no_margin(tiny: Any, pairs: Any, loss: str) -> None:
    policy, batch = tiny(0), pairs(LENGTHS)
    found = loss_of(tiny(0), loss=loss)(policy, batch, None)
    assert found.logs["rewards/margins"].value() == pytest.approx(0, abs=1e-12)
    if loss in ("dpo", "dpo_norm"):
        assert float(found.sum) == pytest.approx(len(LENGTHS) * math.log(2), rel=1e-12)
    if loss == "ipo":
        assert float(found.sum) == pytest.approx(len(LENGTHS) * 25.0, rel=1e-12)


@pytest.mark.parametrize("loss", ["dpo", "dpo_norm", "wpo"])
def test_swapping_the_answers_negates_z(tiny: Any, pairs: Any, loss: str) -> None:
    policy, reference, batch = tiny(0), tiny(1), pairs(LENGTHS)
    objective = loss_of(reference, loss=loss)
    one, other = objective(policy, batch, None), objective(policy, swapped(batch), None)
    assert one.logs["logits/pair"].value() == pytest.approx(-other.logs["logits/pair"].value(), abs=1e-12)
    assert one.logs["rewards/chosen"].value() == pytest.approx(other.logs["rewards/rejected"].value(), abs=1e-12)


def test_smoothing_mixes_both_directions(tiny: Any, pairs: Any) -> None:
    policy, reference, batch = tiny(0), tiny(1), pairs(LENGTHS)
    right = float(loss_of(reference)(policy, batch, None).sum)
    wrong = float(loss_of(reference)(policy, swapped(batch), None).sum)
    mixed = float(loss_of(reference, label_smoothing=0.2)(policy, batch, None).sum)
    assert mixed == pytest.approx(0.8 * right + 0.2 * wrong, rel=1e-12)


def test_wpo_weights_are_at_most_one_and_carry_no_gradient() -> None:
    logp = torch.tensor([-1.0, -3.0], dtype=torch.float64, requires_grad=True)
    zero, length = torch.zeros(2, dtype=torch.float64), torch.tensor([2, 2])
    terms = PairTerms("wpo", 0.1, averaged=False)
    costs = terms(Answers(logp, zero, length), Answers(logp.detach() - 1, zero, length))
    weight = ((logp.detach() + logp.detach() - 1) / 2).exp()
    plain = PairTerms("dpo", 0.1, averaged=False)(Answers(logp, zero, length), Answers(logp.detach() - 1, zero, length))
    torch.testing.assert_close(costs.loss_P, plain.loss_P * weight)
    one, other = (torch.autograd.grad(c.loss_P.sum(), logp, retain_graph=True)[0] for c in (costs, plain))
    torch.testing.assert_close(one, other * weight)
    certain = torch.zeros(1, dtype=torch.float64)
    sure = terms(Answers(certain + 5, certain, length[:1]), Answers(certain + 5, certain, length[:1]))
    assert float(sure.loss_P) == pytest.approx(math.log(2))


@pytest.mark.parametrize("loss", ["dpo", "dpo_norm", "ipo", "simpo", "wpo"])
@pytest.mark.parametrize("chunk", [None, 0, 2])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])  # rows joined, and rows padded
def test_the_result_does_not_depend_on_padding_splitting_or_chunks(
    tiny: Any, pairs: Any, loss: str, chunk: int | None, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, reference = (tiny(seed, attention_backend=attention) for seed in (0, 1))
    whole = gradient(policy, loss_of(reference, loss=loss), pairs(LENGTHS))
    objective = loss_of(reference, loss=loss, chunk=chunk)
    padded = pairs(LENGTHS, width=23)
    junk = torch.randint(17, padded["chosen_tokens"].shape)
    after = torch.arange(23) > 3 + 6
    padded.fields["chosen_tokens"][:, after] = junk[:, after]  # what stands after the answers decides nothing
    others = [[padded], [padded.rows(0, 1), padded.rows(1, 4), padded.rows(4, 5)]]
    monkeypatch.setitem(__import__("resilin.posttrain.sequences").posttrain.sequences._FEW_POSITIONS, "cpu", 1)
    for parts in others:
        found = gradient(policy, objective, *parts)
        assert found[1:] == pytest.approx(whole[1:], rel=1e-11)
        for a, b in zip(found[0], whole[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_a_pair_without_an_answer_is_no_unit_and_gives_no_gradient(tiny: Any, pairs: Any) -> None:
    policy, batch = tiny(0), pairs([(2, 2)])
    batch.fields["chosen_labels"][:] = -100
    loss = loss_of(tiny(1))(policy, batch, None)
    assert float(loss.units) == 0
    loss.sum.backward()
    assert all(p.grad is None or not p.grad.any() for p in policy.parameters())


def test_a_cut_off_pair_changes_nothing_for_the_others(tiny: Any, pairs: Any) -> None:
    policy, reference = tiny(0), tiny(1)
    batch = pairs(LENGTHS)
    batch.fields["rejected_labels"][1] = -100
    found = gradient(policy, loss_of(reference), batch)
    kept = [batch.rows(a, b) for a, b in ((0, 1), (2, 5))]
    expected = gradient(policy, loss_of(reference), *kept)
    assert found[1:] == pytest.approx(expected[1:], rel=1e-12)
    assert found[2] == 4


def test_the_cached_reference_is_the_live_one_and_leaves_memory(tiny: Any, pairs: Any, tmp_path: Path) -> None:
    policy, reference = tiny(0), tiny(1)
    batches = [pairs(LENGTHS, seed=1), pairs(LENGTHS, seed=2, width=14)]
    source = Fixed(*batches)
    cached = loss_of(reference, source, tmp_path, reference="cached")
    cached.before_step(view_of(policy, source))
    assert cached.reference.live.model is None
    assert len(cached.reference.cache) == 4 * len(LENGTHS)
    live = loss_of(reference)
    for batch in batches:
        assert gradient(policy, cached, batch)[1] == pytest.approx(gradient(policy, live, batch)[1], rel=1e-12)
    again = loss_of(None, source, tmp_path, reference="cached")  # would fail if the model were needed
    again.before_step(view_of(policy, source))
    order = torch.tensor([3, 1, 0, 4, 2])  # rows are found by content, in any order
    mixed = Batch(order, {name: tensor[order] for name, tensor in batches[1].fields.items()})
    assert gradient(policy, again, mixed)[1] == pytest.approx(gradient(policy, live, mixed)[1], rel=1e-12)


def test_held_out_pairs_are_computed_once(tiny: Any, pairs: Any, tmp_path: Path) -> None:
    policy, made = tiny(0), []
    source = Fixed(pairs(LENGTHS, seed=1))

    def reference() -> nn.Module:
        made.append(tiny(1))
        return made[-1]

    context = ObjectiveContext(0, torch.device("cpu"), source, reference, tmp_path, 1)
    objective = Preference(reference="cached").build(context)
    held_out = pairs(LENGTHS, seed=9)
    expected = loss_of(tiny(1))(policy, held_out, None)
    for _ in range(2):
        objective.before_step(view_of(policy, source))
        assert float(objective(policy, held_out, None).sum) == pytest.approx(float(expected.sum), rel=1e-12)
    objective.before_step(view_of(policy, source))
    assert objective.reference.live.model is None
    assert len(made) == 2


def test_a_shared_cache_of_another_model_or_other_data_is_refused(tiny: Any, pairs: Any, tmp_path: Path) -> None:
    policy, source, path = tiny(0), Fixed(pairs(LENGTHS)), tmp_path / "shared.safetensors"
    first = loss_of(tiny(1), source, reference="cached", reference_cache=path)
    first.before_step(view_of(policy, source))
    loss_of(tiny(1), source, reference="cached", reference_cache=path)
    with pytest.raises(Exception, match="other model"):
        loss_of(tiny(2), source, reference="cached", reference_cache=path)
    source.digest = "changed"
    with pytest.raises(Exception, match="other data"):
        loss_of(tiny(1), source, reference="cached", reference_cache=path)
    path.write_bytes(b"no safetensors at all")
    with pytest.raises(Exception, match="not a cache"):
        loss_of(tiny(1), source, reference="cached", reference_cache=path)


def test_dropout_is_off_unless_asked_for_and_then_keyed_by_slot(tiny: Any, pairs: Any) -> None:
    policy, reference, batch = tiny(0, dropout=0.5), tiny(1), pairs(LENGTHS)
    keys = Keys(3, 4, batch.slots_B)
    off, on = loss_of(reference), loss_of(reference, dropout=True)
    assert float(off(policy, batch, keys).sum) == float(off(policy, batch, None).sum)
    whole = on(policy, batch, keys)
    assert float(whole.sum) != pytest.approx(float(off(policy, batch, keys).sum))
    parts = [on(policy, batch.rows(a, b), keys.rows(a, b)) for a, b in pairwise((0, 2, 5))]
    assert sum(float(p.sum) for p in parts) == pytest.approx(float(whole.sum), rel=1e-12)


def test_bad_settings_are_refused() -> None:
    for tree, words in (
        ({"loss": "ipo", "label_smoothing": 0.1}, "no meaning for ipo"),
        ({"reference": "live", "reference_cache": "x"}, "use 'cached'"),
        ({"beta": 0.0}, "beta"),
        ({"loss": "dpo_normal"}, "loss"),
    ):
        with pytest.raises(SettingsError, match=words):
            parse_settings(Preference, tree, "test")
    with pytest.raises(ValueError, match="needs the run"):
        Preference().build(None)
    assert replace(Preference().terms).beta == 5.0
    assert Preference(loss="dpo").terms.beta == 0.1


def test_the_reference_of_an_adapted_model_is_the_model_without_its_adapters(tiny: Any, pairs: Any) -> None:
    from resilin.adapt.attach import attach
    from resilin.adapt.settings import AdapterSettings

    policy, batch = tiny(0), pairs(LENGTHS)
    attach(policy, {"default": AdapterSettings(method="lora", rank=2)})
    policy.double()
    off, live = loss_of(reference="adapters_off"), loss_of(tiny(0))
    assert float(off(policy, batch, None).sum.detach()) == pytest.approx(len(LENGTHS) * math.log(2), rel=1e-12)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    found, expected = off(policy, batch, None), live(policy, batch, None)
    assert float(found.sum.detach()) == pytest.approx(float(expected.sum.detach()), rel=1e-12)
    assert found.logs["rewards/margins"].value() != 0
    found.sum.backward()
    assert any(p.grad is not None and p.grad.any() for p in policy.parameters())
    with pytest.raises(Exception, match="adapter"):
        off(tiny(1), batch, None)
