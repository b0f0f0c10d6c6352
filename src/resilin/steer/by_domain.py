"""Any objective, with the loss of every domain in the logs."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from resilin.config import component
from resilin.keys import Keys
from resilin.nouns import Batch, Log, Loss, Mean, Objective
from resilin.objective.next_token import valid_labels
from resilin.objective.settings import ObjectiveContext, ObjectiveSettings
from resilin.steer.token_losses import predicts_tokens, sample_losses, token_losses
from resilin.transforms import ObjectiveTransform


class ByDomain(ObjectiveSettings):
    """Logs, for each domain of the source, `nll/<domain>` (mean loss per unit) and `share/<domain>` of the samples."""

    objective: Annotated[ObjectiveSettings, component("resilin.objective.next_token:NextToken")] = Field(
        default_factory=dict, validate_default=True
    )
    """What is trained on."""

    def build(self, context: ObjectiveContext | None = None) -> ByDomainLoss:
        """The objective; the domains' names come from the source."""
        source = None if context is None else context.source
        return ByDomainLoss(self.objective.build(context), domain_names(source))


def domain_names(source: Any) -> tuple[str, ...] | None:
    """The names of a source's domains: its own, or the numbers of its parts; None where it has no parts."""
    names = getattr(source, "domain_names", None)
    if names is not None:
        return tuple(names)
    parts = getattr(source, "pool_parts", ())
    return tuple(str(number) for number in range(len(parts))) if len(parts) > 1 else None


class ByDomainLoss(ObjectiveTransform):
    """The inner loss. Batches without `domains` are passed on as they are.

    A next-token loss is taken from the model's output a second time, without a graph; of any other objective each
    sample is computed once more, alone.
    """

    def __init__(self, inner: Objective, names: tuple[str, ...] | None) -> None:
        super().__init__(inner)
        self.names = names

    def __call__(self, model: nn.Module, batch: Batch, keys: Keys | None) -> Loss:
        """The inner loss, with more logs."""
        domains_B = batch.get("domains")
        if domains_B is None:
            return self.inner(model, batch, keys)
        outputs: list[Any] = []
        handle = model.register_forward_hook(lambda module, args, output: outputs.append(output))
        try:
            loss = self.inner(model, batch, keys)
        finally:
            handle.remove()
        logs: dict[str, Log] = dict(loss.logs)
        sums_B, units_B = self._of_samples(model, batch, outputs)
        count = int(domains_B.max()) + 1 if self.names is None else len(self.names)
        names = self.names or tuple(str(number) for number in range(count))
        total = torch.tensor(float(len(batch)), device=sums_B.device)
        for number, name in enumerate(names):
            mine_B = domains_B == number
            logs[f"nll/{name}"] = Mean(sums_B[mine_B].sum(), units_B[mine_B].sum())
            logs[f"share/{name}"] = Mean(mine_B.sum().double(), total)
        return Loss(loss.sum, loss.units, logs)

    @torch.no_grad()
    def _of_samples(self, model: nn.Module, batch: Batch, outputs: list[Any]) -> tuple[Tensor, Tensor]:
        if predicts_tokens(self.inner) and len(outputs) == 1:
            losses_BT = token_losses(model, batch, outputs[0])
            return losses_BT.sum(1).double(), valid_labels(batch).sum(1).double()
        losses_B = sample_losses(model, self.inner, batch).double()
        return losses_B, torch.ones_like(losses_B)
