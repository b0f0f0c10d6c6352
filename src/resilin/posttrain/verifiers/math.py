"""Mathematical answers: found in the text, then compared as strings, as numbers and as expressions."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import Field

from resilin.posttrain.verifiers.math_strings import minerva_form, same_string, stripped
from resilin.posttrain.verifiers.symbolic import Symbolic, same_number
from resilin.posttrain.verifiers.verifier import Answer, Verifier, VerifierError

_FINAL = re.compile(r"Final Answer: The final answer is(.*?)\. I hope it is correct\.")


def last_boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}` or `\fbox{...}`, braces inside it matched; None where there is none.

    `\boxed 7$` without braces reaches to the next dollar sign.
    """
    at = text.rfind("\\boxed")
    bare = text.rfind("\\boxed ")
    if bare >= 0 and bare == at:
        return text[bare + len("\\boxed ") :].split("$")[0]
    if at < 0:
        at = text.rfind("\\fbox")
    begin = text.find("{", at) if at >= 0 else -1
    if begin < 0 or text[at:begin].strip() not in ("\\boxed", "\\fbox"):
        return None
    depth = 0
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[begin + 1 : place]
    return None


def final_answer(text: str) -> str | None:
    """What the sentence "Final Answer: The final answer is ... I hope it is correct." names, in Minerva's form.

    The last words may be missing at the end of the text (few-shot prompts stop there).
    """
    found = _FINAL.search(text + "I hope it is correct.") or _FINAL.search(text + ". I hope it is correct.")
    return minerva_form(found.group(1).strip()) if found else None


def candidates(text: str) -> list[str]:
    """What the answer may be: boxed and final answers; without any, what stands between the last two dollar signs;
    without those, the whole text.
    """
    found = [answer for answer in (last_boxed(text), final_answer(text)) if answer is not None]
    if not found:
        dollars = [match.start() for match in re.finditer(r"\$", text)]
        if len(dollars) > 1:
            found.append(minerva_form(text[dollars[-2] + 1 : dollars[-1]]))
    return found or [minerva_form(text), text]


class Math(Verifier):
    """1 if any candidate is the label: as a string (Hendrycks et al. 2021), a number or an expression (SymPy)."""

    seconds: Annotated[float, Field(gt=0)] = 5.0
    """Time for one symbolic comparison; what takes longer is not equal."""
    symbolic: bool = True
    """Compare expressions too, in a process of their own (needs sympy); False: strings and numbers only."""

    def candidates(self, text: str) -> list[str]:
        """What the answer may be."""
        return candidates(text)

    def score(self, answer: Answer) -> float:
        """1 or 0."""
        label = _label(answer.label)
        found = self.candidates(answer.text)
        if any(same_string(one, label) or same_number(stripped(one), stripped(label)) for one in found):
            return 1.0
        if not self.symbolic:
            return 0.0
        equal = Symbolic.shared(self.seconds).equal
        return float(any(equal(stripped(one), stripped(label)) for one in found))

    def claimed(self, text: str) -> str | None:
        """What is boxed, or else named as the final answer."""
        found = last_boxed(text) or final_answer(text)
        return found.strip() if found is not None and found.strip() else None

    def check_label(self, label: Any) -> None:
        """The label is a number or a text."""
        _label(label)


class StrictMath(Math):
    """`Math` for which only the sentence "Final Answer: ..." counts, or else the whole text."""

    def candidates(self, text: str) -> list[str]:
        """What the answer may be."""
        final = final_answer(text)
        return [final if final is not None else minerva_form(text)]

    def claimed(self, text: str) -> str | None:
        """What is named as the final answer."""
        return final_answer(text)


def _label(label: Any) -> str:
    if not isinstance(label, str | int | float) or isinstance(label, bool) or str(label).strip() == "":
        raise VerifierError(f"math compares with an answer as text, such as '\\\\frac{{1}}{{2}}', not {label!r:.60}")
    return str(label)
