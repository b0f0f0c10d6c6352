"""Training rows that hold test instances: found, counted and left out.

Only what users say is compared. A test instance is one or several fields of a row (a passage and its question, say).
Its score against one user turn is, by method:

| method | score |
|---|---|
| `ngram` | the share of the instance's words that lie in an n-gram both have, averaged over its fields |
| `exact` | 1 where every field occurs word for word |
| `embedding` | the cosine of sentence embeddings, fields joined by spaces |

A row is left out if any of its turns scores above the threshold against any instance (Tülu 3, Lambert et al. 2024,
section 3.2: 8-grams, threshold 0.5). All copies of a row share its fate, whatever their number: there is no limit of
hits. The result does not depend on the order of rows or instances, and running again on what is left removes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from resilin.data.errors import DataError
from resilin.data.row_files import Row, read_rows, write_rows
from resilin.inference.sentence_encoder import Encoder, best_cosines
from resilin.posttrain.ngram_index import NgramIndex, phrase_fields, score_fields

Method = Literal["ngram", "exact", "embedding"]
_CHUNK_WORDS = 20_000_000
_BYTES_A_WORD = 6


@dataclass(frozen=True, slots=True)
class TestSet:
    """Instances that training must not have seen.

    Attributes:
        name: for the report.
        instances: the texts of each instance's fields.
        skipped: rows without any text in their fields.
    """

    __test__ = False  # no test, whatever its name begins with

    name: str
    instances: tuple[tuple[str, ...], ...]
    skipped: int = 0


@dataclass(frozen=True, slots=True)
class Match:
    """Why a row was left out.

    Attributes:
        row: its number.
        test: the test set.
        instance: its number in the set.
        score: above the threshold.
    """

    row: int
    test: str
    instance: int
    score: float


@dataclass(slots=True)
class Decontaminated:
    """What was found.

    Attributes:
        keep: for each row, whether it is clean.
        matches: for each row that is not, its best match (of equal ones the first test set and instance).
        contamination: source of training rows -> test set -> share of its instances that scored above the threshold.
        tests: names of the test sets, in order.
    """

    keep: list[bool]
    matches: list[Match] = field(default_factory=list)
    contamination: dict[str, dict[str, float]] = field(default_factory=dict)
    tests: list[str] = field(default_factory=list)

    @property
    def removed(self) -> int:
        """Rows that are not clean."""
        return len(self.keep) - sum(self.keep)

    def table(self) -> str:
        """The shares as tab-separated text, a line for each source."""
        lines = ["\t".join(["", *self.tests])]
        for source, shares in self.contamination.items():
            lines.append("\t".join([source, *(f"{shares[test]:.4f}" for test in self.tests)]))
        return "\n".join(lines) + "\n"


def user_turns(row: Row, key: str | None = None) -> list[str]:
    """What users say in a row: of conversations, prompts and preference rows; or the text under a key.

    Raises:
        DataError: with file and line, for a row without any of these.
    """
    value = row.value
    if key is not None:
        if not isinstance(value.get(key), str):
            raise row.error(f"{key!r} should hold text; columns here: {', '.join(sorted(value))}")
        return [value[key]]
    turns: list[str] = []
    found = False
    for name in ("messages", "prompt", "chosen", "rejected"):
        said = value.get(name)
        if isinstance(said, str) and name == "prompt":
            turns.append(said)
            found = True
        elif isinstance(said, list):
            found = True
            for message in said:
                if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                    raise row.error(f"{name} should be a list of messages with role and content")
                if message["role"] == "user" and isinstance(message.get("content"), str):
                    turns.append(message["content"])
    if not found:
        raise row.error(f"no messages or prompt; columns here: {', '.join(sorted(value)) or 'none'}; name one with key")
    return list(dict.fromkeys(turns))


def read_test_set(path: str, fields: Sequence[str], name: str | None = None) -> TestSet:
    """A test set from files of rows.

    Raises:
        DataError: with file and line, for a row that lacks a field, or holds no text in it.
    """
    instances, skipped = [], 0
    for row in read_rows([path]):
        texts = []
        for key in fields:
            if key not in row.value:
                raise row.error(f"no field {key!r}; columns here: {', '.join(sorted(row.value)) or 'none'}")
            said = row.value[key]
            if said is not None and not isinstance(said, str):
                raise row.error(f"{key!r} should hold text, not {str(said)[:40]!r}")
            texts.append(said or "")
        if any(text.strip() for text in texts):
            instances.append(tuple(texts))
        else:
            skipped += 1
    if not instances:
        raise DataError(f"{path}: no instance has text in {', '.join(fields)}")
    return TestSet(name or Path(path).stem, tuple(instances), skipped)


def _chunks(turns: Sequence[str]) -> Iterator[tuple[int, Sequence[str]]]:
    """The turns in stretches whose index fits in memory: (number of the first, turns)."""
    start = size = 0
    for number, turn in enumerate(turns):
        size += len(turn) // _BYTES_A_WORD + 1
        if size > _CHUNK_WORDS:
            yield start, turns[start : number + 1]
            start, size = number + 1, 0
    if start < len(turns):
        yield start, turns[start:]


def _scores(
    turns: Sequence[str], tests: Sequence[TestSet], method: Method, n: int, threshold: float, encoder: Encoder | None
) -> Iterator[tuple[int, int, int, float]]:
    """(turn, test set, instance, score) wherever the score is above the threshold."""
    if method == "embedding":
        if encoder is None:
            raise DataError("comparing embeddings needs a sentence encoder: name one")
        for number, test in enumerate(tests):
            asked = [" ".join(part for part in parts if part) for parts in test.instances]
            for turn, instance, score in best_cosines(encoder, turns, asked, threshold):
                yield turn, number, instance, score
        return
    scored = score_fields if method == "ngram" else phrase_fields
    for start, chunk in _chunks(turns):
        index = NgramIndex(chunk, n)
        for number, test in enumerate(tests):
            for instance, parts in enumerate(test.instances):
                for turn, score in scored(parts, index).items():
                    if score > threshold:
                        yield start + turn, number, instance, score


def decontaminate(
    rows: Sequence[Row],
    tests: Sequence[TestSet],
    *,
    method: Method = "ngram",
    n: int = 8,
    threshold: float = 0.5,
    key: str | None = None,
    encoder: Encoder | None = None,
) -> Decontaminated:
    """Find the training rows that hold test instances.

    Args:
        rows: training rows; their column `source`, where there is one, groups them in the report.
        tests: test sets, of different names.
        method: how a turn is compared with an instance.
        n: words of an n-gram.
        threshold: scores above it (not at it) are matches.
        key: a text column to compare instead of what users say.
        encoder: for `embedding`.

    Raises:
        DataError: with file and line, for a row without user turns; for test sets that share a name.
    """
    names = [test.name for test in tests]
    if len(set(names)) < len(names) or not names:
        raise DataError(f"test sets should be at least one and have different names, not: {', '.join(names) or 'none'}")
    numbers: dict[str, int] = {}
    rows_of: list[list[int]] = []  # equal turns are compared once, and all rows that have them share the result
    for number, row in enumerate(rows):
        for turn in user_turns(row, key):
            place = numbers.setdefault(turn, len(numbers))
            if place == len(rows_of):
                rows_of.append([])
            rows_of[place].append(number)
    sources = [str(row.value.get("source") or "all rows") for row in rows]
    hit: dict[tuple[str, int], set[int]] = {}
    best: dict[int, tuple[float, int, int]] = {}
    for place, test_number, instance, score in _scores(list(numbers), tests, method, n, threshold, encoder):
        for row_number in rows_of[place]:
            hit.setdefault((sources[row_number], test_number), set()).add(instance)
            found = (score, -test_number, -instance)
            best[row_number] = max(best.get(row_number, found), found)
    shares = {
        source: {
            test.name: len(hit.get((source, number), ())) / len(test.instances) for number, test in enumerate(tests)
        }
        for source in sorted(set(sources))
    }
    matches = [Match(row, names[-test], -instance, score) for row, (score, test, instance) in sorted(best.items())]
    return Decontaminated([number not in best for number in range(len(rows))], matches, shares, names)


def write_decontaminated(
    found: Decontaminated,
    rows: Sequence[Row],
    tests: Sequence[TestSet],
    folder: Path,
    form: Literal["jsonl", "parquet"] = "jsonl",
) -> dict[str, int]:
    """Write `contamination_results.tsv`, `matches.jsonl` and `decontaminated.jsonl` (or .parquet); returns the numbers
    of rows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "contamination_results.tsv").write_text(found.table(), encoding="utf-8")
    by_name = {test.name: test for test in tests}
    write_rows(
        folder / "matches.jsonl",
        (
            {
                "row": rows[match.row].where,
                "test": match.test,
                "instance": match.instance,
                "score": round(match.score, 6),
                "text": " | ".join(by_name[match.test].instances[match.instance])[:500],
            }
            for match in found.matches
        ),
    )
    clean = [row.value for row, keep in zip(rows, found.keep, strict=True) if keep]
    write_rows(folder / f"decontaminated.{form}", clean)
    return {"rows": len(rows), "removed": found.removed, "kept": len(clean)}
