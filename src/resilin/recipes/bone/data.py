"""A shifted task: C++ for a model of Python, and how much of its Python it forgets."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from resilin.config import component
from resilin.data.errors import DataError
from resilin.data.settings import SourceContext, SourceSettings
from resilin.data.shards import TokenShards
from resilin.keys import Keys
from resilin.nouns import Batch, Loss, Mean, Source
from resilin.objective.settings import ObjectiveContext, ObjectiveSettings
from resilin.recipes.standard_library import StandardLibrary
from resilin.transforms import ObjectiveTransform, SourceTransform

ORIGINAL = "original"


class TorchHeaders(StandardLibrary):
    """The C++ headers that torch is installed with (BSD licence), one token a byte, one document a header."""

    def shards(self) -> TokenShards:
        """The token shards, written where they are missing.

        Raises:
            DataError: for a torch without its headers.
        """
        folder = Path(torch.__file__).parent / "include"
        found = [(path.relative_to(folder).as_posix(), path) for path in folder.rglob("*.h")]
        if not found:
            raise DataError(f"{folder}: this torch was installed without its headers (*.h)")
        files = [path for _, path in sorted(found, key=lambda item: hashlib.sha256(item[0].encode()).digest())]
        listing = [f"{name} {path.stat().st_size}" for name, path in sorted(found)]
        text = "\n".join([torch.__version__, str(self.bytes), *listing])
        target = self.cache / f"torch-headers-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        return self.written(files, target)


class Adaptation(SourceSettings):
    """Trains on `target`; its held-out batches hold as many rows of `original` beside those of `target`."""

    target: Annotated[SourceSettings, component("resilin.recipes.bone.data:TorchHeaders")] = Field(
        default_factory=dict, validate_default=True
    )
    """The task to adapt to."""
    original: Annotated[SourceSettings, component("resilin.recipes.standard_library:StandardLibrary")] = Field(
        default_factory=dict, validate_default=True
    )
    """What the model was trained on before, with the same tokenizer and row length."""

    def build(self, context: SourceContext) -> Source:
        """The target alone for training, both for validation."""
        target = self.target.build(context)
        return target if context.split == "train" else BothTasks(target, self.original.build(context))


class BothTasks(SourceTransform):
    """Validation batches of two tasks; the field `original` tells the rows apart."""

    def __init__(self, inner: Source, original: Source) -> None:
        super().__init__(inner)
        self.original = original

    def __len__(self) -> int:
        """As many batches as both have."""
        return min(len(self.inner), len(self.original))  # type: ignore[arg-type]

    def fetch(self, step: int, slots: Sequence[int]) -> Batch:
        """Rows of the target, then rows of the original."""
        parts = [self.inner.fetch(step, slots), self.original.fetch(step, slots)]
        fields: dict[str, torch.Tensor] = {
            name: torch.cat([part[name] for part in parts]) for name in parts[0].fields if name in parts[1].fields
        }
        fields[ORIGINAL] = torch.cat([torch.full((len(p),), i == 1) for i, p in enumerate(parts)])
        return Batch(torch.cat([part.slots_B for part in parts]), fields)


class AdaptationLoss(ObjectiveSettings):
    """The loss on the target; on held-out batches also the loss on the original task, as the log `original`."""

    objective: Annotated[ObjectiveSettings, component("resilin.objective.next_token:NextToken")] = Field(
        default_factory=dict, validate_default=True
    )
    """The loss itself."""

    def build(self, context: ObjectiveContext | None = None) -> AdaptationObjective:
        """The loss."""
        return AdaptationObjective(self.objective.build(context))


class AdaptationObjective(ObjectiveTransform):
    """As the loss it wraps, for rows that are not of the original task."""

    def __call__(self, model: torch.nn.Module, batch: Batch, keys: Keys | None) -> Loss:
        """The target's loss and units; `original` in the logs where the batch has such rows."""
        original_B = batch.get(ORIGINAL)
        if original_B is None:
            return self.inner(model, batch, keys)
        mine, other = (self.inner(model, _rows(batch, which), keys) for which in (~original_B, original_B))
        logs: Mapping[str, Any] = {**mine.logs, "original": Mean(other.sum.detach(), other.units)}
        return Loss(mine.sum, mine.units, logs)


def _rows(batch: Batch, which_B: torch.Tensor) -> Batch:
    fields = {name: tensor[which_B] for name, tensor in batch.fields.items() if name != ORIGINAL}
    return Batch(batch.slots_B[which_B.cpu()], fields)
