"""What tensor parallelism has to know of a model, as plain data: kept beside the model's file, which stays as it is.

`resilin.parallel.tensor.parallelise` carries a plan out. Modules and parameters are named by regular expressions that
match whole names, as `named_modules` and `named_parameters` give them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from resilin.layout import SpecRule

TENSOR = "tp"
"""The axis of the mesh that a plan cuts."""


@dataclass(frozen=True, slots=True)
class LocalCount:
    """A number that a module keeps of its own width, such as of its heads: a rank has a part of it.

    Attributes:
        modules: which have it.
        attribute: its name.
        like: a parameter below the module: the rank's share of its first dimension is its share of the number.
    """

    modules: str
    attribute: str
    like: str


@dataclass(frozen=True, slots=True)
class CutNorm:
    """A norm over a width that is cut: its statistics are summed over the ranks.

    Attributes:
        modules: which are such norms.
        like: a parameter of the module that holds the norm: its first dimension is the width.
    """

    modules: str
    like: str


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """How a model is cut over the ranks of tensor parallelism.

    Between **regions** every rank has the same activations, the stream (or, with sequence parallelism, its own
    positions of them). A region is a module whose weights are cut: its first argument is the stream, its first result
    is on each rank a part of a sum, and everything within it runs on the rank's own weights.

    Attributes:
        root: path of the module that the plan is of, where it is a part of another model: names are relative to it, and
            what lies outside has the module's results on every rank.
        rules: which parameters are cut and how; cuts of other axes than "tp" are left to others.
        regions: patterns of modules.
        copied: patterns of parameters within regions of which every rank has all.
        counts: numbers that modules of regions keep of their own width.
        biases: patterns of linear modules within regions whose bias is added to a part of a sum: one rank adds it.
        norms: within regions, over a width that is cut.
        embedding: the module that reads the first rows of the stream from a table cut by rows of its vocabulary.
        head: the parameters that may be the output matrix, cut in the same way: the first that exists is it.
        last: the module whose result is the model's last hidden state: with sequence parallelism it is put together.
        sequence_dim: the stream's dimension of positions.
        refused: arguments of the model's forward pass that cannot be used.
        hints: arguments that only save work; with sequence parallelism they are left out.
        padding: (argument, value): with sequence parallelism rows are made longer at their ends, until their positions
            can be divided, by these values; the results are cut off again. Empty: such rows are refused.
        positions: the argument that says where tokens stand, made where it is not given and rows are padded.
        divided: an attribute of the model that is not None where ranks of another axis have other positions of the
            same rows: those are not padded here.
    """

    rules: tuple[SpecRule, ...]
    regions: tuple[str, ...]
    copied: tuple[str, ...] = ()
    counts: tuple[LocalCount, ...] = ()
    biases: tuple[str, ...] = ()
    norms: tuple[CutNorm, ...] = ()
    embedding: str | None = None
    head: tuple[str, ...] = ()
    last: str | None = None
    sequence_dim: int = 1
    refused: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    padding: tuple[tuple[str, int], ...] = ()
    positions: str | None = None
    divided: str | None = None
    root: str = ""

    @property
    def whole_rules(self) -> tuple[SpecRule, ...]:
        """The rules for names of the model that `root` is a part of."""
        if not self.root:
            return self.rules
        return tuple(replace(rule, pattern=rf"{re.escape(self.root)}\.(?:{rule.pattern})") for rule in self.rules)
