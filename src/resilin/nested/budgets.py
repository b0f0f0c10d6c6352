"""A budget: how much of a model is used. A plain value, without a model.

Sizes are numbers of leading parts (the first neurons, heads, experts), for all layers or one for each; what is not
named is used whole. Experts may also be named one by one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Any

from resilin.config import UserError
from resilin.config.settings import closest

Sizes = int | tuple[int | None, ...] | None
"""One size for all layers, or one for each (None: the whole layer); None: all layers whole."""
Experts = int | tuple["int | tuple[int, ...] | None", ...] | None
"""How many leading experts, for all layers or for each; a layer's entry may also be the numbers of its experts."""


class BudgetError(UserError, ValueError):
    """A budget that is none, or does not fit a model; the text says which number, what was expected, what to do."""


@dataclass(frozen=True, slots=True)
class Budget:
    """How much of a model is used.

    Entries by layer count all layers of the full model; those of skipped layers are not looked at.

    Attributes:
        ffn: neurons of the feed-forward; where a layer has experts, of each of them.
        heads: query heads. Whole groups of them where they come out even, else equally many of every group.
        kv_heads: key and value heads (groups of query heads); left out: what follows from `heads`.
        hidden: leading values of the residual stream, through embedding, norms and head.
        skip: layers that are left out.
        experts: of layers that have some.
        top_k: experts that a token visits.
        loops: of a looped decoder, how often its blocks are run, in equal steps; or the steps, in any proportion:
            (4, 1, 1) are three loops of 4/6, 1/6 and 1/6.
        chains: of a decoder of chains, how many of the first: its scale.
        mamba_heads: of Mamba-2 layers, equally many of every group.
        mamba_head_size: channels of each of those heads.
        state_size: numbers of their state.
    """

    ffn: Sizes = None
    heads: Sizes = None
    kv_heads: Sizes = None
    hidden: int | None = None
    skip: tuple[int, ...] = ()
    experts: Experts = None
    top_k: Sizes = None
    loops: int | tuple[int, ...] | None = None
    chains: int | None = None
    mamba_heads: Sizes = None
    mamba_head_size: Sizes = None
    state_size: Sizes = None

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self) if field.name != "skip"):
            object.__setattr__(self, name, _frozen(name, getattr(self, name)))
        if not isinstance(self.skip, list | tuple) or not all(_is_count(layer) or layer == 0 for layer in self.skip):
            raise BudgetError(f"skip is {self.skip!r}: expected numbers of layers, from 0")
        object.__setattr__(self, "skip", tuple(sorted(set(self.skip))))
        if isinstance(self.loops, tuple) and None in self.loops:
            raise BudgetError(
                f"loops is {self.loops!r}: expected a number, or the steps of all loops such as (4, 1, 1)"
            )

    @property
    def full(self) -> bool:
        """Whether it names nothing, and so is all of any model."""
        return self == Budget()

    def to_dict(self) -> dict[str, Any]:
        """What it names, as JSON values."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: _listed(value) for name, value in found.items() if value is not None and value != ()}

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Budget:
        """The budget that `to_dict` told.

        Raises:
            BudgetError: an unknown key, or a value that is no size.
        """
        known = [field.name for field in fields(cls)]
        for key in tree:
            if key not in known:
                near = closest(key, known)
                hint = f"did you mean {near!r}?" if near else f"known are {', '.join(known)}"
                raise BudgetError(f"a budget has no {key!r}; {hint}")
        return cls(**tree)

    @classmethod
    def read(cls, path: Path) -> Budget:
        """A budget from a JSON file.

        Raises:
            BudgetError: it cannot be read, or holds none.
        """
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise BudgetError(f"{path}: cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise BudgetError(f"{path}: not valid JSON: {error}") from None
        if not isinstance(tree, dict):
            raise BudgetError(f'{path}: should hold an object such as {{"ffn": 512}}, holds a {type(tree).__name__}')
        try:
            return cls.from_dict(tree)
        except BudgetError as error:
            raise BudgetError(f"{path}: {error}") from None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """A budget as commands take it: a JSON file's path, or `ffn=512,loops=4+1+1`; `full` is all of a model.

        Raises:
            BudgetError: it is neither.
        """
        if text == "full":
            return cls()
        if "=" not in text:
            return cls.read(Path(text))
        tree: dict[str, Any] = {}
        for part in text.split(","):
            name, _, value = part.partition("=")
            numbers = [int(n) if n.strip().isdecimal() else None for n in value.split("+")]
            if None in numbers:
                raise BudgetError(f"{part!r} in a budget: expected a name and numbers, such as ffn=512 or skip=3+4")
            alone = len(numbers) == 1 and name.strip() != "skip"
            tree[name.strip()] = numbers[0] if alone else numbers
        return cls.from_dict(tree)

    @classmethod
    def of_slices(cls, ffn: Sequence[int], skip: Sequence[int] = ()) -> Budget:
        """A budget as Gemma 3n's slicing configurations tell it: widths of the layers that remain, and those left out.

        Args:
            ffn: neurons of each layer that is not skipped, in order.
            skip: numbers of skipped layers, counted in the full model.

        Raises:
            BudgetError: a skipped layer lies beyond all layers there are.
        """
        layers, left = len(ffn) + len(set(skip)), iter(ffn)
        beyond = [layer for layer in skip if not 0 <= layer < layers]
        if beyond:
            raise BudgetError(
                f"{len(ffn)} widths and {len(set(skip))} skipped layers are {layers} in all; "
                f"skip names layer {beyond[0]}"
            )
        return cls(ffn=tuple(None if layer in skip else next(left) for layer in range(layers)), skip=tuple(skip))

    def __str__(self) -> str:
        parts = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and value != ():
                parts.append(f"{field.name} {_in_words(value)}")
        return ", ".join(parts) or "full"


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _frozen(name: str, value: Any, depth: int = 0) -> Any:
    """The value with tuples for lists; refused where it is no size."""
    deepest = {"hidden": 0, "chains": 0, "experts": 2}.get(name, 1)
    if value is None:
        return None
    if isinstance(value, list | tuple) and depth < deepest:
        if not value:
            raise BudgetError(f"{name} is empty: give one size for each layer, one number for all, or leave it out")
        if depth == 1:  # experts by number
            if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value):
                raise BudgetError(f"{name} has {value!r}: expected the numbers of experts, from 0")
            return tuple(sorted(set(value)))
        return tuple(_frozen(name, one, depth + 1) for one in value)
    if not _is_count(value):
        empty = ", which would leave a layer empty: skip the layer instead" if value == 0 else ""
        raise BudgetError(f"{name} has {value!r}{empty or ': expected a whole number of at least 1'}")
    return value


def _listed(value: Any) -> Any:
    return [_listed(one) for one in value] if isinstance(value, tuple) else value


def _in_words(value: Any) -> str:
    if not isinstance(value, tuple):
        return str(value)
    runs = [(one, len(list(group))) for one, group in groupby(value)]
    words = []
    for one, count in runs:
        text = "all" if one is None else "{" + " ".join(map(str, one)) + "}" if isinstance(one, tuple) else str(one)
        words.append(text if count == 1 else f"{count}x{text}")
    return " ".join(words)
