"""Which verifier checks the answers to which rows: the row's `dataset` names it.

A skill is added to reinforcement, or dropped from it, by an entry in this table and rows of that name.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from resilin.config import Settings, component
from resilin.config.settings import closest
from resilin.data.prompt_rows import read_prompt
from resilin.data.row_files import Row
from resilin.posttrain.verifiers.verifier import Answer, Verifier, VerifierError

_HERE = "resilin.posttrain.verifiers"
KNOWN = {
    "gsm8k": f"{_HERE}.gsm8k:Gsm8k",
    "math": f"{_HERE}.math:Math",
    "strict_math": f"{_HERE}.math:StrictMath",
    "ifeval": f"{_HERE}.ifeval:IfEval",
    "ifeval_old": f"{_HERE}.ifeval:IfEval",
    "flan": f"{_HERE}.text_match:Flan",
    "string_matcher": f"{_HERE}.text_match:TaggedAnswer",
    "string_f1": f"{_HERE}.text_match:StringF1",
    "exact": f"{_HERE}.exact:Exact",
    "contains": f"{_HERE}.exact:Contains",
    "drop_f1": f"{_HERE}.drop:DropF1",
    "refusal": f"{_HERE}.refusal:Refusal",
    "code": f"{_HERE}.code:Code",
    "judge": f"{_HERE}.judged:Judged",
    "max_length": f"{_HERE}.length:NearLength",
    "up_to_max_length": f"{_HERE}.length:UpToLength",
}
"""Verifiers that need no entry: name in a row's `dataset` (in any case) to class."""


class VerifierTable(Settings):
    """The verifiers of a run, by the name that rows call them by."""

    verifiers: dict[str, Annotated[Verifier, component(KNOWN["gsm8k"])]] = Field(default_factory=dict)
    """Entries beside, or instead of, the known ones (`KNOWN`)."""
    known: bool = True
    """Whether rows may name known verifiers that have no entry."""

    def verifier(self, name: str) -> Verifier:
        """The verifier of that name.

        Raises:
            VerifierError: there is none; the text lists what there is.
        """
        mine = {key.lower(): value for key, value in self.verifiers.items()}
        lowered = name.lower()
        if lowered in mine:
            return mine[lowered]
        if self.known and lowered in KNOWN:
            return _known(lowered)
        names = sorted({*mine, *(KNOWN if self.known else ())})
        near = closest(name, names)
        hint = f"did you mean {near!r}?" if near else f"there are: {', '.join(names) or 'none'}"
        raise VerifierError(f"no verifier is called {name!r}; {hint}")

    def check(self, row: Mapping[str, Any], where: str = "row") -> None:
        """Refuse a row whose answers could not be checked.

        Raises:
            VerifierError: naming the place, for an unknown verifier or a label it cannot use.
            DataError: the row is no prompt with a truth.
        """
        for name, label in _parts(row, where):
            try:
                self.verifier(name).check_label(label)
            except VerifierError as error:
                raise VerifierError(f"{where}: {error}") from None

    def score(self, row: Mapping[str, Any], token_ids: Sequence[int], text: str) -> float:
        """The weighted score of one answer to a row (see `scores`)."""
        return self.scores([row], [token_ids], [text])[0]

    def scores(
        self, rows: Sequence[Mapping[str, Any]], token_ids: Sequence[Sequence[int]], texts: Sequence[str]
    ) -> list[float]:
        """Weighted scores of answers: weight times score, summed where a row names several verifiers.

        Args:
            rows: the row of each answer, with `ground_truth` and `dataset` (or verl's columns).
            token_ids: of each answer.
            texts: of each answer.
        """
        totals = [0.0] * len(rows)
        asked: dict[str, list[tuple[int, Answer]]] = {}
        for number, (row, ids, text) in enumerate(zip(rows, token_ids, texts, strict=True)):
            query = read_prompt(Row(dict(row), f"row {number}")).query
            for name, label in _parts(row, f"row {number}"):
                asked.setdefault(name, []).append((number, Answer(ids, text, label, query)))
        for name, answers in asked.items():
            verifier = self.verifier(name)
            for (number, _), score in zip(answers, verifier.scores([answer for _, answer in answers]), strict=True):
                if not 0.0 <= score <= 1.0:
                    raise VerifierError(f"verifier {name!r} gave the score {score}: it should be in [0, 1]")
                totals[number] += verifier.weight * score
        return totals


def _parts(row: Mapping[str, Any], where: str) -> list[tuple[str, Any]]:
    prompt = read_prompt(Row(dict(row), where), needs_truth=True)
    if isinstance(prompt.dataset, list):
        return list(zip(prompt.dataset, prompt.ground_truth, strict=True))
    assert prompt.dataset is not None
    return [(prompt.dataset, prompt.ground_truth)]


_built: dict[str, Verifier] = {}


def _known(name: str) -> Verifier:
    if name not in _built:
        module, _, cls = KNOWN[name].partition(":")
        _built[name] = getattr(importlib.import_module(module), cls)()
    return _built[name]


def find_verifier(name: str) -> Verifier:
    """The known verifier of that name, with its defaults.

    Raises:
        VerifierError: there is none; the text lists what there is.
    """
    return VerifierTable().verifier(name)
