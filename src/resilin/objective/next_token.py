"""Next-token prediction: the loss of a decoder language model."""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from torch import nn

from resilin.keys import Keys
from resilin.nouns import Batch, Loss, Mean, State
from resilin.objective.settings import ObjectiveSettings


class NextToken(ObjectiveSettings):
    """Cross-entropy of the next token."""

    z_loss: float = 0.0

    def build(self) -> NextTokenLoss:
        """The loss."""
        return NextTokenLoss(self)


class NextTokenLoss:
    """Cross-entropy summed over labels other than -100."""

    def __init__(self, settings: NextToken):
        self.settings = settings

    def __call__(self, model: nn.Module, batch: Batch, keys: Keys | None) -> Loss:
        """The loss sum, its units and logs."""
        labels_N = batch["labels"].reshape(-1)
        out = model(batch["tokens"], batch.get("positions"), batch.get("documents"), keys=keys)
        logits_NV = cast(Any, model).logits(out.hidden).flatten(0, 1).float()
        nll = F.cross_entropy(logits_NV, labels_N, reduction="sum", ignore_index=-100)
        valid_N = labels_N != -100
        units = valid_N.sum()
        hits = ((logits_NV.detach().argmax(-1) == labels_N) & valid_N).sum()
        return Loss(nll, units, {"nll": Mean(nll.detach(), units), "accuracy": Mean(hits, units)})

    def state_dict(self) -> State:
        """Nothing: the loss has no state."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """Nothing to take back."""
