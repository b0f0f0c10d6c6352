"""What a post-trained model is measured by: which evaluations steer the work, and which are looked at once.

A suite is a table. Development evaluations may be run as often as one likes; every change of the data is reported by
skill, so that a gain in one is seen beside a loss in another. Unseen evaluations tell how far the choices carry over:
they are looked at once, when all choices are made. The folder of a piece of work remembers that look.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from resilin.config import Settings
from resilin.config.settings import closest
from resilin.posttrain.evaluations.evaluation import Evaluation, Part, SuiteError
from resilin.posttrain.evaluations.several import AnyEvaluation

_LOOK = "unseen.json"


def _line(name: str, skill: str, part: Part, shots: int, thought: bool, metric: str, *tasks: str) -> Evaluation:
    return Evaluation(
        name=name, skill=skill, part=part, shots=shots, chain_of_thought=thought, metric=metric, tasks=tasks
    )


_SAFETY = ("XSTest", "HarmBench", "DoAnythingNow", "JailbreakTrigger", "WildJailbreakTest", "WildGuardTest")

TULU3 = (
    _line("MMLU", "knowledge", "dev", 0, True, "accuracy"),
    _line("PopQA", "knowledge", "dev", 15, False, "accuracy"),
    _line("TruthfulQA", "knowledge", "dev", 6, False, "multiple choice, several true (MC2)"),
    _line("BBH", "reasoning", "dev", 3, True, "accuracy"),
    _line("DROP", "reasoning", "dev", 3, False, "F1"),
    _line("MATH", "mathematics", "dev", 4, True, "flexible match"),
    _line("GSM8K", "mathematics", "dev", 8, True, "accuracy"),
    _line("HumanEval", "code", "dev", 0, False, "pass@10"),
    _line("HumanEval+", "code", "dev", 0, False, "pass@10"),
    _line("IFEval", "instruction following", "dev", 0, False, "prompt-level, loose"),
    _line("AlpacaEval 2", "instruction following", "dev", 0, False, "length-controlled win rate"),
    _line("Safety", "safety", "dev", 0, False, "mean of six tasks", *_SAFETY),
    _line("MMLU-Pro", "knowledge", "unseen", 0, True, "accuracy"),
    _line("GPQA", "knowledge", "unseen", 0, True, "accuracy"),
    _line("AGIEval English", "reasoning", "unseen", 0, True, "accuracy"),
    _line("DeepMind Mathematics", "mathematics", "unseen", 0, True, "accuracy"),
    _line("BigCodeBench", "code", "unseen", 0, False, "pass@10"),
)
"""The suite of Tülu 3 (Lambert et al. 2024, section 7)."""


class Report(Settings):
    """Results of one part of a suite.

    Raises:
        SuiteError: from `Suite.report`, for results that are missing, unknown or no numbers.
    """

    model: str
    """Of what."""
    part: Part
    """Which part."""
    scores: dict[str, float]
    """By evaluation, in the suite's order."""
    skills: dict[str, float]
    """Means over each skill's evaluations."""
    average: float
    """Mean over all evaluations of the part."""
    weights: str = ""
    """A digest of the model's weights, where they were at hand."""
    measured: dict[str, str] = Field(default_factory=dict)
    """By evaluation, a digest of how it was measured: rows, examples and settings."""
    facts: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """By evaluation, what else there is to know: counts, errors, further scores."""

    def text(self, before: Report | None = None) -> str:
        """The report as a table with standard errors; with `before`, what changed since.

        A change is marked where the two were not measured alike (other rows, examples or settings). Under the table
        stands what makes scores smaller than the model: answers that were cut, or in which no answer was found.
        """
        rows: list[tuple[str, float, float | None, bool]] = []
        groups = (
            ("", self.scores, before.scores if before is not None else {}),
            ("skill: ", self.skills, before.skills if before is not None else {}),
            ("", {"average": self.average}, {"average": before.average} if before is not None else {}),
        )
        other = self._measured_otherwise(before)
        for prefix, values, old in groups:
            marked = {*other, *(["average"] if other else [])} if not prefix else set()
            rows += [(prefix + name, value, old.get(name), name in marked) for name, value in values.items()]
        width = max(len(name) for name, *_ in rows)
        spreads = {name: facts.get("standard_error") for name, facts in self.facts.items()}
        shown = any(spread is not None for spread in spreads.values())
        lines = [f"{self.model}, {self.part} evaluations"]
        for name, value, was, mark in rows:
            spread = spreads.get(name)
            error = "" if not shown else f" ± {spread:4.1f}" if spread is not None else " " * 7
            change = "" if was is None else f"  {value - was:+6.1f}{' *' if mark else ''}"
            lines.append(f"  {name:<{width}}  {value:6.1f}{error}{change}".rstrip())
        if any(was is not None and mark for _, _, was, mark in rows):
            lines.append("  * measured on other rows or with other settings than before")
        return "\n".join([*lines, *self._notes()])

    def _notes(self) -> list[str]:
        """What makes scores smaller than the model, by evaluation."""
        told = (
            ("cut_answers", "answers", "answers were cut for want of room (max_new_tokens)"),
            ("unmatched_answers", "answers", "answers had no match of answer_patterns"),
            ("prompts_with_fewer_shots", "rows", "prompts left out examples for want of room"),
            ("judgements_without_verdict", "judgements", "judgements gave no verdict"),
        )
        notes = []
        for name, facts in self.facts.items():
            parts = {name: facts, **{f"{name}, {task}": one for task, one in facts.get("tasks", {}).items()}}
            for place, one in parts.items():
                for key, of, what in told:
                    if one.get(key):
                        notes.append(f"  {place}: {one[key]} of {one.get(of, '?')} {what}")
        return notes

    def _measured_otherwise(self, before: Report | None) -> list[str]:
        if before is None:
            return []
        if {*before.scores} != {*self.scores}:
            return [*self.scores]
        return [n for n in self.scores if n in self.measured and before.measured.get(n) != self.measured[n]]


class Suite(Settings):
    """The evaluations of a piece of work."""

    evaluations: Annotated[tuple[AnyEvaluation, ...], Field(min_length=1)] = TULU3
    """Its lines."""

    @model_validator(mode="after")
    def _names_differ(self) -> Suite:
        names = [line.name for line in self.evaluations]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"evaluations should have different names; twice: {', '.join(twice)}")
        return self

    def of(self, part: Part) -> list[Evaluation]:
        """The lines of one part."""
        return [line for line in self.evaluations if line.part == part]

    def report(self, model: str, results: Mapping[str, Any], part: Part = "dev", **known: Any) -> Report:
        """Scores by evaluation and skill, and their average.

        Args:
            model: of what.
            results: a number (from 0 to 100) for each evaluation of the part; for one of several tasks, a table of
                theirs is averaged.
            part: which part.
            known: further fields of the report.

        Raises:
            SuiteError: naming what is missing, unknown or no number; results of the other part are refused.
        """
        lines = self.of(part)
        names = [line.name for line in lines]
        unknown = [name for name in results if name not in names]
        if unknown:
            near = closest(unknown[0], names)
            hint = f"did you mean {near!r}?" if near else f"its {part} evaluations are: {', '.join(names)}"
            raise SuiteError(f"{unknown[0]!r} is no {part} evaluation of this suite; {hint}")
        missing = [name for name in names if name not in results]
        if missing or not names:
            raise SuiteError(f"no result for: {', '.join(missing) or f'{part} has no evaluations'}")
        scores = {line.name: _score(line, results[line.name]) for line in lines}
        skills: dict[str, list[float]] = {}
        for line in lines:
            skills.setdefault(line.skill, []).append(scores[line.name])
        means = {skill: sum(values) / len(values) for skill, values in skills.items()}
        average = sum(scores.values()) / len(scores)
        return Report(model=model, part=part, scores=scores, skills=means, average=average, **known)

    def looked_at(self, folder: Path, model: str, weights: str = "") -> Report | None:
        """The report of an earlier look at the unseen part by this piece of work; None where there was none.

        Raises:
            SuiteError: the look was at another model, or at evaluations that are not this suite's.
        """
        kept = folder / _LOOK
        if not kept.is_file():
            return None
        seen = _read_look(kept)
        report: Report = seen["report"]
        names = [line.name for line in self.of("unseen")]
        if (report.model, report.weights) != (model, weights) or [*report.scores] != names:
            raise _second_look(kept, seen)
        return report

    def look(self, folder: Path, model: str, results: Mapping[str, Any], **known: Any) -> Report:
        """The report on the unseen part, once for a piece of work.

        The look is written to `unseen.json` in the folder. Asking again with the same model and results gives the same
        report; with others it is refused.

        Raises:
            SuiteError: the folder remembers a look at another model or other results.
        """
        report = self.report(model, results, "unseen", **known)
        kept = folder / _LOOK
        if kept.is_file():
            seen = _read_look(kept)
            if seen["report"] == report:
                return report
            raise _second_look(kept, seen)
        folder.mkdir(parents=True, exist_ok=True)
        now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        tree = {"time": now, "report": json.loads(report.model_dump_json())}
        with kept.open("x", encoding="utf-8") as stream:
            stream.write(json.dumps(tree, indent=2, ensure_ascii=False) + "\n")
        return report


def _read_look(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        return {"time": str(tree["time"]), "report": Report.model_validate(tree["report"])}
    except (ValueError, KeyError, TypeError):
        raise SuiteError(f"{path}: should hold the look at the unseen evaluations, and cannot be read") from None


def _second_look(kept: Path, seen: Mapping[str, Any]) -> SuiteError:
    return SuiteError(
        f"{kept}: the unseen evaluations were looked at on {seen['time']}, of {seen['report'].model!r}; choices made "
        "after that look would be made on them. Use the dev evaluations, or begin another piece of work in another "
        "folder and say in its report that the unseen part is not unseen"
    )


def read_report(path: Path) -> Report:
    """A report from its file.

    Raises:
        SuiteError: it cannot be read, or is none.
    """
    try:
        return Report.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SuiteError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValidationError, UnicodeDecodeError):
        raise SuiteError(f"{path}: is no report of a suite (a file that `resilin evaluate --suite` writes)") from None


def _score(line: Evaluation, value: Any) -> float:
    if isinstance(value, Mapping) and line.tasks:
        wrong: Sequence[str] = sorted({*value} ^ {*line.tasks})
        if wrong:
            raise SuiteError(
                f"{line.name} is the mean of {', '.join(line.tasks)}; missing or unknown: {', '.join(wrong)}"
            )
        return sum(_number(f"{line.name}, {task}", value[task]) for task in line.tasks) / len(line.tasks)
    return _number(line.name, value)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise SuiteError(f"{name}: the result should be a number from 0 to 100, not {value!r}")
    if not 0 <= value <= 100:
        raise SuiteError(f"{name}: the result {value} is not between 0 and 100")
    return float(value)
