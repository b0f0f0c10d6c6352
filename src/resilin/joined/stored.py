"""The parameters of a model folder, each read when it is asked for: joining needs no model in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from resilin.joined.errors import JoinError
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.huggingface import folder_settings
from resilin.models.huggingface_names import parts_of
from resilin.models.weight_files import weight_files


@dataclass(frozen=True, slots=True)
class _Place:
    file: Path
    name: str
    expert: int | None
    half: int | None


class StoredModel:
    """A Hugging Face folder with safetensors, whole or sharded.

    Attributes:
        folder: where it is.
        settings: of its decoder.
        dtype: of its embedding, and so of the folder.
    """

    def __init__(self, folder: Path | str) -> None:
        """Args:
        folder: of the model; of its weights only the names are read.

        Raises:
            ModelFolderError: it is none, or is broken.
            JoinError: it holds tensors that belong to no parameter.
        """
        self.folder = Path(folder)
        self.settings: DecoderSettings = folder_settings(self.folder)
        self._places: dict[str, list[_Place]] = {}
        after = self.settings.norm_place == "after"
        for file in weight_files(self.folder):
            with safe_open(file, framework="pt") as opened:
                names = list(opened.keys())
            for name in names:
                if name == "lm_head.weight" and self.settings.tie_embeddings:
                    continue
                parts = parts_of(name, norms_after=after)
                if parts is None:
                    raise JoinError(f"{file}: tensor {name!r} is not part of any model family known here")
                for part in parts:
                    place = _Place(file, name, part.expert, part.half)
                    self._places.setdefault(part.parameter, []).append(place)
        self.dtype: torch.dtype = self.read("embed.weight").dtype

    def read(self, parameter: str) -> Tensor:
        """A parameter that is stored as one tensor.

        Raises:
            JoinError: it is not there.
        """
        with safe_open(self._place(parameter).file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(self._place(parameter).name)
        return tensor

    def read_expert(self, parameter: str, expert: int) -> Tensor:
        """One matrix of stacked experts; no other is read.

        Raises:
            JoinError: it is not there.
        """
        place = self._place(parameter, expert)
        with safe_open(place.file, framework="pt") as opened:
            if place.expert is not None:
                tensor: Tensor = opened.get_tensor(place.name)
                return tensor
            stored = opened.get_slice(place.name)
            rows = stored.get_shape()[1]
            if place.half is not None:
                rows //= 2
            first = rows * (place.half or 0)
            part: Tensor = stored[expert : expert + 1, first : first + rows]
        return part[0]

    def feed_forward(self, layer: int, matrix: str, expert: int) -> Tensor:
        """A matrix (gate, up or down) of an expert; a dense model's feed-forward is its expert 0."""
        if self.settings.moe is None:
            return self.read(f"blocks.{layer}.mlp.{matrix}.weight")
        return self.read_expert(f"blocks.{layer}.moe.experts.{matrix}", expert)

    def shared_names(self) -> Iterator[str]:
        """The parameters that all experts share: all but feed-forwards and routers."""
        return (name for name in self._places if ".mlp." not in name and ".moe." not in name)

    def _place(self, parameter: str, expert: int | None = None) -> _Place:
        for place in self._places.get(parameter, ()):
            if expert is None or place.expert in (None, expert):
                return place
        which = "" if expert is None else f" of expert {expert}"
        raise JoinError(f"{self.folder}: the files hold nothing for {parameter!r}{which}")
