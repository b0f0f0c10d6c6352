"""Learning from pairs of answers, of which people or a judge like one better: DPO and its relatives as an objective.

Shapes: B pairs of a micro-batch, T positions, R = 2 B rows (chosen and rejected of each pair, side by side).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from resilin.data.pool import Pool
from resilin.keys import Keys
from resilin.nouns import Batch, Log, Loss, Mean, State, StepView, keeps_weights
from resilin.objective.next_token import IGNORE
from resilin.objective.settings import ObjectiveContext, ObjectiveSettings, needed
from resilin.posttrain.logprob_loss import Part
from resilin.posttrain.pair_terms import AVERAGED, DEFAULT_BETA, Answers, PairCosts, PairLoss, PairTerms
from resilin.posttrain.reference import CachedReference, LiveReference, ReferenceKind
from resilin.posttrain.sequences import label_states, sums_of_rows

_REJECTED_SLOTS = 2**31  # a rejected row draws other numbers than the chosen row of its pair


class Preference(ObjectiveSettings):
    """A loss over pairs; the source gives `chosen_tokens`, `chosen_labels`, `rejected_tokens`, `rejected_labels`."""

    loss: PairLoss = "dpo_norm"
    """dpo_norm is DPO with log-probabilities averaged over an answer's tokens."""
    beta: float | None = Field(default=None, gt=0)
    """Strength of the pull to the reference; left out: 5 for dpo_norm, 2 for simpo, else 0.1. A loss that averages
    over tokens needs a beta about fifty times that of one that sums."""
    average: bool | None = None
    """Log-probabilities per token instead of per answer; left out: as the loss is published (dpo_norm, ipo and simpo
    average)."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """How often the preference is taken to be the wrong way round."""
    gamma_beta_ratio: float = Field(default=0.3, ge=0)
    """Margin of simpo, as a multiple of beta."""
    reference: ReferenceKind = "cached"
    """cached: the initial model's log-probabilities are computed before training and kept in the run's folder; live:
    the initial model stays in memory; adapters_off: the model itself without the adapters that are trained, which
    must be all that is trained and start as the identity; frozen ones stay on."""
    reference_cache: Path | None = None
    """A file that several runs share, in place of the run's own."""
    dropout: bool = False
    """Whether the model's own randomness is on."""
    chunk: int | None = Field(default=None, ge=0)
    """Tokens whose logits exist at once; left out: chosen; 0: all, which admits gradients of gradients."""

    @model_validator(mode="after")
    def _fits(self) -> Preference:
        if self.loss == "ipo" and self.label_smoothing:
            raise ValueError("label_smoothing has no meaning for ipo, whose loss is a square: set it to 0")
        if self.reference_cache is not None and self.reference != "cached":
            raise ValueError(f"reference_cache names a file, but reference is {self.reference!r}: use 'cached'")
        return self

    @property
    def terms(self) -> PairTerms:
        """The loss of a pair."""
        beta = self.beta if self.beta is not None else DEFAULT_BETA[self.loss]
        averaged = self.average if self.average is not None else self.loss in AVERAGED
        return PairTerms(self.loss, beta, averaged, self.label_smoothing, self.gamma_beta_ratio)

    def build(self, context: ObjectiveContext | None = None) -> PreferenceLoss:
        """The loss; a reference needs the run."""
        if self.loss == "simpo":
            return PreferenceLoss(self, None)
        run = needed(context, f"the preference loss {self.loss!r}")
        live = LiveReference(run.initial_model, off_adapters=self.reference == "adapters_off")
        if self.reference != "cached":
            return PreferenceLoss(self, live)
        path = self.reference_cache or (run.folder / "reference.safetensors" if run.folder is not None else None)
        data = str(getattr(run.source, "data_digest", getattr(run.source, "digest", "")))
        shared = self.reference_cache is not None
        return PreferenceLoss(self, CachedReference(live, path, data, identify=shared), run.steps)


def interleaved(batch: Batch) -> tuple[Tensor, Tensor]:
    """(2 B, T) tokens and labels: chosen and rejected of each pair side by side, the shorter side padded."""
    sides = []
    width = max(batch["chosen_tokens"].shape[1], batch["rejected_tokens"].shape[1])
    for name, filler in (("tokens", 0), ("labels", IGNORE)):
        pair = [batch[f"{side}_{name}"] for side in ("chosen", "rejected")]
        pair = [torch.nn.functional.pad(x_BT, (0, width - x_BT.shape[1]), value=filler) for x_BT in pair]
        sides.append(torch.stack(pair, 1).flatten(0, 1))
    return sides[0], sides[1]


class PreferenceLoss:
    """The loss summed over pairs; units are pairs.

    A pair with an answer that has no labelled token (all of it was cut off) is no unit.
    """

    unit = "pairs"

    def __init__(
        self, settings: Preference, reference: CachedReference | LiveReference | None, steps: int | None = None
    ) -> None:
        self.settings, self.terms, self.reference, self.steps = settings, settings.terms, reference, steps
        self._prepared = False

    def __call__(self, model: nn.Module, batch: Batch, keys: Keys | None) -> Loss:
        """The loss, and `rewards/*`, `logps/*` and `lengths/*` per pair."""
        tokens_RT, labels_RT = interleaved(batch)
        lengths_B2 = (labels_RT != IGNORE).sum(1).view(-1, 2)
        kept_B = (lengths_B2 > 0).all(1)
        labels_RT = labels_RT.where(kept_B.repeat_interleave(2)[:, None], IGNORE)
        reference_B2 = self._reference(model, tokens_RT, labels_RT, batch).view(-1, 2)
        of_rows = self._row_keys(keys)
        states = label_states(model, tokens_RT, labels_RT, of_rows)
        groups = [sum(states.counts[at : at + 2]) for at in range(0, len(states.counts), 2)]
        costs: list[tuple[Tensor, PairCosts]] = []

        def score(logp_C: Tensor, part: Part) -> Tensor:
            pairs = part.groups
            logp_P2 = sums_of_rows(logp_C, states.counts[2 * pairs.start : 2 * pairs.stop]).view(-1, 2)
            chosen, rejected = (
                Answers(logp_P2[:, side], reference_B2[pairs, side], lengths_B2[pairs, side]) for side in (0, 1)
            )
            found = self.terms(chosen, rejected)
            costs.append((logp_P2.detach(), PairCosts(*(x.detach() for x in found))))
            return (found.loss_P * kept_B[pairs]).sum()

        loss = states.loss(groups, score, self.settings.chunk)
        return Loss(loss, kept_B.sum(), self._logs(costs, kept_B, lengths_B2))

    def _row_keys(self, keys: Keys | None) -> Keys | None:
        if keys is None or not self.settings.dropout:
            return None
        both = torch.stack((keys.slots_B, keys.slots_B + _REJECTED_SLOTS), 1).flatten()
        return replace(keys, slots_B=both)

    def _reference(self, model: nn.Module, tokens_RT: Tensor, labels_RT: Tensor, batch: Batch) -> Tensor:
        if self.reference is None:
            return torch.zeros(len(tokens_RT), dtype=torch.float64, device=tokens_RT.device)
        if isinstance(self.reference, LiveReference):
            return self.reference.row_logprobs(model, tokens_RT, labels_RT)
        pair_B = batch.get("pair")
        pair_B = pair_B if pair_B is not None else torch.full((len(batch),), -1)
        return self.reference.row_logprobs(model, tokens_RT, labels_RT, pair_B.repeat_interleave(2))

    def _logs(self, costs: list[tuple[Tensor, PairCosts]], kept_B: Tensor, lengths_B2: Tensor) -> dict[str, Log]:
        logp_B2 = torch.cat([logp for logp, _ in costs])
        chosen_B, rejected_B, z_B = (
            torch.cat([getattr(c, name) for _, c in costs]) for name in ("chosen_P", "rejected_P", "z_P")
        )
        count, kept = kept_B.sum(), kept_B.double()
        values = {
            "rewards/chosen": chosen_B,
            "rewards/rejected": rejected_B,
            "rewards/margins": chosen_B - rejected_B,
            "rewards/accuracies": (chosen_B > rejected_B).double(),
            "logits/pair": z_B,
            "logps/chosen": logp_B2[:, 0],
            "logps/rejected": logp_B2[:, 1],
            "lengths/chosen": lengths_B2[:, 0].double(),
            "lengths/rejected": lengths_B2[:, 1].double(),
        }
        return {name: Mean((value * kept).sum(), count) for name, value in values.items()}

    # -- the run ------------------------------------------------------------------------------------------------

    @keeps_weights
    def before_step(self, view: StepView) -> None:
        """Before the first step: the reference of every pair this run will see, then without the reference."""
        if not isinstance(self.reference, CachedReference):
            return
        if not self._prepared:
            self._prepared = True
            with view.autocast():
                self._prepare(view, self.reference)
        if self.reference.live.model is not None:  # made for held-out pairs since
            self.reference.keep()

    @torch.no_grad()
    def _prepare(self, view: StepView, reference: CachedReference) -> None:
        device = next(view.model.parameters()).device
        if getattr(view.source, "steered", False) and isinstance(view.source, Pool):
            self._prepare_pool(view, reference, device)
            return
        last = self.steps if self.steps is not None else view.step + 1
        for step in range(view.step, last):
            slots = range(view.source.slots(step))
            if not slots:
                break
            batch = view.source.fetch(step, slots)
            known = len(reference.cache)
            tokens_RT, labels_RT = self._masked(batch)
            self._reference(view.model, tokens_RT.to(device), labels_RT.to(device), batch)
            if len(reference.cache) == known and self._once_around(view.source, step - view.step):
                break  # the data come round again
        reference.keep()

    def _prepare_pool(self, view: StepView, reference: CachedReference, device: torch.device) -> None:
        """All pairs of a source whose steps are decided one by one."""
        pool: Any = view.source
        size, count = view.source.slots(view.step) or 1, sum(pool.pool_parts)
        for start in range(0, count, size):
            batch = pool.read(range(start, min(start + size, count)))
            tokens_RT, labels_RT = self._masked(batch)
            self._reference(view.model, tokens_RT.to(device), labels_RT.to(device), batch)
        reference.keep()

    @staticmethod
    def _masked(batch: Batch) -> tuple[Tensor, Tensor]:
        tokens_RT, labels_RT = interleaved(batch)
        kept_B = ((labels_RT != IGNORE).sum(1).view(-1, 2) > 0).all(1)
        return tokens_RT, labels_RT.where(kept_B.repeat_interleave(2)[:, None], IGNORE)

    @staticmethod
    def _once_around(source: Any, steps: int) -> bool:
        """Whether so many steps have read all the pairs of the source, where it says which ones it has."""
        mine = getattr(source, "mine", None)
        return mine is not None and steps * source.slots(0) >= len(mine)

    def state_dict(self) -> State:
        """Nothing: the cache is a file that can be made again."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """Nothing to take back."""
