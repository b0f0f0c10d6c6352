"""Instructions about the form of an answer that a program can check: for data that teach a model to follow them."""

from __future__ import annotations

from typing import Any

from pydantic import model_validator

from resilin.config import Settings
from resilin.posttrain.verifiers.ifeval_checks import check_constraint
from resilin.posttrain.verifiers.verifier import VerifierError


class Constraint(Settings):
    """What is asked of the form, in words and as a check."""

    text: str
    """In words, as it stands in the prompt."""
    check: dict[str, Any]
    """{"func_name": ..., and its arguments}: see `resilin.posttrain.verifiers.ifeval_checks`."""

    @model_validator(mode="after")
    def _can_be_checked(self) -> Constraint:
        try:
            check_constraint(self.check)
        except VerifierError as error:
            raise ValueError(str(error)) from None
        return self


def _asks(text: str, func_name: str, **arguments: Any) -> Constraint:
    return Constraint(text=text, check={"func_name": func_name, **arguments})


CONSTRAINTS = (
    _asks("Do not use a single comma in your answer.", "validate_no_commas"),
    _asks("Write the whole answer in lower case, without any capital letter.", "validate_lowercase"),
    _asks("Write the whole answer in capital letters.", "validate_uppercase"),
    _asks("Answer in at most 60 words.", "validate_word_constraint", N=60, quantifier="at most"),
    _asks("Answer in at least 150 words.", "validate_word_constraint", N=150, quantifier="at least"),
    _asks("Use at most 3 sentences.", "verify_sentence_constraint", N=3, quantifier="at most"),
    _asks("Give exactly 4 bullet points, each on a line that begins with *.", "verify_bullet_points", N=4),
    _asks("Put a title in double angle brackets, such as <<my title>>.", "validate_title"),
    _asks("Give the whole answer as valid JSON, and nothing around it.", "validate_json_format"),
    _asks("Put double quotation marks around the whole answer.", "validate_quotation"),
    _asks("Highlight at least 2 phrases with asterisks, such as *this one*.", "validate_highlighted_sections", N=2),
    _asks("Leave at least 3 placeholders in square brackets, such as [name].", "validate_placeholders", N=3),
    _asks("Write 3 paragraphs, separated by a line of three asterisks: * * *", "verify_paragraph_count", N=3),
    _asks("At the end add a postscript that begins with P.S.", "verify_postscript", postscript_marker="P.S."),
    _asks(
        'End with exactly these words and nothing behind them: "Let me know how it goes."',
        "validate_end",
        end_phrase="Let me know how it goes.",
    ),
    _asks(
        "Divide the answer into at least 2 sections, headed Section 1, Section 2 and so on.",
        "validate_sections",
        N=2,
        section_splitter="Section",
    ),
    _asks("Give two different answers, separated by six asterisks: ******", "validate_two_responses"),
)
"""One for each kind of check that suits any task; lists of one's own stand in a task's `constraints`."""
