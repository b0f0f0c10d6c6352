"""What the page of nested models shows is what runs."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path

import torch
from nested_cases import TOKENS, decoder

from resilin.config import parse_settings
from resilin.keys import Keys
from resilin.layout import missing
from resilin.layout.region import Region
from resilin.models.chain_settings import ChainSettings
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.own_config import own_settings
from resilin.nested import Budget, budget, extract, regions
from resilin.nested.chain_models import Expanded
from resilin.nested.chain_objective import ChainLosses
from resilin.nested.objective import Nested
from resilin.nouns import Batch
from resilin.objective.next_token import NextToken
from resilin.transforms import ObjectiveTransform

PAGE = (Path(__file__).parents[2] / "docs" / "nested.md").read_text(encoding="utf-8")
SETTINGS = DecoderSettings(vocab_size=37, hidden_size=16, layers=3, heads=4, mlp_size=1024, init_std=0.2)
BATCH = Batch(torch.arange(2), {"tokens": TOKENS[:, :-1], "labels": TOKENS[:, 1:]})


def blocks(kind: str) -> list[str]:
    return [textwrap.dedent(found) for found in re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)]


def test_the_first_lines_run():
    names = {"model": decoder(SETTINGS, torch.float32), "tokens": TOKENS}
    exec(blocks("python")[0], names)
    assert names["plain"].settings.feed_forward_size == 512
    assert names["output"].hidden_BTD.shape == (2, 7, 16)


def test_the_rule_of_ones_own_is_a_rule():
    names = {"ObjectiveTransform": ObjectiveTransform, "Keys": Keys, "Budget": Budget, "budget": budget}
    exec(next(block for block in blocks("python") if "class Halves" in block), names)
    rule, model, skipped = names["Halves"](NextToken().build()), decoder(SETTINGS), set()
    for step in range(12):
        model.zero_grad(set_to_none=True)
        keys = Keys(0, step, BATCH.slots_B)
        rule(model, BATCH, keys).sum.backward()
        layer = Keys.of_step(0, step).fold("halves").integer(3)
        skipped.add(layer)
        used = regions(SETTINGS, Budget(heads=2, skip=(layer,)))
        for name, parameter in model.named_parameters():
            for box in missing(Region.whole(parameter.shape), used.get(name, ())):
                assert parameter.grad is None or not parameter.grad[box.slices].any()
    assert skipped == {0, 1, 2}


def test_the_settings_and_the_config_are_ones():
    import tomllib

    tree = tomllib.loads(blocks("toml")[0])["objective"]
    assert tree.pop("use") == "resilin.nested.objective:Nested"
    assert parse_settings(Nested, tree, "nested.md") == Nested()
    for name in re.findall(
        r"^\| `(\w+)` \|", PAGE.partition("## Training")[2].partition("Good to know")[0], re.MULTILINE
    ):
        assert name in Nested.model_fields
    found = own_settings(json.loads(blocks("json")[0]))
    assert [found.at(layer).feed_forward_size for layer in range(3)] == [16, 32, 32]


def test_what_is_shown_of_chains_runs():
    import tomllib

    shown = PAGE.partition("## Chains")[2].partition("\n## ")[0]
    for heading, kind in (("model.chains", ChainSettings), ("ChainLosses", ChainLosses)):
        table = shown.partition(f"| setting of `{heading}` |")[2].partition("\n\n")[0]
        told = re.findall(r"^\| `(\w+)`", table, re.MULTILINE)
        assert told
        assert set(told) == set(kind.model_fields)
    run, grown = (tomllib.loads(found) for found in re.findall(r"```toml\n(.*?)```", shown, re.DOTALL))
    chosen = parse_settings(DecoderSettings, run["model"], "nested.md")
    assert run["objective"]["use"] == "resilin.nested.chain_objective:ChainLosses"
    assert grown["model"].pop("use") == "resilin.nested.chain_models:Expanded"
    parse_settings(Expanded, grown["model"], "nested.md")
    sizes = chosen.model_copy(update={"vocab_size": 37, "layers": 1, "max_positions": 64})
    names = {"model": decoder(sizes), "tokens": TOKENS, "Budget": Budget, "budget": budget, "extract": extract}
    budgets, text = re.findall(r"```python\n(.*?)```", shown, re.DOTALL)
    exec(budgets, names)
    assert names["output"].hidden_BTD.shape[-1] == 32
    assert names["small"].settings.chains is None
    shared = sizes.model_copy(update={"chains": ChainSettings(sizes=(2, 2, 4), share_keys=True), "kv_heads": 2})
    names |= {"model": decoder(shared), "prompt": [1, 2, 3]}
    exec(text, names)
    assert isinstance(names["token"], int)
