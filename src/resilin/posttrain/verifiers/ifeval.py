"""Instruction following, in both forms of label.

| form | label |
|---|---|
| one constraint (Tülu 3's data) | {"func_name": "validate_no_commas", ...}, as an object or as JSON text |
| several instructions (IFEval) | [{"instruction_id": [...], "kwargs": [...]}], as a list, an object, or its text |
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Sequence
from typing import Any, Literal

from resilin.posttrain.verifiers.ifeval_checks import check_constraint
from resilin.posttrain.verifiers.ifeval_instructions import find_instruction
from resilin.posttrain.verifiers.verifier import Answer, Verifier, VerifierError, without_thinking

Asked = Callable[[str], bool]


def read_label(label: Any) -> list[Asked]:
    """What the label asks for, as functions of the answer; the label itself is never changed.

    Raises:
        VerifierError: it is neither form.
    """
    if isinstance(label, str):
        label = _parsed(label)
    if isinstance(label, list) and len(label) == 1:
        label = _parsed(label[0]) if isinstance(label[0], str) else label[0]
    if isinstance(label, dict) and "func_name" in label:
        check, arguments = check_constraint(label)
        return [lambda text: check(text, **arguments)]
    if isinstance(label, dict) and "instruction_id" in label:
        names = label["instruction_id"]
        arguments_of = label.get("kwargs") or [None] * len(names)
        if isinstance(names, str) or not names or len(names) != len(arguments_of):
            raise VerifierError("instruction_id and kwargs should be lists of one length, at least 1")
        return [_asked(name, arguments) for name, arguments in zip(names, arguments_of, strict=True)]
    raise VerifierError(
        "ifeval needs a constraint with func_name, or an object with instruction_id and kwargs, not "
        f"{json.dumps(label, default=str)[:60]}"
    )


def _asked(name: str, given: dict[str, Any] | None) -> Asked:
    follows, arguments = find_instruction(name, given)
    return lambda text: follows(text, **arguments)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        pass
    try:
        return ast.literal_eval(text)  # some data sets hold Python's way of writing lists
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise VerifierError(f"the label is neither JSON nor a list: {text[:60]!r}") from None


def loose_forms(text: str) -> list[str]:
    """A text as it is, without its first, its last or both lines, and each of these without asterisks (IFEval)."""
    lines = text.split("\n")
    forms = [text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*forms, *(form.replace("*", "") for form in forms)]


class IfEval(Verifier):
    """The share of the instructions that the answer follows; thoughts before `</think>` do not count."""

    loose: bool = False
    """IFEval's loose accuracy: an instruction counts when one of `loose_forms` follows it."""
    count: Literal["share", "all"] = "share"
    """Score the share of the instructions followed, or 1 only where all are (prompt-level accuracy)."""

    def score(self, answer: Answer) -> float:
        """In [0, 1]; an empty answer follows nothing."""
        asked = read_label(answer.label)
        said = without_thinking(answer.text)
        if not said:
            return 0.0
        forms: Sequence[str] = [form for form in loose_forms(said) if form.strip()] if self.loose else [said]
        followed = [any(follows(form) for form in forms) for follows in asked]
        return float(all(followed)) if self.count == "all" else sum(followed) / len(followed)

    def check_label(self, label: Any) -> None:
        """The label is of one of the two forms and names known instructions with all they need."""
        read_label(label)
