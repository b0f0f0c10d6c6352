"""Nemotron Elastic (NVIDIA, 2025): one trained model becomes several nested ones, whose sizes a router learns.

[objective]
use = "resilin.nested.elastic:NemotronElastic"

for a `model.use = "resilin.nested.elastic_model:Elastic"`. Each sample of a step is computed at the size of a target
that is drawn for it. While the router learns, all of the model is computed under masks; afterwards, and in evaluation,
its choices are slices. The loss of a target's tokens is

    KL(teacher || sub-model) + router_weight * |expected cost - target| / target

Shapes: B samples, R rows of choices, J sizes of an axis.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from resilin.config import Settings
from resilin.keys import Keys
from resilin.models.cut import running
from resilin.nested.budgets import BudgetError
from resilin.nested.cost import cost
from resilin.nested.elastic_model import ElasticModel
from resilin.nested.in_place import budget, full
from resilin.nested.router import gumbel, gumbel_softmax
from resilin.nouns import Batch, Log, Loss, Mean, StepView, keeps_weights
from resilin.objective.cross_entropy import CrossEntropyTerms
from resilin.objective.distill import Distilled
from resilin.objective.distillation import DistillationTerms, TeacherStates, chunked_distillation
from resilin.objective.next_token import NextToken, softcap_of, valid_labels, valid_tokens
from resilin.objective.settings import ObjectiveContext, ObjectiveSettings
from resilin.objective.vocabulary import whole_head
from resilin.transforms import ObjectiveTransform

FILE = "elastic.json"
"""In the run's folder: the sizes of each target, as they were chosen last."""


class Phase(Settings):
    """A part of the curriculum."""

    until: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the run's steps at which it ends."""
    weights: tuple[Annotated[float, Field(ge=0)], ...] = ()
    """How often each target is drawn, in any proportion; empty: all alike."""


class NemotronElastic(ObjectiveSettings):
    """Sub-models of several sizes, and the router that chooses them, learned together from the whole model."""

    teacher: Literal["frozen", "full", "none"] = "frozen"
    """frozen: the whole model as it was before the first step (the paper). full: the whole model as it is, which learns
    from the labels with weight `ce_weight` while the others learn from it. none: everyone learns from the labels."""
    temperature: float = Field(default=1.0, gt=0)
    """Of the distillation."""
    ce_weight: float = Field(default=0.0, ge=0)
    """Of the cross-entropy with the labels beside the distillation; with `teacher = "full"`, of the whole model's."""
    mask: Literal["straight-through", "soft", "logit"] = "straight-through"
    """What is computed while the router learns. straight-through: the likeliest sizes, with the gradient of soft masks.
    soft: the mixture of all sizes (the paper's mode 2). logit: the likeliest sizes times their logits (mode 1)."""
    temperatures: tuple[float, float] = (1.0, 0.05)
    """Of the Gumbel softmax, at the beginning and the end of the router's learning."""
    logit_scales: tuple[float, float] = (1.0, 10.0)
    """Factor of the router's logits, likewise."""
    router_weight: float = Field(default=1.0, ge=0)
    """lambda, of the distance to the target."""
    router_until: float = Field(default=1.0, ge=0, le=1)
    """Share of the steps in which the router learns; then it stays as it is and sub-models are slices."""
    phases: tuple[Phase, ...] = (Phase(),)
    """The curriculum of targets; that of lengths is the source's (`resilin.data.lengths`)."""
    draw: Literal["sample", "step"] = "sample"
    """Whether each sample of a batch has a target of its own, or all samples of a step the same one."""
    evaluate_all: bool = True
    """Whether held-out data is read at all targets (`loss_at_0.5`, `kl_at_0.5`) and not by the whole model alone."""

    @model_validator(mode="after")
    def _check(self) -> NemotronElastic:
        ends = [phase.until for phase in self.phases]
        if not ends or ends[-1] != 1 or any(b <= a for a, b in pairwise(ends)):
            raise ValueError(f"phases end at {ends}: expected ascending shares of the run, the last of them 1")
        for phase in self.phases:
            if phase.weights and not sum(phase.weights):
                raise ValueError("weights of a phase are all 0: some target has to be trained")
        if self.temperatures[1] <= 0 or self.temperatures[0] <= 0:
            raise ValueError(f"temperatures are {list(self.temperatures)}: they are larger than 0")
        return self

    def build(self, context: ObjectiveContext | None = None) -> ElasticLoss:
        """The objective.

        Raises:
            ValueError: a frozen teacher without a run.
        """
        plain = NextToken().build(context)
        inner = plain
        if self.teacher == "frozen":
            frozen = Distilled(kl_weight=1.0, ce_weight=self.ce_weight, temperature=self.temperature)
            inner = frozen.build(context)
        folder = None if context is None else context.folder
        return ElasticLoss(self, inner, plain, folder, None if context is None else context.steps)


class Moment(NamedTuple):
    """What a step computes with.

    Attributes:
        learns: whether the router does.
        temperature: of its softmax.
        scale: of its logits.
        weights: of the targets.
    """

    learns: bool
    temperature: float
    scale: float
    weights: tuple[float, ...]


def moment(settings: NemotronElastic, step: int, steps: int, targets: int) -> Moment:
    """What a step (from 0) of a run computes with.

    Raises:
        BudgetError: a phase has other weights than one for each target.
    """
    done = step / max(steps, 1)
    phase = next(one for one in settings.phases if done < one.until or one is settings.phases[-1])
    weights = phase.weights or (1.0,) * targets
    if len(weights) != targets:
        raise BudgetError(f"a phase has {len(weights)} weights for {targets} targets: give one for each")
    last = settings.router_until * steps
    share = min(1.0, step / max(last - 1, 1))

    def between(ends: tuple[float, float]) -> float:
        return ends[0] + share * (ends[1] - ends[0])

    return Moment(step < last, between(settings.temperatures), between(settings.logit_scales), tuple(weights))


def drawn(weights: tuple[float, ...], uniform_B: Tensor) -> list[int]:
    """The target of each sample, from numbers that are uniform in [0, 1)."""
    edges = torch.tensor(weights, dtype=torch.float64).cumsum(0)
    found = torch.searchsorted(edges / edges[-1], uniform_B.double().cpu(), right=True)
    last = max(number for number, weight in enumerate(weights) if weight)
    return [int(number) for number in found.clamp(max=last).tolist()]


def selected(shares: Mapping[str, Tensor], logits: Mapping[str, Tensor], mask: str) -> dict[str, Tensor]:
    """(R, J) weights of the masks of each choice.

    Args:
        shares: probabilities of each axis.
        logits: they were made of.
        mask: as in the settings.
    """
    if mask == "soft":
        return dict(shares)
    found = {}
    for name, share_RJ in shares.items():
        hard_RJ = torch.zeros_like(share_RJ).scatter_(-1, share_RJ.argmax(-1, keepdim=True), 1.0)
        found[name] = hard_RJ * logits[name] if mask == "logit" else hard_RJ + share_RJ - share_RJ.detach()
    return found


class ElasticLoss(ObjectiveTransform):
    """The objective of `NemotronElastic`; logs `loss_at_<target>` and, while the router learns, `cost_at_<target>`, the
    expected cost as a share of the whole, `router` (the penalty), `temperature`.
    """

    by_token = False

    def __init__(
        self, settings: NemotronElastic, inner: Any, plain: Any, folder: Path | None, steps: int | None
    ) -> None:
        super().__init__(inner)
        self.elastic, self.plain, self.folder, self.steps = settings, plain, folder, steps

    @staticmethod
    def model_in(model: nn.Module) -> ElasticModel:
        """The elastic model that a model is, or has inside.

        Raises:
            BudgetError: there is none.
        """
        found = next((one for one in model.modules() if isinstance(one, ElasticModel)), None)
        if found is None:
            raise BudgetError(
                "the objective is for elastic models: set model.use = 'resilin.nested.elastic_model:Elastic'"
            )
        return found

    @keeps_weights
    def before_step(self, view: StepView) -> None:
        """Refuses a model that has no router, and remembers how many steps there are."""
        super().before_step(view)
        self.steps = view.steps or self.steps
        model = self.model_in(view.model)
        moment(self.elastic, view.step, self._steps, len(model.elastic.targets))

    def after_step(self, view: StepView) -> None:
        """Writes down the sizes that are chosen, once the router learns no more."""
        super().after_step(view)
        ends = {self.steps, round(self.elastic.router_until * self._steps)}
        if self.folder is not None and view.step in ends:
            write_chosen(self.model_in(view.model), self.folder)

    @property
    def _steps(self) -> int:
        if self.steps is None:
            raise BudgetError("temperatures and phases follow the run's steps, which nobody has told: set train.steps")
        return self.steps

    def __call__(self, model: nn.Module, batch: Batch, keys: Keys | None) -> Loss:
        """The loss of each target's samples; without keys (evaluation) of the whole model, the others' in the logs."""
        elastic = self.model_in(model)
        if keys is None:
            return self._evaluated(model, elastic, batch)
        now = moment(self.elastic, keys.step, self._steps, len(elastic.elastic.targets))
        per_step = self.elastic.draw == "step"
        chooser = Keys.of_step(keys.seed, keys.step) if per_step else keys
        uniform_B = chooser.fold("target").uniform((1,)).flatten().expand(len(batch.slots_B))
        targets = drawn(now.weights, uniform_B)
        total: Tensor | None = None
        units = torch.zeros((), dtype=torch.float64, device=batch["tokens"].device)
        logs: dict[str, Log] = {}
        for target in sorted(set(targets)):
            rows = [row for row, one in enumerate(targets) if one == target]
            loss = self._at(model, elastic, _rows(batch, rows), _keys(keys, rows), target, now)
            total = loss.sum if total is None else total + loss.sum
            units = units + loss.units
            for name, log in loss.logs.items():
                logs[name] = log if name not in logs else logs[name].merge(log)  # type: ignore[arg-type]
        assert total is not None
        return Loss(total, units, logs)

    def _at(self, model: nn.Module, elastic: ElasticModel, batch: Batch, keys: Keys, target: int, now: Moment) -> Loss:
        label = f"{elastic.elastic.targets[target]:g}"
        decoder, whole = elastic.decoder, target == len(elastic.elastic.targets) - 1
        if whole or not now.learns or not elastic.axes:
            with budget(decoder, elastic.budget_of(target)):
                loss = self._task(model, elastic, batch, keys, whole=whole)
            return Loss(loss.sum, loss.units, {**loss.logs, f"loss_at_{label}": Mean(loss.sum.detach(), loss.units)})
        logits = elastic.router(target)
        noise = Keys.of_step(keys.seed, keys.step).fold("gumbel").fold(target)
        shares = {
            name: gumbel_softmax(one_RJ, now.temperature, now.scale, gumbel(noise.fold(name), one_RJ))
            for name, one_RJ in logits.items()
        }
        weights = selected(shares, {name: one * now.scale for name, one in logits.items()}, self.elastic.mask)
        cut = elastic.masks.cut(elastic.settings, elastic.axes, weights)
        with running(decoder, cut):
            loss = self._task(model, elastic, batch, keys, whole=False)
        expected = elastic.costs.expected(elastic.axes, shares, elastic.masks.kept(shares))
        wanted = elastic.elastic.targets[target]
        penalty = (expected - wanted).abs() / wanted * loss.units
        logs: dict[str, Log] = {
            **loss.logs,
            f"loss_at_{label}": Mean(loss.sum.detach(), loss.units),
            f"cost_at_{label}": Mean(expected.detach() * loss.units, loss.units),
            "router": Mean(penalty.detach(), loss.units),
            "temperature": Mean(now.temperature * loss.units, loss.units),
        }
        return Loss(loss.sum + self.elastic.router_weight * penalty, loss.units, logs)

    def _task(self, model: nn.Module, elastic: ElasticModel, batch: Batch, keys: Keys | None, *, whole: bool) -> Loss:
        """What a size learns, run as this thread now runs it."""
        if self.elastic.teacher != "full":
            found: Loss = self.inner(model, batch, keys)
            return found
        if whole:
            loss: Loss = self.plain(model, batch, keys)
            return Loss(self.elastic.ce_weight * loss.sum, loss.units, loss.logs)
        return self._from_the_whole(model, elastic, batch, keys)

    def _from_the_whole(self, model: nn.Module, elastic: ElasticModel, batch: Batch, keys: Keys | None) -> Loss:
        """The divergence from the whole model as it is, to which no gradient flows."""
        fields = batch["tokens"], batch.get("positions"), batch.get("documents")
        output = model(*fields, keys=keys)
        with torch.no_grad(), full(elastic.decoder):
            target_BTD = model(*fields, keys=None).hidden_BTD
            whole_VD = elastic.decoder.head_weight
        valid_BT = valid_labels(batch)
        states_ND, target_ND, labels_N, weights_N = valid_tokens(
            (output.hidden_BTD, target_BTD, batch["labels"], batch.get("weights")), valid_BT
        )
        assert states_ND is not None
        assert target_ND is not None
        assert labels_N is not None
        # Inside a slice the head has as many columns as the stream has channels.
        head, cap = whole_head(model, "objective.teacher = 'full'"), softcap_of(model)
        terms = DistillationTerms(0.0, 1.0, self.elastic.temperature, "forward")
        teacher = TeacherStates(target_ND, whole_VD.detach(), cap)
        sums, kl = chunked_distillation(
            states_ND, head, labels_N, weights_N, teacher, CrossEntropyTerms(softcap=cap), terms
        )
        units = valid_BT.sum().double() if weights_N is None else weights_N.double().sum()
        tokens = valid_BT.sum()
        return Loss(sums.loss, units, {"nll": Mean(sums.nll, tokens), "kl": Mean(kl, tokens)})

    def _evaluated(self, model: nn.Module, elastic: ElasticModel, batch: Batch) -> Loss:
        targets = elastic.elastic.targets
        with full(elastic.decoder):
            whole: Loss = self.plain(model, batch, None)
            logs: dict[str, Log] = dict(whole.logs)
        if not self.elastic.evaluate_all:
            return whole
        for number, share in enumerate(targets):
            with budget(elastic.decoder, elastic.budget_of(number)):
                loss: Loss = self.inner(model, batch, None)
            logs[f"loss_at_{share:g}"] = loss.logs["nll"]
            if "kl" in loss.logs:
                logs[f"kl_at_{share:g}"] = loss.logs["kl"]
            wanted = cost_of(elastic, number) * whole.units
            logs[f"cost_at_{share:g}"] = Mean(wanted, whole.units)
        return Loss(whole.sum, whole.units, logs)


def cost_of(elastic: ElasticModel, target: int) -> float:
    """The cost of the sub-model that is chosen for a target, as a share of the whole."""
    picked = elastic.chosen(target)
    shares: dict[str, Tensor] = {
        axis.name: torch.nn.functional.one_hot(torch.tensor(picked[axis.name]), axis.choices).double()
        for axis in elastic.axes
    }
    return float(elastic.costs.expected(elastic.axes, shares, elastic.masks.kept(shares)))


def write_chosen(elastic: ElasticModel, folder: Path) -> Path:
    """Write the sizes that are chosen for each target, and what they cost, as JSON; beside it a budget for each target,
    which `resilin extract --budget` takes.
    """
    told: dict[str, Any] = {"measure": elastic.elastic.measure, "layers_by_importance": list(elastic.order)}
    found = {}
    for number, share in enumerate(elastic.elastic.targets):
        wanted = elastic.budget_of(number)
        sizes = cost(elastic.settings, wanted)
        found[f"{share:g}"] = {
            "budget": wanted.to_dict(),
            "choices": elastic.chosen(number),
            "cost": cost_of(elastic, number),
            "parameters": sizes.parameters,
        }
        _write(folder / f"budget-{share:g}.json", wanted.to_dict())
    return _write(folder / FILE, {**told, "targets": found})


def _write(path: Path, tree: Mapping[str, Any]) -> Path:
    temporary = path.with_name(f"{path.name}.{os.getpid()}")  # several workers write the same
    temporary.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path


def _rows(batch: Batch, rows: list[int]) -> Batch:
    if len(rows) == len(batch.slots_B):
        return batch
    index = torch.tensor(rows)
    fields = {name: field[index.to(field.device)] for name, field in batch.fields.items()}
    return Batch(batch.slots_B[index], fields)


def _keys(keys: Keys, rows: list[int]) -> Keys:
    index = torch.tensor(rows)
    return replace(keys, slots_B=keys.slots_B[index], steps_B=None if keys.steps_B is None else keys.steps_B[index])
