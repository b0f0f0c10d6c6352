"""Settings -> TOML -> settings, and overrides laid over a file."""

from __future__ import annotations

import math
import tomllib
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from resilin.config import Settings, SettingsError, component, load_settings, parse_settings, settings_to_toml
from resilin.config.load import apply_override, merge, parse_value
from resilin.config.write import tree_to_toml


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Part(Settings):
    """Base of a replaceable part."""


class Small(Part):
    """The default part."""

    rate: float = 0.5


class Wrapped(Part):
    """A part around another part, as transforms of a noun are."""

    inner: Annotated[Part, component(f"{__name__}:Small")] = Small()
    name: str = ""


class Inner(Settings):
    """A section whose keys may all be left unset."""

    limit: int | None = None
    share: float | None = None


class Everything(Settings):
    """One field of each kind a settings file can hold."""

    count: int = 1
    rate: float = 0.1
    flag: bool = False
    text: str = ""
    path: Path = Path("data")
    maybe: int | None = None
    colour: Colour = Colour.RED
    mode: Literal["fast", "slow"] = "fast"
    numbers: tuple[float, ...] = ()
    words: list[str] = Field(default_factory=list)
    table: dict[str, int] = Field(default_factory=dict)
    section: Inner = Inner()
    optional_section: Inner | None = None
    sections: list[Inner] = Field(default_factory=list)
    part: Annotated[Part, component(f"{__name__}:Small")] = Small()
    parts: list[Annotated[Part, component(f"{__name__}:Small")]] = Field(default_factory=list)


# A text of a settings file is Unicode: lone surrogates cannot be written to any file.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
INT = st.integers(-(2**63), 2**63 - 1)
FLOAT = st.floats(allow_nan=False)
INNER = st.builds(Inner, limit=st.none() | INT, share=st.none() | FLOAT)
PART = st.recursive(
    st.builds(Small, rate=FLOAT), lambda inner: st.builds(Wrapped, inner=inner, name=TEXT), max_leaves=3
)
EVERYTHING = st.builds(
    Everything,
    count=INT,
    rate=FLOAT,
    flag=st.booleans(),
    text=TEXT,
    path=st.text("abc/._ é", min_size=1, max_size=8).map(Path),
    maybe=st.none() | INT,
    colour=st.sampled_from(Colour),
    mode=st.sampled_from(["fast", "slow"]),
    numbers=st.lists(FLOAT, max_size=3).map(tuple),
    words=st.lists(TEXT, max_size=3),
    table=st.dictionaries(TEXT, INT, max_size=3),
    section=INNER,
    optional_section=st.none() | INNER,
    sections=st.lists(INNER, max_size=3),
    part=PART,
    parts=st.lists(PART, max_size=2),
)


@given(EVERYTHING)
def test_any_settings_come_back_equal_from_their_own_toml(original: Everything) -> None:
    text = settings_to_toml(original)
    read = parse_settings(Everything, tomllib.loads(text), "round trip")
    assert read == original
    assert type(read.part) is type(original.part)
    assert settings_to_toml(read) == text


@given(st.floats())
def test_any_float_comes_back_to_the_bit(value: float) -> None:
    read = parse_settings(Small, tomllib.loads(settings_to_toml(Small(rate=value))), "round trip")
    assert read.rate == value or (math.isnan(read.rate) and math.isnan(value))
    assert math.copysign(1, read.rate) == math.copysign(1, value) or math.isnan(value)


TREES = st.recursive(
    INT | FLOAT | st.booleans() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(TEXT, TREES, max_size=4))
def test_any_tree_of_tables_and_lists_comes_back_equal(tree: dict[str, Any]) -> None:
    assert tomllib.loads(tree_to_toml(tree)) == tree


def test_written_settings_name_every_key_and_every_chosen_class() -> None:
    tree = tomllib.loads(settings_to_toml(Everything(part=Wrapped(name="w"))))
    assert tree["part"]["use"].endswith(":Wrapped")
    assert tree["part"]["inner"]["use"].endswith(":Small")
    unset = {"maybe", "optional_section"}
    assert set(tree) == set(Everything.model_fields) - unset


def test_a_file_with_overrides_gives_the_overridden_values_and_keeps_the_rest(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('count = 3\ntext = "kept"\n[section]\nlimit = 7\n', encoding="utf-8")
    read = load_settings(Everything, file, ["count=4", "section.share=0.5", "part.rate=3e-4", "flag=true", "text="])
    assert (read.count, read.section, read.flag, read.text) == (4, Inner(limit=7, share=0.5), True, "")
    assert read.part == Small(rate=3e-4)


@given(INT | FLOAT | st.booleans())
def test_an_override_written_as_toml_gives_that_value(value: float | bool) -> None:
    assert (
        parse_value(tomllib.loads(tree_to_toml({"v": value})).__repr__() and tree_to_toml({"v": value})[4:-1]) == value
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1_000", 1000),
        ("true", True),
        ("cosine", "cosine"),
        ('"12"', "12"),
        ("[1, 2]", [1, 2]),
        ("{a = 1}", {"a": 1}),
        ("data/my text.txt", "data/my text.txt"),
        ("pkg.mod:Class", "pkg.mod:Class"),
        ("C:\\data", "C:\\data"),
        ("1\nother = 2", "1\nother = 2"),
    ],
)
def test_an_override_that_is_no_toml_value_is_taken_as_text(text: str, value: object) -> None:
    assert parse_value(text) == value


def test_an_override_may_create_tables_on_its_way_and_hold_equal_signs() -> None:
    tree: dict[str, Any] = {}
    apply_override(tree, "log.command=a=b=c")
    assert tree == {"log": {"command": "a=b=c"}}


def test_an_override_with_nothing_after_it_goes_back_to_the_default() -> None:
    tree: dict[str, Any] = {"count": 3, "section": {"limit": 1}}
    apply_override(tree, "count=")
    apply_override(tree, "section.limit=")
    assert parse_settings(Everything, tree, "test") == Everything()


@pytest.mark.parametrize("override", ["count", "=3", "a..b=3", ".a=1", "a.=1"])
def test_an_override_of_the_wrong_form_shows_the_right_one(override: str) -> None:
    with pytest.raises(SettingsError, match=r"key\.subkey=value, such as optimizer\.lr=3e-4"):
        apply_override({}, override)


def test_an_override_below_a_single_value_says_that_it_is_one() -> None:
    with pytest.raises(SettingsError, match=r"'count' is a single value here, it has no 'x' inside"):
        apply_override({"count": 3}, "count.x=1")


@given(
    st.dictionaries(st.sampled_from("abc"), TREES, max_size=3),
    st.dictionaries(st.sampled_from("abc"), TREES, max_size=3),
)
def test_merging_keeps_every_key_and_the_patch_wins(base: dict[str, Any], patch: dict[str, Any]) -> None:
    merged = merge(base, patch)
    assert set(merged) == set(base) | set(patch)
    assert merge(merged, patch) == merged
    assert merge(base, {}) == base
    assert merge({}, patch) == patch
    for key, value in patch.items():
        if not isinstance(value, dict):
            assert merged[key] == value


def test_merging_a_preset_that_names_another_class_drops_the_old_class_keys() -> None:
    base = {"part": {"use": "m:A", "rate": 1, "inner": {"x": 1}}, "keep": {"y": 1}}
    assert merge(base, {"part": {"use": "m:B", "name": "n"}})["part"] == {"use": "m:B", "name": "n"}
    assert merge(base, {"part": {"use": "m:A", "name": "n"}})["part"] == {
        "use": "m:A",
        "rate": 1,
        "inner": {"x": 1},
        "name": "n",
    }
    assert merge(base, {"keep": {"z": 2}})["keep"] == {"y": 1, "z": 2}


def test_settings_cannot_be_changed_after_loading() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Everything().count = 2  # type: ignore[misc]
