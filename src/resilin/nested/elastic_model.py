"""A model made ready for Nemotron Elastic: its parts put in order of importance, and a router beside it.

[model]
use = "resilin.nested.elastic_model:Elastic"
targets = [0.5, 0.75, 1]
space = { ffn = [0.5, 0.75, 1], heads = [0.5, 1], depth = [0.75, 1] }
[model.model]
use = "resilin.models.pretrained:Pretrained"
path = "models/parent"
[model.calibration]
use = "resilin.data.text_source:TextSource"
paths = ["data/text"]
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from resilin.config import component
from resilin.data.settings import SourceContext, SourceSettings
from resilin.models.around import AroundDecoder
from resilin.models.decoder import Decoder
from resilin.models.settings import ModelContext, ModelSettings
from resilin.nested.budgets import Budget
from resilin.nested.elastic_choice import fitting
from resilin.nested.elastic_cost import CostTable, Measure, measured_by
from resilin.nested.elastic_masks import MaskTable
from resilin.nested.elastic_space import ElasticSpace, Share, axes_of, budget_of
from resilin.nested.importance import put_in_order
from resilin.nested.ranking import By, depth_order, order_stream, scores_by
from resilin.nested.router import Router
from resilin.nouns import Batch


class Elastic(ModelSettings):
    """A trained decoder or hybrid, put in order, with the router that chooses its sizes."""

    model: Annotated[ModelSettings, component("resilin.models.pretrained:Pretrained")]
    """The trained model."""
    calibration: Annotated[SourceSettings, component("resilin.data.text_source:TextSource")] | None = None
    """The text that importance is measured on; `ranking = "activation"` and the ranking of layers need it."""
    calibration_batches: int = Field(default=8, gt=0)
    """How many batches of it."""
    calibration_rows: int = Field(default=8, gt=0)
    """Rows of each. The paper reads 1,024 rows of 8,192 tokens in all."""
    ranking: By = "activation"
    """What channels, neurons and heads are put in order by: their activations (the paper), their weights, numbers that
    say nothing, or as they are."""
    depth_ranking: Literal["iterative", "single", "none"] = "iterative"
    """How layers are ranked by what the logits lose without them: one is removed at a time and the others are measured
    anew; all are measured once; or the last layers count least."""
    space: ElasticSpace = ElasticSpace()
    """The sizes that there are."""
    targets: tuple[Share, ...] = (0.5, 0.75, 1.0)
    """The sub-models: shares of the whole's cost, ascending; the last is the whole, which nobody chooses for."""
    measure: Measure = "parameters"
    """The cost: all parameters, those without embedding and head, operations of a token, or bytes of the cache (keys,
    values and states) of a text."""
    tokens: int | None = Field(default=None, gt=0)
    """Of such a text; left out: as many as the model is meant for."""
    within: float = Field(default=0.02, gt=0, le=1)
    """How far from its target a sub-model's cost may be, as a share of it: sizes are the likeliest of all that are as
    near, or the nearest, where none is. 1: the likeliest of each layer, whatever they cost (the paper)."""
    router_size: int = Field(default=256, gt=0)
    """Width of the router's networks."""

    @model_validator(mode="after")
    def _check(self) -> Elastic:
        if len(self.targets) < 2 or self.targets[-1] != 1 or any(b <= a for a, b in pairwise(self.targets)):
            raise ValueError(f"targets is {list(self.targets)}: expected ascending shares, the last of them 1")
        deep = len(self.space.depth) > 1 and self.depth_ranking != "none"
        if self.calibration is None and (self.ranking == "activation" or deep):
            raise ValueError(
                "importance is measured on text: set model.calibration, or ranking = 'weight' and "
                "depth_ranking = 'none'"
            )
        return self

    def build(self, context: ModelContext) -> ElasticModel:
        """The model in order, and its router with initial weights.

        Raises:
            BudgetError: the sizes do not fit the model.
            ImportanceError: it cannot be put in order.
        """
        decoder = self._decoder(self.model.build(context))
        axes_of(decoder.settings, self.space)
        batches = self._batches(context.seed)
        order = tuple(range(decoder.settings.layers))
        if len(self.space.depth) > 1 and self.depth_ranking != "none":
            order = depth_order(decoder, batches, iterative=self.depth_ranking == "iterative")
        scores = scores_by(self.ranking, decoder, batches, context.seed)
        if scores is not None:
            put_in_order(decoder, scores)
            order_stream(decoder, scores["hidden"])
        return ElasticModel(decoder, self, order, context.seed)

    def outline(self, context: ModelContext) -> ElasticModel | None:
        """The same on the meta device, nothing measured."""
        inner = self.model.outline(context)
        if inner is None:
            return None
        decoder = self._decoder(inner)
        return ElasticModel(decoder, self, tuple(range(decoder.settings.layers)), None, "meta")

    @staticmethod
    def _decoder(model: nn.Module) -> Decoder:
        if not isinstance(model, Decoder):
            raise ValueError(f"model.model should be a decoder or a hybrid, and is a {type(model).__name__}")
        return model

    def _batches(self, seed: int) -> list[Batch]:
        if self.calibration is None:
            return []
        source = self.calibration.build(SourceContext(seed=seed, batch_size=self.calibration_rows))
        return [source.fetch(step, range(source.slots(step))) for step in range(self.calibration_batches)]


class ElasticModel(AroundDecoder):
    """Called, it is the decoder, in whatever size it is run.

    Attributes:
        decoder: all of it.
        router: chooses the sizes of each target.
        order_L: its layers, the most important first.
        elastic: its settings.
    """

    leaves_out_unasked = True

    def __init__(
        self,
        decoder: Decoder,
        elastic: Elastic,
        order: Sequence[int],
        seed: int | None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.elastic = elastic
        self.axes = axes_of(decoder.settings, elastic.space)
        self.decoder = decoder
        self.router = Router(len(elastic.targets), self.axes, elastic.router_size, seed, device)
        self.order_L: Tensor
        self.register_buffer("order_L", torch.tensor(list(order), dtype=torch.int64, device=device))
        self._masks: tuple[tuple[int, ...], MaskTable] | None = None
        self._costs: CostTable | None = None
        self._chosen: tuple[Tensor, dict[int, dict[str, list[int]]]] | None = None

    @property
    def inner(self) -> Decoder:
        """The whole decoder, of which each sub-model is the leading part."""
        return self.decoder

    def original_form(self) -> nn.Module:
        """The same."""
        return self.decoder

    @property
    def order(self) -> tuple[int, ...]:
        """Its layers, the most important first."""
        return tuple(int(layer) for layer in self.order_L.tolist())

    @property
    def masks(self) -> MaskTable:
        """The masks of all choices."""
        order = self.order
        if self._masks is None or self._masks[0] != order:
            self._masks = order, MaskTable.of(self.settings, self.elastic.space, self.axes, order)
        return self._masks[1]

    @property
    def costs(self) -> CostTable:
        """What all choices cost."""
        if self._costs is None:
            measured = measured_by(self.elastic.measure, self.elastic.tokens)
            self._costs = CostTable.of(self.settings, self.elastic.space, self.axes, measured)
        return self._costs

    def chosen(self, target: int) -> dict[str, list[int]]:
        """The likeliest choices of a target (its number), without noise, of those that cost what it says (`within`);
        none is larger than a larger target's.
        """
        state = torch.cat([self.order_L.double(), *(p.detach().double().flatten() for p in self.router.parameters())])
        if self._chosen is None or not torch.equal(self._chosen[0], state):  # they are looked for once a router
            self._chosen = state, {}
        known = self._chosen[1]
        if target not in known:
            known[target] = self._choose(target)
        return known[target]

    @torch.no_grad()
    def _choose(self, target: int) -> dict[str, list[int]]:
        if target == len(self.elastic.targets) - 1:
            return {axis.name: [axis.choices - 1] * axis.rows for axis in self.axes}
        larger, mine = self.chosen(target + 1), self.router(target)
        wanted, within = self.elastic.targets[target], self.elastic.within
        if within < 1:
            return fitting(mine, self.axes, self.costs, self.masks.kept_JL, larger, wanted, within)
        return {
            name: [min(one, most) for one, most in zip(logits.argmax(-1).tolist(), larger[name], strict=True)]
            for name, logits in mine.items()
        }

    def budget_of(self, target: int) -> Budget:
        """The sub-model of a target (its number): what is run in place, and taken out."""
        if target == len(self.elastic.targets) - 1:
            return Budget()
        return budget_of(self.settings, self.elastic.space, self.axes, self.chosen(target), self.order)
