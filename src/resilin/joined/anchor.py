"""The anchor: a public dense model, frozen, and the row of the router that stands for it; what all owners start from.

    anchor/
      config.json, *.safetensors, tokenizer files    the model, as any Hugging Face folder
      anchor.json                                    its digest, and how rows were made
      anchor.safetensors                             rows (L, D)

The folder opens as an ordinary model too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from resilin.data.tokenizer import TOKENIZER_FILE, Tokenizer
from resilin.joined.beside import check_anchor
from resilin.joined.digest import table_digest, tensor_digest
from resilin.joined.errors import JoinError
from resilin.joined.stored import StoredModel
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.weight_files import read_json, write_atomically
from resilin.run.export import export_model

FILE, ROWS = "anchor.json", "anchor.safetensors"


@dataclass(frozen=True, slots=True)
class Anchor:
    """An anchor's folder; of its weights nothing is in memory.

    Attributes:
        folder: where it is.
        name: of its own feed-forward among experts.
        settings: of the dense decoder.
        digest: of everything that is frozen, its rows too.
        tokenizer: digest of its tokenizer; None where it has none.
        rows_LD: of the router.
        domain: how rows are made of documents (`resilin.joined.domain`).
    """

    folder: Path
    name: str
    settings: DecoderSettings
    digest: str
    tokenizer: str | None
    rows_LD: Tensor
    domain: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path | str) -> Anchor:
        """What a folder holds.

        Raises:
            JoinError: it is no anchor, or its rows do not fit.
        """
        folder = Path(folder)
        if not (folder / FILE).is_file():
            raise JoinError(f"{folder / FILE}: no such file; make an anchor with `resilin experts anchor MODEL FOLDER`")
        tree = read_json(folder / FILE)
        stored = StoredModel(folder)
        try:
            rows = load_file(folder / ROWS)["rows"]
            told = (tree["name"], stored.settings, tree["digest"], tree["tokenizer"])
            return cls(folder, *told, rows_LD=rows, domain=tree["domain"])
        except (KeyError, OSError) as error:
            raise JoinError(f"{folder}: is no whole anchor: {error}; make it anew") from None


def frozen_table(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Digests of a dense decoder's parameters, by name."""
    return {name: tensor_digest(tensor) for name, tensor in tensors.items()}


def anchor_digest(table: Mapping[str, str], rows_LD: Tensor, settings: DecoderSettings) -> str:
    """The digest of an anchor.

    Args:
        table: of its parameters, by their names in the dense decoder.
        rows_LD: of the router.
        settings: of the decoder, dense or joined.
    """
    return table_digest({**table, "rows": tensor_digest(rows_LD)}, settings)


def stored_table(stored: StoredModel) -> dict[str, str]:
    """Digests of what is frozen in a folder, one tensor in memory at a time; of a joined one, expert 0 is the dense
    model's feed-forward.
    """
    table = {name: tensor_digest(stored.read(name)) for name in stored.shared_names()}
    matrices = ("gate", "up", "down") if stored.settings.gated else ("up", "down")
    for layer in range(stored.settings.layers):
        for matrix in matrices:
            name = f"blocks.{layer}.mlp.{matrix}.weight"
            table[name] = tensor_digest(stored.feed_forward(layer, matrix, 0))
    return table


def make_anchor(
    model: Decoder,
    tokenizer: Tokenizer | None,
    rows_LD: Tensor,
    output: Path,
    *,
    name: str = "public",
    domain: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    force: bool = False,
) -> Anchor:
    """Write an anchor's folder.

    Args:
        model: the public model, a dense decoder.
        tokenizer: its own.
        rows_LD: of the router, in each layer.
        output: a new or empty folder, unless `force`.
        name: of its own feed-forward among experts.
        domain: how the rows were made.
        dtype: of the stored weights: all experts are joined in it.
        force: replace the files of an earlier export.

    Raises:
        JoinError: the model cannot be an anchor.
        ExportError: the folder is in use, or cannot be written.
    """
    check_anchor(model.settings, str(output))
    export_model(model, tokenizer, output, dtype=dtype, force=force)
    rows_LD = rows_LD.detach().to(device="cpu", dtype=torch.float32).to(dtype).float().contiguous()
    save_file({"rows": rows_LD}, output / ROWS)
    stored = StoredModel(output)
    digest = anchor_digest(stored_table(stored), rows_LD, stored.settings)
    tree = {
        "format": 1,
        "name": name,
        "digest": digest,
        "tokenizer": stored_tokenizer(output),
        "domain": dict(domain or {}),
    }
    write_atomically(output / FILE, json.dumps(tree, indent=2) + "\n")
    return Anchor.read(output)


def stored_tokenizer(folder: Path) -> str | None:
    """The digest of a folder's tokenizer; None where it has none."""
    return Tokenizer.load(folder).digest if (folder / TOKENIZER_FILE).is_file() else None
