"""The recipe `flexolmo`: claims follow the numbers, both ways; its runner measures what the analysis reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from joined_cases import anchor_model

from resilin.config import parse_settings
from resilin.data.settings import SourceContext
from resilin.joined.ensemble import label_logprobs
from resilin.nouns import Batch
from resilin.recipes.cells import cells
from resilin.recipes.findings import Evaluation, RunRecord, Study, Trial
from resilin.recipes.flexolmo import measure
from resilin.recipes.flexolmo.analysis import TITLES, analyse
from resilin.recipes.flexolmo.measure import loss_of, of_ensemble, of_model, of_weighted_average, train_and_measure
from resilin.recipes.flexolmo.owners import JoinedRouter
from resilin.recipes.installed_text import InstalledText
from resilin.recipes.recipe import load_recipe
from resilin.run.folder import RunFolder
from resilin.run.settings import RunSettings

FOLDER = Path(__file__).parents[2] / "recipes" / "flexolmo"
DOMAINS = ("headers", "manual")
EVERYWHERE = ("public", *DOMAINS)


def record(joined: float, others: float, *, leaving: float, extracted: float) -> RunRecord:
    """Losses such that joined experts are better by `others`, and an owner that leaves takes `leaving` along."""
    told: dict[str, float] = {}
    for domain in EVERYWHERE:
        own = joined if domain != "public" else 1.5
        for method in TITLES:
            told[f"{method}/{domain}"] = own + others
        told |= {f"joined/{domain}": own, f"tuned/{domain}": own - others / 10}
        told[f"public/{domain}"] = 1.5 if domain == "public" else joined + others
        told[f"unrestricted/{domain}"] = own - 0.01
        for count in (1, 2):
            told[f"joined, {count} of 3/{domain}"] = own + 0.1
        for gone in DOMAINS:
            moved = leaving if domain == gone else 0.001
            told[f"without {gone}/{domain}"] = own + moved
            told[f"share/{domain}/{gone}"] = 0.3
        told[f"share/{domain}/public"] = 0.4
    for domain in DOMAINS:
        told |= {f"pair {domain}/{domain}": joined, f"dense {domain}/{domain}": joined - 0.1}
        told |= {f"extracted/public/{domain}": 0.0, f"extracted/dense/{domain}": 0.1}
        told[f"extracted/joined/{domain}"] = extracted
    metrics = {f"joined/{name}": value for name, value in told.items()}
    return RunRecord(hash="h", status="finished", evaluations=(Evaluation(step=1, metrics=metrics),))


def study(main: RunRecord, ablation: RunRecord) -> Study:
    arms = {"flexolmo": main, "no_offsets": ablation, "random_rows": ablation}
    trials = [Trial("main", arm, {}, seed, one) for arm, one in arms.items() for seed in (0, 1, 2)]
    return Study("flexolmo", "cpu", tuple(trials), None)


def holding(found: Study) -> dict[str, bool]:
    return {claim.name: claim.holds for claim in analyse(found).claims}


def test_numbers_as_published_hold_every_claim_and_reversed_ones_few() -> None:
    good = record(1.2, 0.5, leaving=0.45, extracted=0.05)
    told = holding(study(good, record(1.4, 0.5, leaving=0.45, extracted=0.05)))
    assert all(told.values()), [name for name, holds in told.items() if not holds]
    bad = holding(study(record(1.2, -0.3, leaving=0.0, extracted=0.3), record(1.0, -0.3, leaving=0.0, extracted=0.3)))
    kept = {name for name, holds in bad.items() if holds}
    near = {"near its pair", "others keep", "public kept", "near the unrestricted"}
    assert all(any(word in name for word in near) for name in kept), kept


def test_the_tables_and_the_pictures_are_those_of_the_runs() -> None:
    found = analyse(study(record(1.2, 0.5, leaving=0.45, extracted=0.05), record(1.4, 0.5, leaving=0.4, extracted=0)))
    losses, counts, shares, extraction = found.tables
    assert ("experts joined, nothing trained", 1.5, 1.2, 1.2, pytest.approx(1.3), "46.7") in losses.rows
    assert [row[0] for row in counts.rows] == ["1 of 3", "2 of 3", "all"]
    assert shares.rows[1] == ("headers", pytest.approx(0.4), pytest.approx(0.3), pytest.approx(0.3))
    assert extraction.rows[1][:3] == ("trained on with it", pytest.approx(0.1), pytest.approx(0.1))
    assert {line.label for line in found.plots[0].lines} >= {"public", "joined", "soup"}
    assert analyse(Study("flexolmo", "cpu", (), None)).claims == ()


def test_scores_are_of_what_follows_the_prompt() -> None:
    ids = torch.randint(0, 40, (4, 41), generator=torch.Generator().manual_seed(1))
    batch = Batch(torch.arange(4), {"tokens": ids[:, :-1], "labels": ids[:, 1:].clone()})
    batch["labels"][0, 35:] = -100
    model = anchor_model()
    expected = -label_logprobs(model, batch)[:, 32:].sum() / (4 * 8 - 5)
    assert loss_of(of_model(model), [batch]) == pytest.approx(float(expected), rel=1e-5)
    assert loss_of(of_ensemble([model, model]), [batch]) == pytest.approx(float(expected), rel=1e-5)
    assert loss_of(of_weighted_average([model, model]), [batch]) == pytest.approx(float(expected), rel=1e-4)
    best, other = anchor_model(), anchor_model(seed=1)
    prompts = torch.stack([label_logprobs(one, batch)[:, :32].sum(-1) for one in (best, other)])
    assert torch.equal(
        of_ensemble([best, other], 1)(batch)[0].float(),
        label_logprobs([best, other][int(prompts[:, 0].argmax())], batch)[0],
    )


def test_every_preset_names_settings_that_exist() -> None:
    recipe = load_recipe(FOLDER)
    for preset in ("cpu", "gpu", "paper"):
        for cell in cells(recipe, preset):
            model = cell.settings.model
            assert isinstance(model, JoinedRouter)
            assert {stage.settings(0).train.steps for stage in model.team.stage().values()}


def test_descriptions_of_packages_are_text_of_their_own(tmp_path) -> None:
    source = InstalledText(kind="descriptions", bytes=40_000, sequence_length=64, cache=tmp_path)
    built = source.build(SourceContext(0, "train", 4))
    assert "Name: " in built.tokenizer.decode(built.stream.shards.tokens(0)[:4000].tolist())


@pytest.mark.slow
def test_the_runner_measures_everything_the_analysis_reads(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(measure, "BATCHES", 1)
    monkeypatch.setattr(measure, "EXTRACTED", 2)
    monkeypatch.chdir(tmp_path)
    cell = next(iter(cells(load_recipe(FOLDER), "cpu")))
    tree = cell.settings.model_dump(mode="json")
    tree["train"]["steps"], team = 1, tree["model"]["team"]
    team["all_steps"] = team["owner"]["train"]["steps"] = team["public"]["train"]["steps"] = 1
    team["public"]["model"] = {"hidden_size": 16, "layers": 1, "heads": 2, "mlp_size": 16}
    team["public"]["source"]["bytes"] = 300_000
    for part in tree["source"]["parts"][1:]:
        part["source"] |= {"pool": 64, "count": 32}
    settings = parse_settings(RunSettings, tree, "a small one")
    _, outcome = train_and_measure(settings, tmp_path / "run", ())
    assert outcome.reason == "completed"
    metrics: dict[str, float] = {}
    import json

    for line in RunFolder(tmp_path / "run").events_file.read_text().splitlines():
        event = json.loads(line)
        if event.get("name") == "joined":
            metrics = {f"joined/{name}": value for name, value in event["metrics"].items()}
    one = RunRecord(hash="h", status="finished", evaluations=(Evaluation(step=1, metrics=metrics),))
    found = analyse(Study("flexolmo", "cpu", (Trial("main", "flexolmo", {}, 0, one),), None))
    pairs = [row for table in found.tables for row in table.rows if str(row[0]).startswith("the expert of")]
    assert len(pairs) == len(team["domains"])  # each was measured on its own domain
    assert all(sum(value is not None for value in row[1:-2]) == 1 for row in pairs)
    assert not [(table.title, row) for table in found.tables for row in table.rows if None in row and row not in pairs]
    assert all(
        claim.evidence != "no seed measured both"
        for claim in found.claims
        if "better than no_" not in claim.name and "random" not in claim.name
    )
