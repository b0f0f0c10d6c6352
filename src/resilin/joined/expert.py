"""An expert that its owner hands over: its feed-forwards, its rows of the router, its offsets, and a card.

Nothing of the anchor is in it, and nothing of the owner's data but what the weights have learnt.

    news-expert/
      expert.json          name, digests of anchor, tokenizer and tensors, and the card
      expert.safetensors   layers.N.gate | up | down, layers.N.row (D), layers.N.offset ()

Shapes: L layers, D hidden size, F feed-forward size.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from resilin.joined.anchor import anchor_digest, frozen_table
from resilin.joined.beside import BesideAnchor
from resilin.joined.digest import table_digest, tensor_digest
from resilin.joined.errors import JoinError
from resilin.models.block import Block
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.weight_files import read_json, write_atomically

FILE, TENSORS = "expert.json", "expert.safetensors"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def check_name(name: str) -> None:
    """Refuse a name that is none.

    Raises:
        JoinError: saying what one is made of.
    """
    if not _NAME.fullmatch(name):
        raise JoinError(f"{name!r} names an expert: use letters, digits, '-', '_' and '.'")


@dataclass(frozen=True, slots=True)
class Expert:
    """One expert.

    Attributes:
        name: of it.
        anchor: digest of the anchor it was trained beside.
        tensors: as they are stored, by name.
        tokenizer: digest of the tokenizer its data were read with; None where nothing tells.
        card: what its owner says of it and its data.
    """

    name: str
    anchor: str
    tensors: Mapping[str, Tensor]
    tokenizer: str | None = None
    card: Mapping[str, Any] = field(default_factory=dict)

    @property
    def offsets(self) -> bool:
        """Whether it has offsets."""
        return "layers.0.offset" in self.tensors

    @property
    def layers(self) -> int:
        """How many layers it is for."""
        return sum(name.endswith(".row") for name in self.tensors)

    @property
    def digest(self) -> str:
        """Of its tensors."""
        return table_digest({name: tensor_digest(tensor) for name, tensor in self.tensors.items()})

    def rows(self) -> Tensor:
        """(L, D): of the router."""
        return torch.stack([self.tensors[f"layers.{layer}.row"] for layer in range(self.layers)])

    def check(self, settings: DecoderSettings) -> None:
        """Refuse an expert that does not fit an anchor's sizes.

        Raises:
            JoinError: naming a tensor.
        """
        d, f = settings.hidden_size, settings.feed_forward_size
        sizes: dict[str, tuple[int, ...]] = {"gate": (f, d), "up": (f, d), "down": (d, f), "row": (d,)}
        if not settings.gated:
            del sizes["gate"]
        for layer in range(settings.layers):
            for name, shape in sizes.items():
                tensor = self.tensors.get(f"layers.{layer}.{name}")
                if tensor is None or tuple(tensor.shape) != shape:
                    found = "not there" if tensor is None else f"of shape {tuple(tensor.shape)}"
                    raise JoinError(f"expert {self.name!r}: layers.{layer}.{name} is {found}; expected {shape}")

    def write(self, folder: Path) -> list[Path]:
        """Write its folder."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in self.tensors.items()}
        save_file(tensors, folder / f".{TENSORS}")
        (folder / f".{TENSORS}").replace(folder / TENSORS)
        told = {"name": self.name, "anchor": self.anchor, "tokenizer": self.tokenizer, "digest": self.digest}
        write_atomically(folder / FILE, json.dumps({"format": 1, **told, "card": dict(self.card)}, indent=2) + "\n")
        return [folder / FILE, folder / TENSORS]

    @classmethod
    def read(cls, folder: Path | str) -> Expert:
        """What a folder holds, compared with its digest.

        Raises:
            JoinError: it is no expert's, or its tensors are not those that were written.
        """
        folder = Path(folder)
        if not (folder / FILE).is_file():
            raise JoinError(f"{folder / FILE}: no such file; take an expert out of its run with `resilin experts pack`")
        tree = read_json(folder / FILE)
        try:
            tensors = load_file(folder / TENSORS)
            found = cls(tree["name"], tree["anchor"], tensors, tree["tokenizer"], tree["card"])
            written = tree["digest"]
        except (KeyError, OSError, SafetensorError) as error:
            raise JoinError(f"{folder}: is no whole expert: {error}") from None
        if found.digest != written:
            raise JoinError(f"{folder / TENSORS}: is not the file that was written with {FILE}; ask for it again")
        return found


def experts_in(model: Decoder) -> dict[int, BesideAnchor]:
    """The mixtures of a model in training, by layer.

    Raises:
        JoinError: it trains no expert.
    """
    found: dict[int, BesideAnchor] = {}
    for layer, block in enumerate(model.blocks):
        mixed = getattr(block, "moe", None)
        if isinstance(mixed, BesideAnchor):
            found[layer] = mixed
    if len(found) != len(model.blocks):
        raise JoinError("the model trains no expert beside an anchor (model.use = 'resilin.joined.training:NewExpert')")
    return found


def anchor_digest_in(model: Decoder) -> str:
    """The digest of the anchor inside a model in training, as it is now: its folder's, unless it was changed."""
    tensors, rows = {}, []
    for name, parameter in model.named_parameters():
        if ".moe." not in name:
            tensors[name] = parameter
    for layer, mixed in experts_in(model).items():
        tensors |= {f"blocks.{layer}.mlp.{name}": parameter for name, parameter in mixed.anchor.named_parameters()}
        rows.append(mixed.anchor_row[0])
    return anchor_digest(frozen_table(tensors), torch.stack(rows), model.settings)


@torch.no_grad()
def expert_of(
    model: Decoder, name: str, *, tokenizer: str | None = None, card: Mapping[str, Any] | None = None
) -> Expert:
    """The expert that a model has trained.

    Args:
        model: as `beside_anchor` gave it.
        name: of the expert.
        tokenizer: digest of the tokenizer its data were read with.
        card: of it and its data.

    Raises:
        JoinError: the model trains none.
    """
    check_name(name)
    tensors: dict[str, Tensor] = {}
    for layer, mixed in experts_in(model).items():
        for part, parameter in mixed.own.named_parameters():
            tensors[f"layers.{layer}.{part.removesuffix('.weight')}"] = parameter.detach().clone()
        tensors[f"layers.{layer}.row"] = mixed.row[0].detach().clone()
        offsets = mixed.offsets()
        if offsets is not None:
            tensors[f"layers.{layer}.offset"] = offsets[1].detach().clone()
    return Expert(name, anchor_digest_in(model), tensors, tokenizer, card or {})


@torch.no_grad()
def expert_of_dense(
    model: Decoder, anchor: str, name: str, rows_LD: Tensor, *, card: Mapping[str, Any] | None = None
) -> Expert:
    """A dense model's feed-forwards as an expert that never learnt to stand beside the anchor: a baseline.

    Args:
        model: a dense decoder that was trained on by itself.
        anchor: digest of the anchor it started from.
        name: of the expert.
        rows_LD: of the router.
        card: of it and its data.
    """
    check_name(name)
    tensors: dict[str, Tensor] = {}
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        for part, parameter in block.mlp.named_parameters():
            tensors[f"layers.{layer}.{part.removesuffix('.weight')}"] = parameter.detach().clone()
        tensors[f"layers.{layer}.row"] = rows_LD[layer].detach().clone()
    return Expert(name, anchor, tensors, None, card or {})


@torch.no_grad()
def expert_at(
    model: Decoder, number: int, name: str, *, anchor: str = "", card: Mapping[str, Any] | None = None
) -> Expert:
    """One expert of a joined model in memory, as its owner handed it over.

    Args:
        model: with experts in every layer.
        number: of the expert; 0 is the anchor's own.
        name: to call it by.
        anchor: digest of the anchor.
        card: of it and its data.

    Raises:
        JoinError: the model has no such expert.
    """
    moe = model.settings.moe
    if moe is None or not 0 <= number < moe.experts:
        raise JoinError(f"there is no expert {number}: the model has {0 if moe is None else moe.experts}")
    check_name(name)
    tensors: dict[str, Tensor] = {}
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        for matrix in ("gate", "up", "down"):
            stack = getattr(block.moe.experts, matrix)
            if stack is not None:
                tensors[f"layers.{layer}.{matrix}"] = stack[number].detach().clone()
        tensors[f"layers.{layer}.row"] = block.moe.router.weight[number].detach().clone()
        if moe.router_bias:
            tensors[f"layers.{layer}.offset"] = block.moe.router.bias[number].detach().clone()
    return Expert(name, anchor, tensors, None, card or {})
