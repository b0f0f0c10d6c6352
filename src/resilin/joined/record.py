"""Which experts a joined model has: `experts.json` beside its weights."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from resilin.config.settings import closest
from resilin.joined.errors import JoinError
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.weight_files import read_json, write_atomically
from resilin.nested.budgets import Budget

FILE = "experts.json"
UNTUNED = "untuned.safetensors"
"""Of a model whose router was tuned after joining: (L, D) rows as they were joined, by the expert's name."""
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Entry:
    """One expert of a joined model.

    Attributes:
        name: of it.
        digest: of its tensors as they are stored here, its untuned rows among them.
        offsets: whether it came with offsets.
        card: what its owner says of it and its data.
    """

    name: str
    digest: str
    offsets: bool = True
    card: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class JoinedRecord:
    """What a joined model is made of.

    Attributes:
        anchor: digest of what is frozen, which all experts share.
        experts: in the order of the router's rows; the first is the anchor's own feed-forward.
        tokenizer: digest of the tokenizer; None where there is none.
        router: "joined": rows as their owners trained them; "tuned": trained together afterwards, so that each row has
            seen what the other experts' proxies are like.
    """

    anchor: str
    experts: tuple[Entry, ...]
    tokenizer: str | None = None
    router: Literal["joined", "tuned"] = "joined"

    @property
    def names(self) -> tuple[str, ...]:
        """Of the experts, in order."""
        return tuple(entry.name for entry in self.experts)

    def numbers(self, names: Collection[str]) -> tuple[int, ...]:
        """The numbers of experts, ascending.

        Raises:
            JoinError: there is no such expert, with the nearest name.
        """
        for name in names:
            if name not in self.names:
                near = closest(name, self.names)
                hint = f"did you mean {near!r}? " if near else ""
                raise JoinError(f"there is no expert {name!r}; {hint}the experts are {', '.join(self.names)}")
        return tuple(number for number, name in enumerate(self.names) if name in names)

    def without(self, names: Collection[str]) -> tuple[int, ...]:
        """The numbers of the experts that are left when some are taken out.

        Raises:
            JoinError: one is not there, or is the anchor, which all others were trained beside.
        """
        gone = self.numbers(names)
        if 0 in gone:
            raise JoinError(
                f"{self.names[0]!r} is the anchor's own feed-forward, which every expert was trained beside: it stays"
            )
        return tuple(number for number in range(len(self.experts)) if number not in gone)

    def budget(self, settings: DecoderSettings, without: Collection[str] = (), top_k: int | None = None) -> Budget:
        """The model without some experts, as a budget: to run in place for one request, or to cut out.

        Args:
            settings: of the joined decoder.
            without: names of experts.
            top_k: experts that a token visits; None: as many as ever, or all that are left.

        Raises:
            JoinError: an expert is not there.
        """
        kept = self.without(without)
        return Budget(experts=(kept,) * settings.layers, top_k=top_k)

    def of(self, numbers: Sequence[int]) -> JoinedRecord:
        """The record of a model of some of these experts."""
        return replace(self, experts=tuple(self.experts[number] for number in numbers))

    def write(self, folder: Path) -> Path:
        """Put it beside the weights."""
        write_atomically(folder / FILE, json.dumps({"format": _FORMAT, **asdict(self)}, indent=2) + "\n")
        return folder / FILE

    @classmethod
    def read(cls, folder: Path | str) -> JoinedRecord:
        """What stands beside the weights.

        Raises:
            JoinError: nothing does, or something else.
        """
        file = Path(folder) / FILE
        if not file.is_file():
            raise JoinError(f"{file}: no such file; is {folder} a folder that `resilin experts join` wrote?")
        tree = read_json(file)
        if tree.pop("format", None) != _FORMAT:
            raise JoinError(f"{file}: is of another format than {_FORMAT}; use the version of resilin that wrote it")
        try:
            experts = tuple(Entry(**entry) for entry in tree.pop("experts"))
            return cls(experts=experts, **tree)
        except (KeyError, TypeError) as error:
            raise JoinError(f"{file}: is no record of joined experts: {error}; join them anew") from None


def check_names(names: Sequence[str]) -> None:
    """Refuse names that are given twice.

    Raises:
        JoinError: naming it.
    """
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise JoinError(
            f"two experts are called {twice[0]!r}: give each a name of its own (resilin experts seed --name)"
        )
