r"""Mathematical expressions in LaTeX, or as people type them, as SymPy objects.

A recursive-descent parser over what final answers hold: numbers, letters, + - * / ^, fractions, roots, functions,
absolute values, factorials, constants, tuples, intervals and sets. Nothing is evaluated as code, so any text may come
in. What it does not know raises `NotAnExpression`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import sympy


class NotAnExpression(ValueError):  # noqa: N818 - a finding, not a failure
    """The text is no expression of this grammar."""


_TOKEN = re.compile(
    r"\s*(\d+(?:,\d{3})+(?:\.\d+)?|\d+\.\d+|\.\d+|\d+|\\[a-zA-Z]+|\\[{}|]|[a-zA-Z]|[-+*/^_(){}\[\]|,!=])"
)
_SKIPPED = {"\\left", "\\right", "\\displaystyle", "\\limits", "\\quad"}
_TIMES = {"*", "\\cdot", "\\times"}
_FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "\\sin": sympy.sin,
    "\\cos": sympy.cos,
    "\\tan": sympy.tan,
    "\\cot": sympy.cot,
    "\\sec": sympy.sec,
    "\\csc": sympy.csc,
    "\\arcsin": sympy.asin,
    "\\arccos": sympy.acos,
    "\\arctan": sympy.atan,
    "\\ln": sympy.log,
    "\\log": sympy.log,
    "\\exp": sympy.exp,
}
_CONSTANTS = {"\\pi": sympy.pi, "\\infty": sympy.oo, "e": sympy.E, "i": sympy.I}
_GREEK = {
    f"\\{name}"
    for name in ("alpha", "beta", "gamma", "delta", "epsilon", "theta", "lambda", "mu", "rho", "sigma", "phi", "omega")
}
_OPENS = {"(": ")", "[": "]", "\\{": "\\}"}
_ENDS = {")", "]", "}", "\\}", ",", "=", "|", None}


def _tokens(text: str) -> list[str]:
    tokens, at = [], 0
    text = text.strip().removesuffix(".")
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            raise NotAnExpression(f"cannot read {text[at : at + 10]!r}")
        at = found.end()
        if found[1] not in _SKIPPED:
            tokens.append({"\\dfrac": "\\frac", "\\tfrac": "\\frac", "\\|": "|"}.get(found[1], found[1]))
    return tokens


class _Parser:
    def __init__(self, tokens: Sequence[str]) -> None:
        self.tokens = tokens
        self.at = 0

    @property
    def next(self) -> str | None:
        return self.tokens[self.at] if self.at < len(self.tokens) else None

    def take(self, wanted: str | None = None) -> str:
        token = self.next
        if token is None or (wanted is not None and token != wanted):
            raise NotAnExpression(f"expected {wanted or 'more'}, not {token!r}")
        self.at += 1
        return token

    def sum(self) -> Any:
        value = self.product()
        while self.next in ("+", "-"):
            sign = self.take()
            term = self.product()
            value = value + term if sign == "+" else value - term
        return value

    def product(self) -> Any:
        value = self.signed()
        while True:
            token = self.next
            if token in _TIMES:
                self.take()
                value = value * self.signed()
            elif token in ("/", "\\div"):
                self.take()
                value = value / self.signed()
            elif token in _ENDS or token in ("+", "-", "^", "_", "!"):
                return value
            else:
                factor = self.power()
                # "1\frac{1}{2}" is one and a half.
                mixed = value.is_Integer and factor.is_Rational and 0 < factor < 1 and self.tokens[self.at - 1] == "}"
                value = value + factor if mixed and token == "\\frac" else value * factor

    def signed(self) -> Any:
        if self.next in ("+", "-"):
            return -self.signed() if self.take() == "-" else self.signed()
        return self.power()

    def power(self) -> Any:
        base = self.atom()
        while self.next == "!":
            self.take()
            base = sympy.factorial(base)
        if self.next == "^":
            self.take()
            base = base ** (self.group() if self.next == "{" else self.signed_atom())
        return base

    def signed_atom(self) -> Any:
        if self.next == "-":
            self.take()
            return -self.atom()
        return self.atom()

    def group(self) -> Any:
        self.take("{")
        value = self.sum()
        self.take("}")
        return value

    def argument(self) -> Any:
        """What a command is applied to: a group, or one digit or letter."""
        if self.next is not None and self.next.isdigit() and len(self.next) > 1:
            token = self.take()
            self.at -= 1
            self.tokens = [*self.tokens[: self.at], token[0], token[1:], *self.tokens[self.at + 1 :]]
        return self.group() if self.next == "{" else self.atom()

    def atom(self) -> Any:
        token = self.take()
        if token[0].isdigit() or token[0] == ".":
            return sympy.Rational(token.replace(",", ""))
        if token == "{":
            self.at -= 1
            return self.group()
        if token in ("(", "["):
            value = self.sum()
            self.take(_OPENS[token])
            return value
        if token == "|":
            value = self.sum()
            self.take("|")
            return sympy.Abs(value)
        if token == "\\frac":
            above = self.argument()
            return above / self.argument()
        if token == "\\sqrt":
            degree = sympy.Integer(2)
            if self.next == "[":
                self.take()
                degree = self.sum()
                self.take("]")
            return self.argument() ** (1 / degree)
        if token == "\\binom":
            n = self.argument()
            return sympy.binomial(n, self.argument())
        if token in _FUNCTIONS:
            return self.function(token)
        if token in _CONSTANTS:
            return _CONSTANTS[token]
        if token in _GREEK or token.isalpha():
            name = token
            if self.next == "_":
                self.take()
                name += f"_{self.argument()}"
            return sympy.Symbol(name.lstrip("\\"))
        raise NotAnExpression(f"{token!r} begins no expression")

    def function(self, token: str) -> Any:
        base = power = None
        if self.next == "_" and token == "\\log":
            self.take()
            base = self.argument()
        if self.next == "^":
            self.take()
            power = self.argument() if self.next == "{" else self.signed_atom()
        value = self.power()
        result = sympy.log(value, base) if base is not None else _FUNCTIONS[token](value)
        return result if power is None else result**power


def _split(tokens: Sequence[str]) -> list[list[str]]:
    """The parts between commas that stand in no bracket."""
    parts: list[list[str]] = [[]]
    depth = 0
    for token in tokens:
        depth += (token in ("(", "[", "{", "\\{")) - (token in (")", "]", "}", "\\}"))
        if token == "," and depth == 0:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def _whole(tokens: Sequence[str]) -> Any:
    parser = _Parser(tokens)
    value = parser.sum()
    if parser.next is not None:
        raise NotAnExpression(f"{parser.next!r} is left over")
    return value


def parse(text: str) -> tuple[str, list[Any]]:
    r"""An answer as its kind and its expressions.

    Returns:
        ("", [x]) for one expression; (brackets, parts) for tuples and intervals "(1,2]" and sets "\{1,2\}"; (",",
        parts) for several expressions without brackets; ("=", [left, right]) for an equation.

    Raises:
        NotAnExpression: the text is none of these.
    """
    tokens = _tokens(text)
    if not tokens:
        raise NotAnExpression("is empty")
    first, last = tokens[0], tokens[-1]
    if first in ("(", "[", "\\{") and last in (")", "]", "\\}") and _closes_at_end(tokens):
        parts = _split(tokens[1:-1])
        if len(parts) > 1 or first == "\\{":
            return first + last, [_whole(part) for part in parts]
    parts = _split(tokens)
    if len(parts) > 1:
        return ",", [_whole(part) for part in parts]
    if tokens.count("=") == 1:
        at = tokens.index("=")
        return "=", [_whole(tokens[:at]), _whole(tokens[at + 1 :])]
    return "", [_whole(tokens)]


def _closes_at_end(tokens: Sequence[str]) -> bool:
    """Whether the first bracket is closed by the last token."""
    depth = 0
    for number, token in enumerate(tokens):
        depth += (token in ("(", "[", "{", "\\{")) - (token in (")", "]", "}", "\\}"))
        if depth == 0:
            return number == len(tokens) - 1
    return False


def _equal(one: Any, other: Any) -> bool:
    if one == other:
        return True
    return bool(sympy.simplify(one - other) == 0)


def equal_expressions(one: str, other: str) -> bool:
    """Whether two answers are equal: part by part; sets in any order; equations up to a factor.

    Raises:
        NotAnExpression: one of them is none.
    """
    (kind, left), (other_kind, right) = parse(one), parse(other)
    if kind != other_kind:
        if kind == "=" and other_kind == "":
            return _equal(left[1], right[0]) and left[0].is_Symbol
        if other_kind == "=" and kind == "":
            return _equal(right[1], left[0]) and right[0].is_Symbol
        return False
    if kind == "=":
        a, b = sympy.simplify(left[0] - left[1]), sympy.simplify(right[0] - right[1])
        return bool(a == b == 0) or (
            b != 0 and bool(sympy.simplify(a / b).is_nonzero) and sympy.simplify(a / b).is_number
        )
    if len(left) != len(right):
        return False
    if kind == "\\{\\}":
        rest = list(right)
        for value in left:
            match = next((number for number, item in enumerate(rest) if _equal(value, item)), None)
            if match is None:
                return False
            del rest[match]
        return True
    return all(_equal(a, b) for a, b in zip(left, right, strict=True))
