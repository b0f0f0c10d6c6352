"""What a recipe file may say, and what its cells come to."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from resilin.config import SettingsError, parse_settings
from resilin.recipes.cells import cells, hashed, run_hash
from resilin.recipes.find import recipe_folder, recipes_folder, slugs
from resilin.recipes.recipe import Recipe, load_recipe

MINIMAL = """
title = "t"
claim = "c"
paper = { title = "p", year = 2023, arxiv = "2309.14322" }
[settings]
source = { use = "resilin.recipes.standard_library:StandardLibrary", bytes = 20000, sequence_length = 8 }
model = { hidden_size = 16, layers = 1, heads = 2 }
train.steps = 1
optimizer.lr = 0.001
[arms.baseline]
[arms.method]
model.qk_norm = "layer"
[presets.cpu]
seeds = [0, 1]
"""


def recipe(text: str = "") -> Recipe:
    return parse_settings(Recipe, tomllib.loads(MINIMAL + text), "recipe.toml")


def test_without_grids_every_arm_is_run_with_every_seed():
    found = [(c.grid, c.arm, c.seed) for c in cells(recipe(), "cpu")]
    assert found == [("main", arm, seed) for arm in ("baseline", "method") for seed in (0, 1)]


def test_later_patches_win_in_the_documented_order():
    text = """
settings.train.steps = 2
arms.method.train.steps = 5
[presets.cpu.grids.a]
arms = ["method"]
settings.train.steps = 3
axes.batch = { key = "train.batch_size", values = [4, 8] }
axes.size.points = { small.train.steps = 6, large = { train.steps = 7, train.batch_size = 2 } }
[presets.cpu.grids.b]
settings.train.steps = 3
[presets.paper]
"""
    of = {(c.grid, c.arm, *c.axes.values()): c.settings for c in cells(recipe(text), "cpu", seeds=(9,))}
    assert of["a", "method", 4, "small"].train.steps == 6
    assert of["a", "method", 4, "small"].train.batch_size == 4
    assert of["a", "method", 4, "large"].train.batch_size == 2  # the axis written later
    assert of["b", "baseline"].train.steps == 3
    assert of["b", "method"].train.steps == 5
    assert {s.seed for s in of.values()} == {9}
    assert {c.settings.train.steps for c in cells(recipe(text), "paper")} == {1}
    final = list(cells(recipe(text), "cpu", overrides=["train.steps=11"]))
    assert {c.settings.train.steps for c in final} == {11}


def test_cells_that_ask_for_the_same_share_a_hash_and_others_do_not():
    text = """
[presets.cpu.grids.a]
axes.lr = { key = "optimizer.lr", values = [0.001, 0.01] }
[presets.cpu.grids.b]
"""
    found = list(cells(recipe(text), "cpu"))
    hashes = hashed(found, lambda settings: "digest", {"torch": "2"})
    by_hash: dict[str, list[str]] = {}
    for cell, name in zip(found, hashes, strict=True):
        by_hash.setdefault(name, []).append(f"{cell.grid} {cell.arm} {cell.seed}")
    assert len(by_hash) == 8
    shared = sorted(places for places in by_hash.values() if len(places) > 1)
    assert shared == [[f"a {arm} {seed}", f"b {arm} {seed}"] for arm in ("baseline", "method") for seed in (0, 1)]


def test_a_hash_covers_what_decides_the_numbers_and_nothing_else():
    asked = {"seed": 0, "train": {"steps": 1}, "log": {"live": True}, "checkpoint": {"every": 5}, "name": "x"}
    base = run_hash(asked, "data", {"torch": "2"})
    assert run_hash({**asked, "log": {}, "checkpoint": {}, "name": "y"}, "data", {"torch": "2"}) == base
    others = [
        run_hash({**asked, "seed": 1}, "data", {"torch": "2"}),
        run_hash({**asked, "train": {"steps": 2}}, "data", {"torch": "2"}),
        run_hash(asked, "other data", {"torch": "2"}),
        run_hash(asked, "data", {"torch": "3"}),
    ]
    assert len({base, *others}) == 5


def test_the_data_of_equal_sources_is_read_once():
    asked = []
    hashed(list(cells(recipe(), "cpu")), lambda settings: asked.append(settings) or "digest", {})
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('processses = 2', "did you mean 'processes'"),
        ('grids.g.arms = ["methd"]', "did you mean 'method'"),
        ('arms.methd = {}', "did you mean 'method'"),
        ('grids.g.axes.lr = { key = "optimizer.lr" }', "either key and values"),
        ('grids.g.axes.lr = { values = [1] }', "either key and values"),
        ('grids.g.axes.lr = { key = "a", values = [1], points = { a = {} } }', "either key and values"),
        ('grids.g.axes.lr = { key = "a", values = [1, 1] }', "listed twice"),
        ('needs = "gpu"', "presets.cpu.needs"),
        ('seeds = []', "presets.cpu.seeds"),
    ],
)  # fmt: skip
def test_a_recipe_that_cannot_be_used_is_refused_by_name(text, message):
    tree = tomllib.loads(
        MINIMAL.replace("seeds = [0, 1]", text if text.startswith("seeds") else f"seeds = [0]\n{text}")
    )
    with pytest.raises(SettingsError, match=message):
        parse_settings(Recipe, tree, "recipe.toml")


def test_settings_of_a_cell_are_checked_before_any_run_and_the_cell_is_named():
    text = "\n[presets.cpu.grids.wide]\nsettings.model.hiden_size = 3"
    with pytest.raises(SettingsError, match="grid wide, arm baseline") as caught:
        list(cells(recipe(text), "cpu"))
    assert "hidden_size" in str(caught.value)


def test_an_unknown_recipe_suggests_the_nearest(tmp_path: Path):
    for name in ("one-epoch", "small-scale-proxies"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.toml").write_text(MINIMAL)
    assert slugs(tmp_path) == ["one-epoch", "small-scale-proxies"]
    with pytest.raises(SettingsError, match="did you mean 'small-scale-proxies'"):
        recipe_folder(tmp_path, "small-scale-proxy")
    with pytest.raises(SettingsError, match="one-epoch, small-scale-proxies"):
        recipe_folder(tmp_path, "x")


def test_recipes_are_found_from_a_folder_below_them(tmp_path: Path):
    (tmp_path / "recipes" / "a").mkdir(parents=True)
    (tmp_path / "recipes" / "a" / "recipe.toml").write_text(MINIMAL)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    assert recipes_folder(start=tmp_path / "deep" / "er") == tmp_path.resolve() / "recipes"
    with pytest.raises(SettingsError, match="holds no recipe"):
        recipes_folder(tmp_path / "deep")


RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("slug", slugs(RECIPES))
def test_every_committed_recipe_resolves_at_every_preset(slug: str):
    loaded = load_recipe(RECIPES / slug)
    assert set(loaded.presets) == {"cpu", "gpu", *([] if loaded.paper.unpublished else ["paper"])}
    for preset in loaded.presets:
        found = list(cells(loaded, preset))
        assert found
        assert len({c.seed for c in found}) >= (3 if preset == "cpu" else 1)
