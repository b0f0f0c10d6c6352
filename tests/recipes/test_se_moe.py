"""The recipe's optimizer in a run, and claims that follow from records."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from resilin.config import SettingsError
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings, MoESettings
from resilin.nouns import Batch
from resilin.objective.next_token import NextToken
from resilin.recipes.cells import cells
from resilin.recipes.findings import RunRecord, Study, Trial
from resilin.recipes.recipe import load_recipe
from resilin.recipes.se_moe.analysis import ARMS, analyse
from resilin.recipes.se_moe.tiered import Tiered

RECIPE = Path(__file__).parents[2] / "recipes" / "se-moe"


def decoder(**more) -> Decoder:
    moe = MoESettings(experts=6, experts_per_token=1, expert_size=16, normalise_weights=False)
    return Decoder(
        DecoderSettings(**{"vocab_size": 32, "hidden_size": 16, "heads": 2, "layers": 3, "moe": moe, **more})
    )


def losses(settings: Tiered, steps: int = 5, recompute: str = "none") -> list[float]:
    model, objective = decoder(recompute=recompute), NextToken(load_balance=0.0).build()
    optimizer = settings.build(model, steps)
    found = []
    for step in range(steps):
        tokens = torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(step))
        batch = Batch(torch.arange(2), {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]})
        loss = objective(model, batch, None)
        loss.sum.backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(float(loss.units))
        logs = optimizer.step(step)
        optimizer.zero_grad()
        found.append(float(loss.sum.detach()))
    assert 0 < logs["tiers/active"] < 1
    assert logs["tiers/step_s"] > 0
    return found


def test_losses_do_not_depend_on_the_tiers():
    want = losses(Tiered(host_experts=18, prefetch=False))
    assert want[-1] != want[0]
    for settings in (Tiered(host_experts=1), Tiered(host_experts=4, policy="lru", megabytes_per_second=50.0)):
        assert losses(settings) == want
    assert losses(Tiered(host_experts=3), recompute="block") == want


def test_a_resumed_optimizer_finds_its_experts(tmp_path):
    model = decoder()
    optimizer = Tiered(folder=tmp_path).build(model, 4)
    state = optimizer.state_dict()
    assert state["experts_at"] == 0
    Tiered(folder=tmp_path).build(decoder(), 4).load_state_dict(state)
    with pytest.raises(ValueError, match="name the folder of that run"):
        optimizer.load_state_dict({**state, "experts_at": 3})


def test_a_model_without_experts_is_refused():
    with pytest.raises(SettingsError, match=r"set model\.moe"):
        Tiered().build(decoder(moe=None), 4)


def test_every_preset_makes_runs():
    recipe = load_recipe(RECIPE)
    for preset in ("cpu", "gpu", "paper"):
        assert {cell.arm for cell in cells(recipe, preset)} == set(ARMS)


def record(arm: str, step_s: float, stall_s: float, loss: float = 1.0) -> Trial:
    steps = range(1, 9)
    series = {
        "loss": tuple((step, loss / step) for step in steps),
        "tiers/step_s": tuple((step, step_s) for step in steps),
        "tiers/stall_s": tuple((step, stall_s) for step in steps),
        "tiers/hit_rate": ((8, 0.5 if arm == "off" else 0.4),),
        "tiers/host_bytes": ((8, 1e6),),
        "tiers/active": ((8, 0.25),),
    }
    return Trial("main", arm, {}, 0, RunRecord(hash=arm, status="finished", series=series))


def study(ahead: float = 0.7, loss: float = 1.0) -> Study:
    trials = [record("memory", 0.5, 0.0), record("off", 1.0, 0.5), record("ahead", ahead, 0.2, loss)]
    trials += [record("off_lru", 1.0, 0.4), record("ahead_lru", 0.7, 0.1)]
    return Study("se-moe", "cpu", tuple(trials), load_recipe(RECIPE))


def test_claims_follow_from_the_runs():
    held = {claim.name: claim.holds for claim in analyse(study()).claims}
    assert all(held.values())
    assert not {c.name: c.holds for c in analyse(study(ahead=0.9)).claims}["steps are shorter"]
    changed = {claim.name: claim.holds for claim in analyse(study(loss=1.0001)).claims}
    assert not changed["tiers change nothing"]
