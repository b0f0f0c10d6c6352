"""The loss of classification: cross-entropy summed over samples.

Legend: B samples, V views of each, K classes.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import Annotated, Any, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from resilin.keys import Keys
from resilin.nouns import Batch, Log, Loss, Mean, State
from resilin.objective.settings import ObjectiveContext, ObjectiveSettings


class Classification(ObjectiveSettings):
    """Cross-entropy of `labels` (B,) given the model's logits (B, K) for `inputs`; -100 is no unit.

    A batch with `views` (B, V, ...) instead of `inputs` is judged by the mean of the predicted probabilities over V.
    """

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """s: the target becomes (1 - s) * one-hot + s / K."""
    mixup: Annotated[float, Field(ge=0)] = 0.0
    """Alpha of mixup (Zhang et al., 2018): each sample is mixed with another of its micro-batch; 0: not at all."""

    def build(self, context: ObjectiveContext | None = None) -> ClassificationLoss:
        """The loss."""
        source = context.source if context is not None else None
        grid = getattr(source, "full", None)
        return ClassificationLoss(self, len(getattr(source, "classes", ())), grid.kind if grid else "samples")


@lru_cache(maxsize=64)
def _takes_keys(kind: Any) -> bool:
    parameters = inspect.signature(kind.forward).parameters.values()
    return any(p.name == "keys" or p.kind is p.VAR_KEYWORD for p in parameters)


def mean_prediction(logits_V: Sequence[Tensor]) -> Tensor:
    """The logarithm (B, K) of the mean over views of the predicted probabilities."""
    log_p_VBK = torch.stack(tuple(logits_V)).log_softmax(-1)
    return log_p_VBK.logsumexp(0) - math.log(len(log_p_VBK))


class ClassificationLoss:
    """See `Classification`. Units are samples; logs are `nll`, `top1` and, with more than five classes, `top5`.

    A model whose `forward` has no parameter `keys` (one from another library) is called with the inputs alone.
    """

    def __init__(self, settings: Classification, classes: int = 0, unit: str = "samples"):
        """Args:
        settings: of the loss.
        classes: of the source; 0 where it is not known.
        unit: what samples are.
        """
        self.settings, self.classes, self.unit = settings, classes, unit

    def __call__(self, model: nn.Module, batch: Batch, keys: Keys | None) -> Loss:
        """The loss sum, its units and logs; without keys (evaluation) nothing is mixed."""
        views, labels_B, shares = batch.get("views"), batch["labels"], None
        if views is not None:
            # One view of everybody after the other: as much memory as a batch of single views.
            logits_BK = mean_prediction([self._logits(model, views[:, v], None) for v in range(views.shape[1])])
        elif keys is not None and self.settings.mixup:
            inputs, partners_B, shares = self._mix(batch["inputs"], keys)
            logits_BK = self._logits(model, inputs, keys)
        else:
            logits_BK = self._logits(model, batch["inputs"], keys)
        if self.classes > logits_BK.shape[1]:
            raise ValueError(
                f"the source has {self.classes} classes and the model {logits_BK.shape[1]} outputs: set model.classes "
                f"= {self.classes}"
            )
        loss_B = self._cross_entropy(logits_BK, labels_B)
        if shares is not None:
            loss_B = shares * loss_B + (1 - shares) * self._cross_entropy(logits_BK, labels_B[partners_B])
        valid_B = labels_B >= 0
        units = valid_B.sum()
        return Loss((loss_B * valid_B).sum(), units, self._logs(logits_BK.detach(), labels_B, units))

    @staticmethod
    def _logits(model: nn.Module, inputs: Tensor, keys: Keys | None) -> Tensor:
        inner = getattr(model, "_orig_mod", model)  # what torch.compile wraps
        takes_keys = _takes_keys(cast(Hashable, type(inner)))
        logits_BK: Tensor = model(inputs, keys=keys) if takes_keys else model(inputs)
        return logits_BK.float()

    def _cross_entropy(self, logits_BK: Tensor, labels_B: Tensor) -> Tensor:
        return F.cross_entropy(logits_BK, labels_B, reduction="none", label_smoothing=self.settings.label_smoothing)

    def _mix(self, inputs: Tensor, keys: Keys) -> tuple[Tensor, Tensor, Tensor]:
        """Mixed inputs, each sample's partner and its own share.

        The share of a slot is max(x, 1 - x) of a Beta(alpha, alpha) draw keyed by the slot, so that a sample stays
        mostly itself; the partner is its neighbour in the micro-batch, whose order is random already.
        """
        words = keys.fold("mixup").bits((2,)).tolist()
        alpha, drawn = self.settings.mixup, []
        for first, second in words:
            generator = torch.Generator().manual_seed(first << 32 | second)
            pair = torch._sample_dirichlet(torch.tensor([alpha, alpha], dtype=torch.float64), generator=generator)
            drawn.append(max(pair.tolist()))
        shares_B = torch.tensor(drawn, dtype=inputs.dtype, device=inputs.device)
        partners_B = torch.arange(len(inputs), device=inputs.device).roll(1)
        wide = shares_B.view(-1, *[1] * (inputs.ndim - 1))
        return wide * inputs + (1 - wide) * inputs[partners_B], partners_B, shares_B

    @staticmethod
    def _logs(logits_BK: Tensor, labels_B: Tensor, units: Tensor) -> dict[str, Log]:
        nll = F.cross_entropy(logits_BK, labels_B, reduction="sum")
        logs: dict[str, Log] = {"nll": Mean(nll, units)}
        best_BK = logits_BK.topk(min(5, logits_BK.shape[1]), dim=1).indices
        hits_BK = best_BK == labels_B[:, None]
        logs["top1"] = Mean(hits_BK[:, 0].sum(), units)
        if logits_BK.shape[1] > 5:
            logs["top5"] = Mean(hits_BK.sum(), units)
        return logs

    def state_dict(self) -> State:
        """Nothing: the loss has no state."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """Nothing to take back."""
