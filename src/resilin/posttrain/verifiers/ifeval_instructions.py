"""The instructions of IFEval (Zhou et al. 2023), by their ids, as functions of one text.

They differ in small things from the checks of Tülu 3's own data (`ifeval_checks`): relations instead of exact numbers,
white space and quotation marks taken off, keywords as patterns. Sentences are split by a pattern, not NLTK's model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from resilin.posttrain.verifiers.ifeval_checks import SENTENCE_END, detect_language
from resilin.posttrain.verifiers.verifier import VerifierError

Instruction = Callable[..., bool]


def _related(count: int, wanted: int, relation: str) -> bool:
    if relation == "less than":
        return count < wanted
    if relation == "at least":
        return count >= wanted
    raise VerifierError(f"relation should be 'less than' or 'at least', not {relation!r}")


def _found(pattern: str, text: str, flags: int = 0) -> int:
    return len(re.findall(pattern, text, flags))


def _existence(text: str, keywords: Sequence[str]) -> bool:
    return all(re.search(word, text, re.IGNORECASE) for word in keywords)


def _frequency(text: str, keyword: str, frequency: int, relation: str = "at least") -> bool:
    return _related(_found(keyword, text, re.IGNORECASE), frequency, relation)


def _forbidden(text: str, forbidden_words: Sequence[str]) -> bool:
    return not any(re.search(rf"\b{word}\b", text, re.IGNORECASE) for word in forbidden_words)


def _letters(text: str, letter: str, let_frequency: int, let_relation: str = "at least") -> bool:
    return _related(text.lower().count(letter.lower()), let_frequency, let_relation)


def _language(text: str, language: str) -> bool:
    found = detect_language(text)
    return found is None or found == language  # IFEval counts what cannot be told as followed


def _sentences(text: str, num_sentences: int, relation: str = "at least") -> bool:
    parts = [part for part in SENTENCE_END.split(text) if part.strip()]
    return _related(len(parts), num_sentences, relation)


def _inner_parts(parts: list[str]) -> int | None:
    """How many parts there are, those at both ends not counted when empty; None for an empty one between others."""
    count = len(parts)
    for number, part in enumerate(parts):
        if not part.strip():
            if number not in (0, len(parts) - 1):
                return None
            count -= 1
    return count


def _paragraphs(text: str, num_paragraphs: int) -> bool:
    return _inner_parts(re.split(r"\s?\*\*\*\s?", text)) == num_paragraphs


def _words(text: str, num_words: int, relation: str = "at least") -> bool:
    return _related(_found(r"\w+", text), num_words, relation)


def _first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    paragraphs = re.split(r"\n\n", text)
    count = sum(bool(paragraph.strip()) for paragraph in paragraphs)
    if not 1 <= nth_paragraph <= min(count, len(paragraphs)):
        return False
    paragraph = paragraphs[nth_paragraph - 1].strip()
    if not paragraph:
        return False
    word = re.split(r"[.,?!'\"]", paragraph.split()[0].lstrip("'").lstrip('"'), maxsplit=1)[0]
    return count == num_paragraphs and word.lower() == first_word.lower()


def _placeholders(text: str, num_placeholders: int) -> bool:
    return _found(r"\[.*?\]", text) >= num_placeholders


def _postscript(text: str, postscript_marker: str) -> bool:
    patterns = {"P.P.S": r"\s*p\.\s?p\.\s?s.*$", "P.S.": r"\s*p\.\s?s\..*$"}
    pattern = patterns.get(postscript_marker, rf"\s*{re.escape(postscript_marker.lower())}.*$")
    return re.search(pattern, text.lower(), re.MULTILINE) is not None


def _bullets(text: str, num_bullets: int) -> bool:
    stars, dashes = r"^\s*\*[^\*].*$", r"^\s*-.*$"
    return _found(stars, text, re.MULTILINE) + _found(dashes, text, re.MULTILINE) == num_bullets


def _constrained(text: str) -> bool:
    return any(f"My answer is {word}." in text for word in ("yes", "no", "maybe"))


def _highlights(text: str, num_highlights: int) -> bool:
    single = [part for part in re.findall(r"\*[^\n\*]*\*", text) if part.strip("*").strip()]
    double = [part for part in re.findall(r"\*\*[^\n\*]*\*\*", text) if part[2:-2].strip()]
    return len(single) + len(double) >= num_highlights


def _sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return _found(rf"\s?{section_spliter}\s?\d+\s?", text) >= num_sections


def _json(text: str) -> bool:
    plain = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        plain = plain.removeprefix(fence)
    try:
        json.loads(plain.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str) -> bool:
    return any(found.strip("<>").strip() for found in re.findall(r"<<[^\n]+>>", text))


def _two(text: str) -> bool:
    parts = text.split("******")
    if _inner_parts(parts) != 2:
        return False
    first, second = (part.strip() for part in parts if part.strip())
    return first != second


def _repeat(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _end(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _capital_words(text: str, capital_frequency: int, capital_relation: str = "at least") -> bool:
    count = sum(word.isupper() for word in re.findall(r"[\w'-]+", text))
    return _related(count, capital_frequency, capital_relation)


def _english(text: str) -> bool:
    return detect_language(text) in (None, "en")


def _quotation(text: str) -> bool:
    plain = text.strip()
    return len(plain) > 1 and plain[0] == plain[-1] == '"'


INSTRUCTIONS: dict[str, tuple[Instruction, tuple[str, ...], tuple[str, ...]]] = {
    "keywords:existence": (_existence, ("keywords",), ()),
    "keywords:frequency": (_frequency, ("keyword", "frequency"), ("relation",)),
    "keywords:forbidden_words": (_forbidden, ("forbidden_words",), ()),
    "keywords:letter_frequency": (_letters, ("letter", "let_frequency"), ("let_relation",)),
    "language:response_language": (_language, ("language",), ()),
    "length_constraints:number_sentences": (_sentences, ("num_sentences",), ("relation",)),
    "length_constraints:number_paragraphs": (_paragraphs, ("num_paragraphs",), ()),
    "length_constraints:number_words": (_words, ("num_words",), ("relation",)),
    "length_constraints:nth_paragraph_first_word": (
        _first_word,
        ("num_paragraphs", "nth_paragraph", "first_word"),
        (),
    ),
    "detectable_content:number_placeholders": (_placeholders, ("num_placeholders",), ()),
    "detectable_content:postscript": (_postscript, ("postscript_marker",), ()),
    "detectable_format:number_bullet_lists": (_bullets, ("num_bullets",), ()),
    "detectable_format:constrained_response": (_constrained, (), ()),
    "detectable_format:number_highlighted_sections": (_highlights, ("num_highlights",), ()),
    "detectable_format:multiple_sections": (_sections, ("section_spliter", "num_sections"), ()),
    "detectable_format:json_format": (_json, (), ()),
    "detectable_format:title": (_title, (), ()),
    "combination:two_responses": (_two, (), ()),
    "combination:repeat_prompt": (_repeat, ("prompt_to_repeat",), ()),
    "startend:end_checker": (_end, ("end_phrase",), ()),
    "startend:quotation": (_quotation, (), ()),
    "change_case:capital_word_frequency": (_capital_words, ("capital_frequency",), ("capital_relation",)),
    "change_case:english_capital": (lambda text: text.isupper() and _english(text), (), ()),
    "change_case:english_lowercase": (lambda text: text.islower() and _english(text), (), ()),
    "punctuation:no_comma": (lambda text: "," not in text, (), ()),
}
"""Id to function, needed arguments, and arguments that may be left out."""


def add_instruction(name: str, follows: Instruction, needed: Sequence[str] = (), optional: Sequence[str] = ()) -> None:
    """Make a further instruction known: `follows(text, **arguments) -> bool`."""
    INSTRUCTIONS[name] = (follows, tuple(needed), tuple(optional))


def find_instruction(name: str, arguments: dict[str, Any] | None) -> tuple[Instruction, dict[str, Any]]:
    """The function of an instruction and its arguments; None values are left out, further ones ignored.

    Raises:
        VerifierError: an unknown id, or an argument that is missing.
    """
    if name not in INSTRUCTIONS:
        raise VerifierError(
            f"instruction {name!r} is not known; there are: {', '.join(INSTRUCTIONS)}; add_instruction adds one"
        )
    follows, needed, optional = INSTRUCTIONS[name]
    given = {key: value for key, value in (arguments or {}).items() if value is not None}
    missing = [key for key in needed if key not in given]
    if missing:
        raise VerifierError(f"{name} needs {', '.join(needed)}; missing here: {', '.join(missing)}")
    return follows, {key: given[key] for key in (*needed, *optional) if key in given}
