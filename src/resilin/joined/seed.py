"""What an owner's training starts from beside the anchor: a name, and the rows of the router that its data suggest.

    news-seed/
      seed.json          name, digest of the anchor, how rows were made
      seed.safetensors   rows (L, D)

Shapes: L layers, D hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from resilin.joined.errors import JoinError
from resilin.joined.expert import check_name
from resilin.models.weight_files import read_json, write_atomically

FILE, ROWS = "seed.json", "seed.safetensors"


@dataclass(frozen=True, slots=True)
class Seed:
    """A new expert's name and rows.

    Attributes:
        name: of the expert.
        anchor: digest of the anchor it will be trained beside.
        rows_LD: of the router.
        domain: how they were made.
    """

    name: str
    anchor: str
    rows_LD: Tensor
    domain: Mapping[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> list[Path]:
        """Write its folder.

        Raises:
            JoinError: its name is none.
        """
        check_name(self.name)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"rows": self.rows_LD.detach().cpu().float().contiguous()}, folder / ROWS)
        tree = {"format": 1, "name": self.name, "anchor": self.anchor, "domain": dict(self.domain)}
        write_atomically(folder / FILE, json.dumps(tree, indent=2) + "\n")
        return [folder / FILE, folder / ROWS]

    @classmethod
    def read(cls, folder: Path | str) -> Seed:
        """What a folder holds.

        Raises:
            JoinError: it is none.
        """
        folder = Path(folder)
        if not (folder / FILE).is_file():
            raise JoinError(f"{folder / FILE}: no such file; make it with `resilin experts seed ANCHOR FOLDER`")
        tree = read_json(folder / FILE)
        try:
            return cls(tree["name"], tree["anchor"], load_file(folder / ROWS)["rows"], tree["domain"])
        except (KeyError, OSError) as error:
            raise JoinError(f"{folder}: is no whole seed: {error}; make it anew") from None
