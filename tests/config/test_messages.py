"""Every message names the key, the value, what was expected, and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, model_validator

from resilin.config import Settings, SettingsError, component, load_settings, parse_settings, use_path


class Schedule(Settings):
    """Base of a replaceable part."""


class Cosine(Schedule):
    """A part with a checked range."""

    warmup_steps: int = Field(default=10, ge=0)


class Odd(Schedule):
    """A part that checks two keys together."""

    heads: int = 4
    hidden_size: int = 64

    @model_validator(mode="after")
    def _divisible(self) -> Odd:
        if self.hidden_size % self.heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) is not divisible by heads ({self.heads}): use 96 or 108"
            )
        return self


class Optim(Settings):
    """A section."""

    lr: float = Field(default=1e-3, gt=0)
    kind: Literal["adamw", "muon"] = "adamw"
    schedule: Annotated[Schedule, component(f"{__name__}:Cosine")] = Cosine()


class Top(Settings):
    """The whole."""

    steps: int
    optimizer: Optim = Optim()
    parts: list[Annotated[Schedule, component(f"{__name__}:Cosine")]] = Field(default_factory=list)


def message(tree: dict[str, Any], origin: str = "run.toml") -> str:
    with pytest.raises(SettingsError) as caught:
        parse_settings(Top, {"steps": 1, **tree}, origin)
    return str(caught.value)


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"steps": "ten"}, ["run.toml", "steps", '"ten"', "valid integer"]),
        ({"optimizer": {"lr": -1.0}}, ["optimizer.lr = -1.0", "greater than 0"]),
        ({"optimizer": {"kind": "adam"}}, ["optimizer.kind", '"adam"', "'adamw' or 'muon'", "did you mean 'adamw'?"]),
        (
            {"optimizer": {"schedule": {"warmup_steps": -3}}},
            ["optimizer.schedule.warmup_steps = -3", "greater than or equal to 0"],
        ),
        ({"parts": [{}, {"warmup_steps": 1.5}]}, ["parts.1.warmup_steps = 1.5", "integer"]),
        ({"optimizer": 3}, ["optimizer = 3"]),
        ({"optimizer": {"schedule": "cosine"}}, ["optimizer.schedule", '"cosine"', "table of settings"]),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_what_was_expected(tree: dict[str, Any], says: list[str]) -> None:
    text = message(tree)
    for part in says:
        assert part in text


def test_a_missing_key_says_how_to_set_it() -> None:
    with pytest.raises(
        SettingsError, match=r"steps: missing; set it in the file or as steps=\.\.\. on the command line"
    ):
        parse_settings(Top, {}, "run.toml")


@pytest.mark.parametrize(
    ("tree", "path", "meant"),
    [
        ({"step": 1}, "step", "steps"),
        ({"optimiser": {}}, "optimiser", "optimizer"),
        ({"optimizer": {"learning_rate": 1}}, "optimizer.learning_rate", None),
        ({"optimizer": {"Lr": 1}}, "optimizer.Lr", "lr"),
        ({"optimizer": {"schedule": {"warm_up_steps": 1}}}, "optimizer.schedule.warm_up_steps", "warmup_steps"),
        ({"parts": [{"warmup_step": 1}]}, "parts.0.warmup_step", "warmup_steps"),
    ],
)
def test_a_misspelt_key_names_the_likeliest_or_all_known_keys(
    tree: dict[str, Any], path: str, meant: str | None
) -> None:
    text = message(tree)
    assert f"{path}: unknown key" in text
    assert (f"did you mean {meant!r}?" if meant else "known keys here: lr, kind, schedule") in text


def test_all_wrong_keys_are_told_at_once() -> None:
    text = message({"stepz": 1, "sead": 2, "optimizer": {"lr": 0, "kind": "x"}})
    for part in ("4 settings", "stepz", "sead", "optimizer.lr = 0", "optimizer.kind"):
        assert part in text


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=10))
def test_any_unknown_key_is_named_in_the_message(key: str) -> None:
    if key in Top.model_fields:
        return
    assert f"unknown key {key!r}" in message({key: 1})


def test_a_check_of_two_keys_together_passes_its_own_words_on() -> None:
    text = message({"optimizer": {"schedule": {"use": use_path(Odd), "hidden_size": 100, "heads": 12}}})
    assert "optimizer.schedule: hidden_size (100) is not divisible by heads (12): use 96 or 108" in text


@pytest.mark.parametrize(
    ("use", "says"),
    [
        ("Cosine", ["'Cosine'", "'package.module:Class'"]),
        (":Cosine", ["':Cosine'", "'package.module:Class'"]),
        ("module:", ["'module:'", "'package.module:Class'"]),
        (".schedules:Cosine", ["'.schedules:Cosine'", "'package.module:Class'"]),
        (7, ["7", "'package.module:Class'"]),
        ("no_such_module_here:Cosine", ["no_such_module_here", "cannot be imported", "PYTHONPATH"]),
        (f"{__name__}:Cosin", [f"'{__name__}:Cosin'", "subclass of Schedule", "Cosine", "did you mean 'Cosine'?"]),
        (f"{__name__}:Optim", ["subclass of Schedule", "Cosine, Odd"]),
        (f"{__name__}:message", ["subclass of Schedule"]),
    ],
)
def test_a_wrong_use_path_says_what_is_wrong_with_it(use: object, says: list[str]) -> None:
    text = message({"optimizer": {"schedule": {"use": use}}})
    assert "optimizer.schedule" in text
    for part in says:
        assert part in text


def test_a_module_that_fails_while_it_is_imported_gives_its_own_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "broken_syntax_part.py").write_text("def x(:\n")
    (tmp_path / "broken_value_part.py").write_text("raise RuntimeError('no licence file')\n")
    assert "SyntaxError" in message({"optimizer": {"schedule": {"use": "broken_syntax_part:A"}}})
    text = message({"optimizer": {"schedule": {"use": "broken_value_part:A"}}})
    assert "RuntimeError" in text
    assert "no licence file" in text


def test_a_users_own_class_is_used_by_its_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_parts.py").write_text(
        f"from {__name__} import Schedule\nclass Mine(Schedule):\n    depth: int = 3\n"
    )
    read = parse_settings(Top, {"steps": 1, "optimizer": {"schedule": {"use": "my_parts:Mine", "depth": 5}}}, "x")
    assert read.optimizer.schedule.model_dump() == {"depth": 5}


def test_a_broken_or_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nowhere\.toml: no such settings file"):
        load_settings(Top, tmp_path / "nowhere.toml")
    with pytest.raises(SettingsError, match="is a folder"):
        load_settings(Top, tmp_path)
    broken = tmp_path / "broken.toml"
    broken.write_text("steps = 1\nlr = = 3\n")
    with pytest.raises(SettingsError, match=r"broken\.toml: not valid TOML: .*line 2"):
        load_settings(Top, broken)
    broken.write_bytes(b"steps = 1\n# \xff\n")
    with pytest.raises(SettingsError, match=r"broken\.toml: not valid TOML"):
        load_settings(Top, broken)


def test_the_message_of_a_file_with_overrides_says_where_settings_came_from(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("steps = 1\n")
    with pytest.raises(SettingsError, match=r"run\.toml: 1 setting cannot be used"):
        load_settings(Top, file, ["steps=none"])
    with pytest.raises(SettingsError, match="command line: 1 setting cannot be used"):
        load_settings(Top, None)
