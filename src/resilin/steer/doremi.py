"""DoReMi: domain weights that make the worst domain, compared with a reference model, better.

Three runs: (1) a reference model on fixed proportions; (2) a small proxy on uniformly drawn domains, whose *loss* is
weighted by alpha, which this weighter moves; its mean over the run is written down; (3) the final model on domains
drawn by that mean. In the proxy run nothing but the loss is weighted: drawing by alpha too would count it twice.

Source: Xie et al., "DoReMi: Optimizing data mixtures speeds up language model pretraining", 2023, algorithm 1; the
centred and clipped form is that of the DataFlex code.
Shapes: B samples, T tokens, k domains.
"""

from __future__ import annotations

import json
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from resilin.config import component
from resilin.models.settings import ModelContext, ModelSettings
from resilin.objective.next_token import valid_labels
from resilin.steer.evaluating import device_of
from resilin.steer.stored import Decisions
from resilin.steer.weighter import StepLook, Weighter, WeightError

WEIGHTS_FILE = "doremi.json"


def excess(
    proxy_BT: Tensor, reference_BT: Tensor, valid_BT: Tensor, domains_B: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """lambda_i, the mean over domain i's tokens of max(proxy loss - reference loss, 0), (k,) float64; and its tokens.

    A domain without tokens has 0.
    """
    clipped_B = ((proxy_BT - reference_BT).clamp(min=0) * valid_BT).double().sum(1)
    sums_k = torch.zeros(k, dtype=torch.float64).index_add_(0, domains_B, clipped_B)
    tokens_k = torch.zeros(k, dtype=torch.float64).index_add_(0, domains_B, valid_BT.double().sum(1))
    return sums_k / tokens_k.clamp(min=1), tokens_k


def next_alpha(
    alpha_k: Tensor, excess_k: Tensor, tokens_k: Tensor, *, eta: float, c: float, centred: bool, clip: float | None
) -> Tensor:
    """Alpha <- (1 - c) normalised(alpha * exp(eta * lambda)) + c / k, (k,) float64.

    Args:
        alpha_k: sums to 1.
        excess_k: lambda.
        tokens_k: of each domain in the batch; 0 marks one that is absent, whose lambda stays 0.
        eta: step size.
        c: smoothing.
        centred: take away the mean lambda of the domains present.
        clip: bound of |lambda| after that, or None.
    """
    present_k = tokens_k > 0
    if centred:
        excess_k = torch.where(present_k, excess_k - excess_k[present_k].mean(), 0.0)
    if clip is not None:
        excess_k = excess_k.clamp(-clip, clip)
    moved_k = (alpha_k.log() + eta * excess_k).softmax(0)
    return (1 - c) * moved_k + c / len(alpha_k)


class DoReMi(Weighter):
    """The proxy run's weights: each sample counts as much as its domain's alpha.

    Writes `doremi.json` ({"weights": {domain: mean alpha}, ...}) and `doremi.jsonl` into the run's folder.
    """

    reference: Annotated[ModelSettings, component("resilin.models.pretrained:Pretrained")]
    """The reference model: the exported folder of the first run."""
    eta: Annotated[float, Field(ge=0)] = 0.1
    """Step size; 1.0 in the paper."""
    c: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of alpha that is spread evenly; 0.001 in the paper."""
    centred: bool = False
    """Centre lambda over the domains of the batch, as the code of DataFlex does; the paper does not."""
    clip: Annotated[float, Field(gt=0)] | None = None
    """Bound of |lambda|; 5 in the code of DataFlex, none in the paper."""
    update_steps: Annotated[int, Field(ge=1)] = 1
    """Steps between moves of alpha."""

    def weights(self, look: StepLook) -> Tensor:
        """Alpha of each sample's domain.

        Raises:
            WeightError: the batch does not say which domain its samples are of.
        """
        domains_B = look.batch.get("domains")
        if domains_B is None or look.names is None:
            raise WeightError(
                "weighter DoReMi needs batches of several named domains: set source.use = 'resilin.steer.mix:Mixed'"
            )
        k, step, memory = len(look.names), look.view.step, look.memory
        if "alpha" not in memory:
            memory["alpha"] = torch.full((k,), 1 / k, dtype=torch.float64)
            memory["sum"], memory["count"] = torch.zeros(k, dtype=torch.float64), 0
        if step % self.update_steps == 0:
            proxy_BT, reference_BT = look.token_losses(), look.token_losses(self._reference(look))
            lambda_k, tokens_k = excess(proxy_BT, reference_BT, valid_labels(look.batch), domains_B, k)
            memory["alpha"] = next_alpha(
                memory["alpha"], lambda_k, tokens_k, eta=self.eta, c=self.c, centred=self.centred, clip=self.clip
            )
            memory["sum"], memory["count"] = memory["sum"] + memory["alpha"], memory["count"] + 1
            look.figures |= {f"excess/{n}": v for n, v in zip(look.names, lambda_k.tolist(), strict=True)}
            self._write(look, step)
        look.figures |= {f"alpha/{n}": v for n, v in zip(look.names, memory["alpha"].tolist(), strict=True)}
        mean_k = memory["sum"] / memory["count"]
        look.figures |= {f"alpha_mean/{n}": v for n, v in zip(look.names, mean_k.tolist(), strict=True)}
        weights_B: Tensor = memory["alpha"][domains_B]
        return weights_B

    def _reference(self, look: StepLook) -> nn.Module:
        if "reference" not in look.cache:
            model = self.reference.build(ModelContext(look.seed, getattr(look.view.source, "vocab_size", None)))
            look.cache["reference"] = model.to(device_of(look.view.model)).eval().requires_grad_(False)
        found: nn.Module = look.cache["reference"]
        return found

    def _write(self, look: StepLook, step: int) -> None:
        if look.folder is None or look.names is None:
            return
        mean_k = look.memory["sum"] / look.memory["count"]
        named = dict(zip(look.names, look.memory["alpha"].tolist(), strict=True))
        Decisions(look.folder, "doremi").log(step=step, alpha=named)
        averaged = dict(zip(look.names, mean_k.tolist(), strict=True))
        temporary = look.folder / f".{WEIGHTS_FILE}.tmp"
        temporary.write_text(json.dumps({"weights": averaged, "step": step}, indent=1) + "\n", encoding="utf-8")
        temporary.replace(look.folder / WEIGHTS_FILE)
