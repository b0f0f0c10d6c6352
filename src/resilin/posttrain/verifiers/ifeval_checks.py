"""The checks of instruction following as functions of one text, in the form in which Tülu 3's data name them.

A row's constraint is {"func_name": ..., further arguments}; the functions here are those names. They compare letters
and words as the data were made: keywords by substring, numbers exactly.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from resilin.posttrain.verifiers.verifier import VerifierError

Check = Callable[..., bool]
SENTENCE_END = re.compile(r"(?<!\w\.\w.)(?<![A-Z][a-z]\.)(?<=\.|\?|!)\s")


def detect_language(text: str) -> str | None:
    """The ISO 639-1 code of a text's language, always the same for the same text; None where there is none to tell.

    Raises:
        VerifierError: langdetect is not installed.
    """
    try:
        import langdetect
        from langdetect.lang_detect_exception import LangDetectException
    except ImportError:
        raise VerifierError("telling languages apart needs langdetect: pip install 'resilin[language]'") from None
    langdetect.DetectorFactory.seed = 0  # it draws at random otherwise
    try:
        return str(langdetect.detect(text))
    except LangDetectException:
        return None


def _about(count: int, wanted: int, quantifier: str, tolerance: int) -> bool:
    if quantifier == "at least":
        return count >= wanted
    if quantifier == "at most":
        return count <= wanted
    return quantifier == "around" and abs(count - wanted) <= tolerance


def _tenth(wanted: int) -> int:
    return max(round(wanted * 0.1), 1)


def keywords(text: str, keyword_list: Sequence[str]) -> bool:
    """All keywords occur, in any case."""
    return all(word.lower() in text.lower() for word in keyword_list)


def keyword_frequency(text: str, word: str, N: int) -> bool:
    """The word occurs exactly N times, as a whole word, in any case."""
    return re.findall(r"\b\w+\b", text.lower()).count(word.lower()) == N


def forbidden_words(text: str, forbidden_words: Sequence[str]) -> bool:
    """None of the words occurs, not even inside another."""
    return not any(word.lower() in text.lower() for word in forbidden_words)


def letter_frequency(text: str, letter: str, N: int) -> bool:
    """The letter occurs exactly N times, in this case."""
    if len(letter) != 1:
        raise VerifierError(f"letter should be one character, not {letter!r}")
    return text.count(letter) == N


def response_language(text: str, language: str) -> bool:
    """The text is in the language of this code."""
    return detect_language(text) == language


def paragraph_count(text: str, N: int) -> bool:
    """N paragraphs, none empty, separated by `* * *`."""
    plain = "\n".join(line.strip() for line in text.splitlines()).strip()
    paragraphs = plain.split("* * *")
    return len(paragraphs) == N and all(paragraph.strip() for paragraph in paragraphs)


def word_constraint(text: str, N: int, quantifier: str) -> bool:
    """At least, around (within a tenth) or at most N words."""
    return _about(len(text.split()), N, quantifier, _tenth(N))


def sentence_constraint(text: str, N: int, quantifier: str) -> bool:
    """At least, around (within one) or at most N sentences."""
    return _about(len(SENTENCE_END.split(text)), N, quantifier, 1)


def first_word_of_paragraph(text: str, N: int, first_word: str, i: int) -> bool:
    """N paragraphs separated by empty lines, the i-th of which (from 1) starts with the word."""
    paragraphs = text.split("\n\n")
    return len(paragraphs) == N and 1 <= i <= N and paragraphs[i - 1].strip().startswith(first_word)


def postscript(text: str, postscript_marker: str) -> bool:
    """The marker occurs, with something behind it."""
    at = text.find(postscript_marker)
    return at >= 0 and len(text[at:].strip()) > len(postscript_marker)


def placeholders(text: str, N: int) -> bool:
    """At least N placeholders in square brackets."""
    return len(re.findall(r"\[(.*?)\]", text)) >= N


def bullet_points(text: str, N: int) -> bool:
    """Exactly N lines that begin with * or -."""
    return sum(line.strip().startswith(("*", "-")) for line in text.split("\n")) == N


def title(text: str) -> bool:
    """A title in double angle brackets."""
    return re.search(r"<<(.*?)>>", text) is not None


def choice(text: str, options: Sequence[str]) -> bool:
    """One of the options occurs."""
    return any(option in text for option in options)


def highlighted_sections(text: str, N: int) -> bool:
    """At least N stretches between asterisks."""
    return len(re.findall(r"\*(.*?)\*", text)) >= N


def sections(text: str, N: int, section_splitter: str) -> bool:
    """At least N headings made of the splitter and a number."""
    return len(re.findall(rf"\s?{re.escape(section_splitter)}\s?\d+\s?", text, re.IGNORECASE)) >= N


def json_format(text: str) -> bool:
    """The whole text is JSON."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def repeat_prompt(text: str, original_prompt: str) -> bool:
    """The text begins with the prompt."""
    return text.startswith(original_prompt)


def two_responses(text: str) -> bool:
    """Two different answers, separated by six asterisks."""
    parts = text.split("******")
    return len(parts) == 2 and parts[0].strip() != parts[1].strip()


def uppercase(text: str) -> bool:
    """No lower-case letter."""
    return text == text.upper()


def lowercase(text: str) -> bool:
    """No upper-case letter."""
    return text == text.lower()


def capital_words(text: str, N: int, quantifier: str) -> bool:
    """At least, around (within a tenth) or at most N words of capital letters."""
    return _about(len(re.findall(r"\b[A-Z]+\b", text)), N, quantifier, _tenth(N))


def end(text: str, end_phrase: str) -> bool:
    """The text ends with the phrase."""
    return text.endswith(end_phrase)


def quotation(text: str) -> bool:
    """The text stands in double quotation marks."""
    return text.startswith('"') and text.endswith('"')


def no_commas(text: str) -> bool:
    """No comma."""
    return "," not in text


CHECKS: dict[str, tuple[Check, tuple[str, ...]]] = {
    "verify_keywords": (keywords, ("keyword_list",)),
    "verify_keyword_frequency": (keyword_frequency, ("word", "N")),
    "validate_forbidden_words": (forbidden_words, ("forbidden_words",)),
    "verify_letter_frequency": (letter_frequency, ("letter", "N")),
    "validate_response_language": (response_language, ("language",)),
    "verify_paragraph_count": (paragraph_count, ("N",)),
    "validate_word_constraint": (word_constraint, ("N", "quantifier")),
    "verify_sentence_constraint": (sentence_constraint, ("N", "quantifier")),
    "validate_paragraphs": (first_word_of_paragraph, ("N", "first_word", "i")),
    "verify_postscript": (postscript, ("postscript_marker",)),
    "validate_placeholders": (placeholders, ("N",)),
    "verify_bullet_points": (bullet_points, ("N",)),
    "validate_title": (title, ()),
    "validate_choice": (choice, ("options",)),
    "validate_highlighted_sections": (highlighted_sections, ("N",)),
    "validate_sections": (sections, ("N", "section_splitter")),
    "validate_json_format": (json_format, ()),
    "validate_repeat_prompt": (repeat_prompt, ("original_prompt",)),
    "validate_two_responses": (two_responses, ()),
    "validate_uppercase": (uppercase, ()),
    "validate_lowercase": (lowercase, ()),
    "validate_frequency_capital_words": (capital_words, ("N", "quantifier")),
    "validate_end": (end, ("end_phrase",)),
    "validate_quotation": (quotation, ()),
    "validate_no_commas": (no_commas, ()),
}
"""Name in the data to check and the arguments it needs."""


def check_constraint(constraint: dict[str, Any]) -> tuple[Check, dict[str, Any]]:
    """The check of a constraint and its arguments; the constraint is left as it is.

    Raises:
        VerifierError: an unknown name, or an argument that is missing.
    """
    name = constraint.get("func_name")
    if name not in CHECKS:
        raise VerifierError(f"func_name {name!r} is no check; there are: {', '.join(CHECKS)}")
    check, needed = CHECKS[name]
    missing = [argument for argument in needed if constraint.get(argument) is None]
    if missing:
        raise VerifierError(f"{name} needs {', '.join(needed)}; missing here: {', '.join(missing)}")
    return check, {argument: constraint[argument] for argument in needed}
