"""The recipe chain-of-model: its settings, its models, and its claims, which are computed from the runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.settings import ModelContext
from resilin.nested import Budget, BudgetError, budget
from resilin.nouns import Batch
from resilin.objective.next_token import NextToken
from resilin.recipes.cells import cells, check
from resilin.recipes.chain_of_model import GROWN, SCALES, analyse
from resilin.recipes.chain_of_model.models import Grown, ReadAt, widened
from resilin.recipes.findings import Evaluation, RunRecord, Study, Trial
from resilin.recipes.recipe import load_recipe

RECIPE = Path(__file__).parents[2] / "recipes" / "chain-of-model"
TOKENS = torch.arange(24).view(2, 12)
BATCH = Batch(torch.arange(2), {"tokens": TOKENS, "labels": TOKENS.roll(-1, 1)})
BEFORE = {"loss": 3.0, "library/loss": 2.0, "library/loss_at_1": 2.0}
GOOD = {
    "chains": {"loss": 1.7, "loss_at_1": 2.1, "loss_at_2": 1.9, "loss_at_3": 1.7},
    "air": {"loss": 1.72, "loss_at_1": 2.1, "loss_at_2": 1.9, "loss_at_3": 1.72},
    "head_only": {"loss": 1.7, "loss_at_1": 2.5, "loss_at_2": 2.1, "loss_at_3": 1.7},
    "last": {"loss": 1.68, "loss_at_1": 4.0, "loss_at_2": 2.9, "loss_at_3": 1.68},
    "dense": {"loss": 1.65, "loss_at_1": 5.0, "loss_at_2": 4.0, "loss_at_3": 1.65},
    "alone_1": {"loss": 2.08},
    "alone_2": {"loss": 1.88},
    "expand": {"loss": 1.6, "library/loss": 2.5, "library/loss_at_1": 2.0, "loss_at_1": 3.0, "loss_at_2": 1.6},
    "expand_air": {"loss": 1.62, "library/loss": 2.5, "library/loss_at_1": 2.0, "loss_at_1": 3.0, "loss_at_2": 1.62},
    "widened": {"loss": 1.58, "library/loss": 2.6},
    "fine_tuned": {"loss": 1.7, "library/loss": 2.6},
    "lora": {"loss": 1.9, "library/loss": 2.4},
}


def study(**changed: dict[str, float]) -> Study:
    trials = []
    for arm, losses in {name: losses | changed.get(name, {}) for name, losses in GOOD.items()}.items():
        for seed in range(3):
            last = {name: value + 0.001 * seed for name, value in losses.items()}
            first = {name: value + 0.001 * seed for name, value in BEFORE.items()}
            steps = (Evaluation(step=0, metrics=first),) if arm in GROWN else ()
            record = RunRecord(
                hash="x", status="finished", evaluations=(*steps, Evaluation(step=100, metrics=last)), parameters=9
            )
            trials.append(Trial("main", arm, {}, seed, record))
    return Study("chain-of-model", "cpu", tuple(trials), None)


def holds(found) -> dict[str, bool]:
    return {claim.name: claim.holds for claim in found.claims}


def test_all_claims_hold_where_the_figures_say_so():
    found = analyse(study())
    assert all(holds(found).values()), holds(found)
    assert len(found.claims) == 17
    scales, grown = ({row[0]: row for row in table.rows} for table in found.tables)
    assert scales[SCALES["alone_1"]][2:] == (pytest.approx(2.081), None, None)
    assert scales[SCALES["chains"]][2:] == (pytest.approx(2.101), pytest.approx(1.901), pytest.approx(1.701))
    assert grown[GROWN["expand"]][1:] == (9, *(pytest.approx(v) for v in (1.601, 2.001, 2.501, 2.001)))
    assert grown[GROWN["lora"]][-1] is None


@pytest.mark.parametrize(
    ("changed", "fails"),
    [
        ({"chains": {"loss_at_2": 2.2}}, {"scale 2 over 1", "scale 2 beside a model of its own"}),
        ({"dense": {"loss_at_1": 2.5}}, {"scale 1 beside dense"}),
        ({"last": {"loss_at_1": 2.4}}, {"scale 1 beside last", "a taught head"}),
        ({"dense": {"loss": 1.5}}, {"full scale beside a plain model"}),
        ({"head_only": {"loss_at_1": 2.0}}, {"all scales from the start"}),
        ({"air": {"loss": 1.9}}, {"shared keys"}),
        ({"expand": {"library/loss_at_1": 2.0000001}}, {"expand: the old scale stays"}),
        ({"expand_air": {"loss": 3.1}}, {"expand_air: the new text"}),
        ({"widened": {"loss": 1.4}}, {"beside widened"}),
        ({"lora": {"loss": 1.5}}, {"beside lora"}),
        ({"fine_tuned": {"library/loss": 2.01}}, {"fine-tuning forgets"}),
    ],
)
def test_a_claim_fails_where_its_figures_do(changed, fails):
    found = holds(analyse(study(**changed)))
    assert fails <= {name for name, held in found.items() if not held}


def test_runs_that_did_not_end_are_told():
    assert analyse(Study("chain-of-model", "cpu", (), None)).notes


def test_every_cell_of_every_preset_can_be_trained():
    recipe = load_recipe(RECIPE)
    check(recipe)
    arms = {cell.arm: cell.settings for cell in cells(recipe, "cpu")}
    assert set(arms) == {*SCALES, *GROWN}
    # The stage of the head is the arm `last`; its objective is the last scale's alone.
    stage = arms["head_only"].model.stage().settings(0)
    assert stage.model == arms["last"].model
    assert stage.train.steps == arms["last"].train.steps
    widths = arms["chains"].model.widths
    for scale in (1, 2):
        alone = arms[f"alone_{scale}"].model
        assert alone.hidden_size == sum(widths.hidden[:scale])
        assert alone.mlp_size == sum(widths.mlp[:scale])
    base = arms["expand"].model.run
    assert all(arms[name].model.run == base for name in GROWN)


def test_a_plain_model_is_read_at_its_parts():
    model = Decoder(DecoderSettings(vocab_size=37, hidden_size=16, layers=1, heads=4, mlp_size=24))
    part = {"hidden": 8, "heads": 2, "ffn": 12}
    loss = ReadAt(budgets=(part, {})).build()(model, BATCH, None)
    with budget(model, Budget.from_dict(part)):
        expected = NextToken().build()(model, BATCH, None)
    assert loss.logs["loss_at_1"].sum.item() == expected.sum.item()
    assert loss.logs["loss_at_2"].sum.item() == loss.sum.item()


def test_a_wider_plain_model_holds_the_old_one_in_its_corner():
    old = Decoder(DecoderSettings(vocab_size=37, hidden_size=16, layers=1, heads=4, mlp_size=24))
    wide = widened(old, 2, 1)
    assert (wide.settings.hidden_size, wide.settings.mlp_size, wide.settings.heads) == (24, 36, 6)
    parts = dict(wide.named_parameters())
    for name, parameter in old.named_parameters():
        assert torch.equal(parts[name][tuple(slice(0, n) for n in parameter.shape)], parameter), name
    assert not wide.head.weight[:, 16:].any()
    with pytest.raises(BudgetError, match="do not make whole widths"):
        widened(Decoder(DecoderSettings(vocab_size=37, hidden_size=16, layers=1, heads=4, mlp_size=22)), 1, 1)


def test_a_trained_model_goes_on_in_every_way(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = {
        "source": {
            "paths": [str(tmp_path / "a.txt")],
            "sequence_length": 16,
            "tokenizer": {"kind": "bytes"},
            "held_out": {"by": "tail"},
        },
        "model": {"hidden_size": 16, "layers": 1, "heads": 4, "mlp_size": 24},
        "train": {"steps": 1, "batch_size": 2, "device": "cpu"},
        "checkpoint": {"every": 0},
        "evaluation": {"every": 0},
    }
    (tmp_path / "a.txt").write_text("x = 1\n" * 100)
    trained = {}
    for by in ("nothing", "chain", "shared_chain", "width", "lora"):
        model = Grown(run=run, by=by, heads=4, rank=2).build(ModelContext(0, 257))
        trained[by] = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained[by]
    assert all(".chains.1." in name for name in trained["chain"] | trained["shared_chain"])
    assert all(".adapters." in name for name in trained["lora"])
