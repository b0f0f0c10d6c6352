"""The simulated ranks do what ranks do, and the recipe's claims follow from its runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from resilin.config import SettingsError, UserError, parse_settings
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.settings import ModelContext
from resilin.nouns import StepView
from resilin.optim.adamw import AdamW
from resilin.recipes.cells import cells
from resilin.recipes.findings import RunRecord, Study, Trial
from resilin.recipes.recipe import load_recipe
from resilin.recipes.universal_checkpointing.analysis import TARGETS, analyse
from resilin.recipes.universal_checkpointing.fused import Fused
from resilin.recipes.universal_checkpointing.meshed import Meshed, MeshedOptimizer, Stretch
from resilin.recipes.universal_checkpointing.partial_sums import PartialSums, RowParallel
from resilin.recipes.universal_checkpointing.ranks import KINDS

RECIPE = Path(__file__).parents[2] / "recipes" / "universal-checkpointing"
SMALL = DecoderSettings(
    vocab_size=37, hidden_size=16, layers=4, heads=4, kv_heads=2, mlp_size=20, tie_embeddings=True, qkv_bias=True
)
MESHES = [
    ("pp=2,dp=2,tp=2", "zero1"),
    ("dp=1", "none"),
    ("dp=3,tp=2", "zero1"),
    ("pp=4", "zero1"),
    ("dp=5", "zero3"),
    ("tp=4", "none"),
    pytest.param("pp=2,dp=3,tp=4", "zero3", marks=pytest.mark.slow),
]


def model() -> Decoder:
    return SMALL.build(ModelContext(0, None))


def gradients(decoder: Decoder, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    for parameter in decoder.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=g)


def trained(settings: Meshed, steps: int = 6, total: int = 6) -> tuple[Decoder, MeshedOptimizer]:
    decoder = model()
    optimizer = settings.build(decoder, total)
    for step in range(steps):
        gradients(decoder, step)
        optimizer.before_step(view(step, decoder, optimizer))
        optimizer.step(step)
    return decoder, optimizer


def view(step: int, decoder: Any, optimizer: Any) -> StepView:
    return StepView(step, None, decoder, None, optimizer, None)  # type: ignore[arg-type]


def plain(steps: int = 6, total: int = 6) -> Decoder:
    decoder = model()
    optimizer = AdamW().build(decoder, total)
    for step in range(steps):
        gradients(decoder, step)
        optimizer.step(step)
    return decoder


def same(a: Decoder, b: Decoder) -> None:
    """But for the last digit: torch's fused AdamW rounds the few elements at a buffer's end in another way."""
    for (name, mine), other in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.parametrize(("mesh", "sharding"), MESHES)
def test_ranks_update_as_one_optimizer_does(mesh: str, sharding: Any) -> None:
    decoder, _ = trained(Meshed(stretches=(Stretch(mesh=mesh, sharding=sharding),)))
    same(decoder, plain())


@pytest.mark.parametrize(("mesh", "sharding"), MESHES)
def test_through_a_checkpoint_into_another_layout_and_back_to_the_bit(mesh: str, sharding: Any) -> None:
    first = Stretch(mesh=MESHES[0][0], sharding="zero1")
    there, back = Stretch(start=2, mesh=mesh, sharding=sharding), Stretch(start=4, mesh=first.mesh, sharding="zero1")
    settings = Meshed(stretches=(first, there, back))
    decoder, optimizer = trained(settings, steps=2)
    before = {kind: optimizer.ranks.whole(kind) for kind in KINDS}
    for step in (2, 4):
        optimizer.before_step(view(step, decoder, optimizer))
        assert str(optimizer.ranks.mesh) == {2: mesh, 4: first.mesh}[step]
        for kind, tensors in before.items():
            after = optimizer.ranks.whole(kind)
            assert all(torch.equal(after[name], tensor) for name, tensor in tensors.items())
        assert all(torch.equal(p.data, decoder.state_dict()[n]) for n, p in optimizer.parameters.items())
    same(trained(settings)[0], plain())


def test_padding_of_every_rank_is_nan_all_along() -> None:
    _, optimizer = trained(Meshed(stretches=(Stretch(mesh="pp=2,dp=2,tp=2"),), vocabulary_multiple=8))
    held = sum(t.numel() for mine in optimizer.ranks.memory["model"].values() for t in mine.values())
    real = sum(int((~t.isnan()).sum()) for mine in optimizer.ranks.memory["model"].values() for t in mine.values())
    copies = sum(int(h.boxes.numel.sum()) for h in optimizer.ranks.layout.tensors.values())
    assert real == copies < held


def test_weights_alone_and_fused_tensors_joined_by_rank_go_elsewhere() -> None:
    stretches = (Stretch(mesh="pp=2,dp=2,tp=2"), Stretch(start=3, mesh="dp=1"))
    right = plain().state_dict()
    for carry in ("weights", "naive"):
        got = trained(Meshed(stretches=stretches, carry=carry))[0].state_dict()
        assert any(not torch.equal(got[name], right[name]) for name in right)
    naive = trained(Meshed(stretches=stretches, carry="naive"), steps=4)[0].state_dict()
    decoder = plain(4).state_dict()
    # The mistake moves rows: norms and sums of a fused tensor do not see it.
    q = "blocks.0.attention.q.weight"
    assert not torch.allclose(naive[q], decoder[q], atol=1e-2)
    assert torch.equal(naive["blocks.0.attention_norm.weight"], decoder["blocks.0.attention_norm.weight"])


def test_groups_keep_their_own_decay_and_rate() -> None:
    rules = [{"match": "*.o.weight", "lr_scale": 0.5, "weight_decay": 0.7}]
    tree = {"optimizer": {"rules": rules}, "stretches": [{"mesh": "dp=2,tp=2"}, {"start": 3, "mesh": "dp=3"}]}
    decoder, _ = trained(parse_settings(Meshed, tree, "test"))
    other = model()
    optimizer = parse_settings(AdamW, {"rules": rules}, "test").build(other, 6)
    for step in range(6):
        gradients(other, step)
        optimizer.step(step)
    same(decoder, other)


def test_state_goes_through_the_run_s_own_checkpoint() -> None:
    settings = Meshed(stretches=(Stretch(mesh="dp=2,tp=2"), Stretch(start=2, mesh="pp=4")))
    decoder, optimizer = trained(settings, steps=4)
    again = model()
    again.load_state_dict(decoder.state_dict())
    resumed = settings.build(again, 6)
    resumed.load_state_dict(optimizer.state_dict())
    for one, other in ((decoder, optimizer), (again, resumed)):
        gradients(one, 9)
        other.before_step(view(4, one, other))
        other.step(4)
    same(decoder, again)


def test_fused_tensors_come_apart_again() -> None:
    values = {name: p.data for name, p in model().named_parameters()}
    fused = Fused.of(list(values))
    stored = fused.join(values)
    assert stored["blocks.1.attention.qkv.weight"].shape == (16 + 8 + 8, 16)
    assert stored["blocks.1.mlp.gate_up.weight"].shape == (40, 16)
    back = fused.split(stored, {name: t.shape[0] for name, t in values.items()})
    assert set(back) == set(values)
    assert all(torch.equal(back[name], values[name]) for name in values)


def test_partial_sums_are_the_product_but_for_rounding() -> None:
    settings = PartialSums(model=SMALL, ways=((0, 1), (2, 4)))
    split, whole = settings.build(ModelContext(0, None)), model()
    assert set(split.state_dict()) == set(whole.state_dict())
    changed = [m for m in split.modules() if isinstance(m, RowParallel)]
    assert len(changed) == 2 * SMALL.layers
    x = torch.randn(3, 16)
    linear = split.blocks[0].attention.o  # type: ignore[union-attr,index]
    for step, ways in ((0, 1), (1, 1), (2, 4), (7, 4)):
        linear.before_step(view(step, split, None))
        assert linear.now == ways
        torch.testing.assert_close(linear(x), x @ whole.blocks[0].attention.o.weight.T)  # type: ignore[union-attr,index]


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(SettingsError, match="begin at step 0"):
        parse_settings(Meshed, {"stretches": [{"start": 3}]}, "test")
    with pytest.raises(SettingsError, match="ascending from step 0"):
        parse_settings(PartialSums, {"model": {}, "ways": [[0, 0]]}, "test")
    with pytest.raises(UserError, match="lays out a Decoder, not a Linear"):
        Meshed().build(torch.nn.Linear(2, 2), 3)


# ---- the analysis ----------------------------------------------------------------------------------------------------

Losses = Callable[[str, int], float]


def study(loss: Losses, seconds: Mapping[str, float]) -> Study:
    trials = []
    for cell in cells(load_recipe(RECIPE), "cpu"):
        points = {"loss": tuple((step, loss(cell.arm, step)) for step in range(1, 61))}
        series = points | {f"mesh/{name}_s": ((31, value),) for name, value in seconds.items()}
        record = RunRecord(hash="x", status="finished", series=series, settings=cell.settings.model_dump(mode="json"))
        trials.append(Trial(cell.grid, cell.arm, cell.axes, cell.seed, record))
    return Study("universal-checkpointing", "cpu", tuple(trials), None)


QUICK = {"save": 0.1, "gather": 0.2, "load": 0.1}


def good(arm: str, step: int) -> float:
    off = {"weights_only": 0.1, "naive_fused": 0.2}.get(arm, 1e-7 if arm in TARGETS else 0.0)
    return 3.0 + (off if step > 30 else 0.0)


def test_claims_follow_from_the_runs() -> None:
    found = analyse(study(good, QUICK))
    assert all(claim.holds for claim in found.claims)
    assert len(found.claims) == len(TARGETS) + 3
    far = analyse(study(lambda arm, step: good(arm, step) + (1e-3 if arm == "pp4" and step > 30 else 0), QUICK))
    assert {c.name for c in far.claims if not c.holds} == {"goes on in PP4"}
    level = {"weights_only": "tp4", "naive_fused": "tp4"}
    flat = analyse(study(lambda arm, step: good(level.get(arm, arm), step), {**QUICK, "save": 0.3}))
    assert {c.name for c in flat.claims if not c.holds} == {
        "weights alone do not",
        "joining fused tensors by rank does not",
        "saving is no slower than gathering",
    }


def test_before_the_switch_nothing_is_compared() -> None:
    early = analyse(study(lambda arm, step: good(arm, step) + (5.0 if arm == "tp4" and step <= 30 else 0), QUICK))
    assert all(claim.holds for claim in early.claims)


@pytest.mark.parametrize("preset", ["cpu", "gpu", "paper"])
def test_every_preset_starts_in_one_layout_and_moves_half_way(preset: str) -> None:
    for cell in cells(load_recipe(RECIPE), preset):
        assert isinstance(cell.settings.optimizer, Meshed)
        first, *later = cell.settings.optimizer.stretches
        assert (first.mesh, first.sharding) == ("pp=2,dp=2,tp=2", "zero1")
        assert [s.start for s in later] == ([] if cell.arm == "uninterrupted" else [cell.settings.train.steps // 2])
