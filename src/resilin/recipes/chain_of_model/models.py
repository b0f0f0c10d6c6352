"""A trained model that goes on in one of several ways, and a plain decoder that is read at its first parts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from resilin.adapt.adapted import Adapted
from resilin.adapt.settings import AdapterSettings
from resilin.config import component
from resilin.keys import Keys
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.settings import ModelContext, ModelSettings
from resilin.nested import Budget, BudgetError, budget
from resilin.nested.chain_models import ChainTuned, Expanded
from resilin.nested.in_place import decoder_in
from resilin.nouns import Batch, Log, Loss, Mean
from resilin.objective.settings import ObjectiveContext, ObjectiveSettings
from resilin.recipes.stage import Stage
from resilin.transforms import ObjectiveTransform


class ReadAt(ObjectiveSettings):
    """Any objective, whose held-out data are read at parts of the model too."""

    objective: Annotated[ObjectiveSettings, component("resilin.objective.next_token:NextToken")] = Field(
        default_factory=dict, validate_default=True
    )
    """What is learned, by the whole model."""
    budgets: tuple[dict[str, Any], ...]
    """The parts, as budgets: logged as `loss_at_1`, `loss_at_2`, ..."""

    def build(self, context: ObjectiveContext | None = None) -> ReadAtLoss:
        """The objective."""
        return ReadAtLoss(self, self.objective.build(context))


class ReadAtLoss(ObjectiveTransform):
    """The objective of `ReadAt`."""

    def __init__(self, settings: ReadAt, inner: Any) -> None:
        super().__init__(inner)
        self.parts = tuple(Budget.from_dict(one) for one in settings.budgets)

    def __call__(self, model: nn.Module, batch: Batch, keys: Keys | None) -> Loss:
        """The inner loss; without keys (evaluation) with those of the parts in the logs."""
        whole = self.inner(model, batch, keys)
        if keys is not None:
            return whole
        logs: dict[str, Log] = dict(whole.logs)
        for number, part in enumerate(self.parts, 1):
            with budget(model, part):
                loss = self.inner(model, batch, None)
            logs[f"loss_at_{number}"] = Mean(loss.sum, loss.units)
        return Loss(whole.sum, whole.units, logs)


class Grown(ModelSettings):
    """The model at the end of another run, as it goes on."""

    run: dict[str, Any]
    """The settings of that run; it is kept as `resilin.recipes.stage:Stage` keeps its own."""
    by: Literal["nothing", "chain", "shared_chain", "width", "lora", "head"] = "nothing"
    """nothing: all its weights are trained. chain: one chain more, alone trained; shared_chain: one that shares keys.
    width: a wider plain model, all of it trained. lora: adapters. head: of a decoder of chains, the output matrix
    alone."""
    heads: int = Field(default=4, gt=0)
    """Query heads that are added."""
    rank: int = Field(default=16, gt=0)
    """Of LoRA."""

    def stage(self) -> Stage:
        """The earlier run."""
        return Stage(run=self.run)

    def build(self, context: ModelContext) -> nn.Module:
        """The model, of which what is to be trained is.

        Raises:
            StageError: the earlier run did not end well.
            BudgetError: the model cannot grow so.
        """
        stage: Any = self.stage()
        if self.by in ("chain", "shared_chain"):
            share_keys = self.by == "shared_chain"
            return Expanded(model=stage, heads=self.heads, share_keys=share_keys).build(context)
        if self.by == "head":
            return ChainTuned(model=stage, trained="head").build(context)
        if self.by == "lora":
            adapters = {"default": AdapterSettings(method="lora", rank=self.rank)}
            return Adapted(model=stage, adapters=adapters).build(context)
        model = stage.build(context)
        return widened(decoder_in(model), self.heads, context.seed) if self.by == "width" else model


@torch.no_grad()
def widened(old: Decoder, heads: int, seed: int) -> Decoder:
    """A plain decoder with a trained one in its leading rows and columns.

    What is new is drawn as in an untrained one, but for the head's columns, which are zero.

    Args:
        old: plain.
        heads: query heads that are added; all widths grow in proportion.
        seed: of the new weights.

    Raises:
        BudgetError: see `widened_settings`.
    """
    wide = Decoder(widened_settings(old.settings, heads), seed=seed)
    sources = dict(old.named_parameters())
    for name, parameter in wide.named_parameters():
        source = sources["embed.weight" if name == "head.weight" and old.head is None else name]
        if name == "head.weight":
            parameter.zero_()
        parameter[tuple(slice(0, size) for size in source.shape)] = source
    return wide


def widened_settings(settings: DecoderSettings, heads: int) -> DecoderSettings:
    """The settings of a plain decoder with more heads, everything else in proportion.

    Raises:
        BudgetError: they do not come out even, or the model is more than that.
    """
    if settings.chains is not None or settings.moe is not None or settings.loop is not None or settings.layer_sizes:
        raise BudgetError("a plain decoder is made wider: without chains, experts, loops or sizes by layer")
    whole = settings.heads + heads
    widths = (settings.hidden_size, settings.key_heads, settings.feed_forward_size)
    if any(width * whole % settings.heads for width in widths):
        raise BudgetError(f"{heads} more heads beside {settings.heads} do not make whole widths of {widths}")
    hidden, keys, mlp = (width * whole // settings.heads for width in widths)
    changes = {
        "hidden_size": hidden, "heads": whole, "kv_heads": keys, "head_size": settings.head_width, "mlp_size": mlp,
        "tie_embeddings": False,
    }  # fmt: skip
    return DecoderSettings.model_validate(settings.model_copy(update=changes).model_dump())
