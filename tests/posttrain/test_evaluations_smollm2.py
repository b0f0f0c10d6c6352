"""A suite on a real model: SmolLM2-135M-Instruct, where its package is installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from resilin.config import parse_settings
from resilin.data.row_files import write_rows
from resilin.models.digest import weights_digest
from resilin.posttrain.evaluations.evaluation import Subject
from resilin.posttrain.evaluations.run import run_suite
from resilin.posttrain.suite import Suite
from resilin.run.open_model import open_model

pytestmark = pytest.mark.slow

CAPITALS = {"France": "Paris", "Italy": "Rome", "Germany": "Berlin", "Japan": "Tokyo", "Egypt": "Cairo"}
SHOWN = {"Spain": "Madrid", "Russia": "Moscow"}


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> Subject:
    opened = open_model(smollm2_gguf, device="cpu")
    words = opened.needed_tokenizer()
    return Subject("SmolLM2", opened.model, words, opened.end_ids, weights_digest(opened.model))


def test_a_real_model_is_measured_by_writing_and_by_choosing(smollm2: Subject, tmp_path: Path) -> None:
    write_rows(
        tmp_path / "capitals.jsonl", [{"country": c, "city": [city, city.upper()]} for c, city in CAPITALS.items()]
    )
    write_rows(tmp_path / "shown.jsonl", [{"country": c, "city": city} for c, city in SHOWN.items()])
    rows = []
    for number, (country, city) in enumerate(CAPITALS.items()):
        choices = [city, *(other for other in CAPITALS.values() if other != city)][:4]
        choices = choices[number % 4 :] + choices[: number % 4]
        rows.append({"question": f"What is the capital of {country}?", "choices": choices, "answer": city})
    write_rows(tmp_path / "choices.jsonl", rows)
    lower = {"prompt": "Write the word HELLO in lower case.", "ground_truth": {"func_name": "validate_lowercase"}}
    write_rows(tmp_path / "ifeval.jsonl", [lower])
    base = {"skill": "knowledge", "max_new_tokens": 12}
    few = {"shots": 2, "examples": [str(tmp_path / "shown.jsonl")]}
    capital = {"prompt": "The capital of {country} is", "truth": "city", "verifier": "contains", "stop": ["\n"]}
    suite = parse_settings(
        Suite,
        {
            "evaluations": [
                {"name": "plain", **base, **capital, **few, "rows": [str(tmp_path / "capitals.jsonl")], "chat": False},
                {"name": "chat", **base, **capital, "prompt": "What is the capital of {country}?", "max_new_tokens": 24,
                 "rows": [str(tmp_path / "capitals.jsonl")]},
                {"name": "likely", "skill": "knowledge", "rows": [str(tmp_path / "choices.jsonl")],
                 "use": "resilin.posttrain.evaluations.likely:LikelyChoice"},
                {"name": "letters", **base, "rows": [str(tmp_path / "choices.jsonl")],
                 "use": "resilin.posttrain.evaluations.letters:LetterAnswers"},
                {"name": "follows", "skill": "instructions", "rows": [str(tmp_path / "ifeval.jsonl")],
                 "verifier": "ifeval", "max_new_tokens": 8},
            ]
        },
        "test",
    )  # fmt: skip
    report = run_suite(suite, smollm2, "dev", tmp_path / "work", lambda name: lambda share: None)
    print(report.text())  # noqa: T201 - for those who run it by hand
    assert report.scores["plain"] >= 80  # it knows these capitals
    assert report.scores["chat"] >= 60
    assert report.scores["likely"] >= 60 > report.facts["likely"]["chance"] == 25
    assert set(report.skills) == {"knowledge", "instructions"}
    assert all(facts["rows"] in (1, 5) for facts in report.facts.values())
