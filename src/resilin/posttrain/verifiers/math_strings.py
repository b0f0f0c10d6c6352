r"""Mathematical answers as strings in one form, so that equal answers are mostly equal strings.

Two forms are in use and both are kept: that of Minerva (Lewkowycz et al. 2022, appendix D.1), applied to what a
sentence or dollar signs set apart, and that of MATH (Hendrycks et al. 2021), in which answers are compared.
"""

from __future__ import annotations

import re

# Appendix D.1 of the Minerva paper, in its order.
_REPLACED = (
    ("an ", ""),
    ("a ", ""),
    (".$", "$"),
    ("\\$", ""),
    ("\\ ", ""),
    (" ", ""),
    ("mbox", "text"),
    (",\\text{and}", ","),
    ("\\text{and}", ","),
    ("\\text{m}", "\\text{}"),
)
_REMOVED = (
    *("square", "ways", "integers", "dollars", "mph", "inches", "ft", "hours", "km", "units", "\\ldots", "sue"),
    *("points", "feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges"),
    *("students", "childrentickets", "multiples", "\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3"),
    *("\\text{\n}", "\\text{}", "\\mathrm{th}", "^\\circ", "^{\\circ}", "\\;", ",\\!", "{,}", '"', "\\dots"),
)
_UNWRAPPED = (
    (re.compile(r"(.*?)(\$)(.*?)(\$)(.*)"), r"$\3$"),
    (re.compile(r"(\\text\{)(.*?)(\})"), r"\2"),
    (re.compile(r"(\\textbf\{)(.*?)(\})"), r"\2"),
    (re.compile(r"(\\overline\{)(.*?)(\})"), r"\2"),
    (re.compile(r"(\\boxed\{)(.*)(\})"), r"\2"),
    (re.compile(r"(frac)([^{])(.)"), r"frac{\2}{\3}"),
    (re.compile(r"(sqrt)([^{])"), r"sqrt{\2}"),
)


def minerva_form(answer: str) -> str:
    """An answer without units, words, white space and wrappers; what stands behind its last equals sign."""
    answer = answer.split("=")[-1]
    for old, new in _REPLACED:
        answer = answer.replace(old, new)
    for removed in _REMOVED:
        answer = answer.replace(removed, "")
    for pattern, new in _UNWRAPPED:
        answer = pattern.sub(new, answer)
    answer = answer.replace("$", "")
    joined = answer.replace(",", "")
    return joined if joined.isdigit() else answer


_CUT = (
    ("\n", ""),
    ("\\!", ""),
    ("\\\\", "\\"),
    ("tfrac", "frac"),
    ("dfrac", "frac"),
    ("\\left", ""),
    ("\\right", ""),
    ("^{\\circ}", ""),
    ("^\\circ", ""),
    ("\\$", ""),
)
_SQRT_BARE = re.compile(r"\\sqrt([^{\[])")
_FRAC_BARE = re.compile(r"\\frac(?!\{)(.)(\{|.)")
_FRAC_HALF = re.compile(r"\\frac(\{[^{}]*\})([^{])")
_SLASH = re.compile(r"(-?\d+)/(-?\d+)")


def _braced_fraction(match: re.Match[str]) -> str:
    above, below = match.groups()
    return f"\\frac{{{above}}}" + ("{" if below == "{" else f"{{{below}}}")


def stripped(answer: str) -> str:
    """An answer in the form of MATH: no spaces, sizes, degrees, percent, currency or units behind it; braces put in."""
    for old, new in _CUT:
        answer = answer.replace(old, new)
    if answer.count("\\text{ ") == 1:  # a unit on the right
        answer = answer.split("\\text{ ")[0]
    answer = answer.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.").strip()
    if answer.startswith("."):
        answer = "0" + answer
    sides = answer.split("=")
    if len(sides) == 2 and len(sides[0].strip()) <= 2:  # "x = 5"
        answer = sides[1]
    answer = _SQRT_BARE.sub(r"\\sqrt{\1}", answer.replace(" ", ""))
    answer = _FRAC_HALF.sub(r"\\frac\1{\2}", _FRAC_BARE.sub(_braced_fraction, answer))
    if answer == "0.5":
        return "\\frac{1}{2}"
    slash = _SLASH.fullmatch(answer)
    if slash and all(str(int(part)) == part for part in slash.groups()):
        return f"\\frac{{{slash[1]}}}{{{slash[2]}}}"
    return answer


def same_string(one: str, other: str) -> bool:
    """Whether two answers are the same string in the form of MATH."""
    return stripped(one) == stripped(other)
