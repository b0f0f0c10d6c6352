"""What owners and hosts train, as a run's settings name it: a new expert, or the router of a joined model.

[model]
use = "resilin.joined.training:NewExpert"
path = "anchor"            # made by `resilin experts anchor`
seed = "news-seed"         # made by `resilin experts seed`

[model]
use = "resilin.joined.training:TunedRouter"
path = "joined"            # made by `resilin experts join`
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from torch import nn

from resilin.joined.anchor import Anchor
from resilin.joined.beside import beside_anchor
from resilin.joined.errors import JoinError
from resilin.joined.record import JoinedRecord
from resilin.joined.seed import Seed
from resilin.models.decoder import Decoder
from resilin.models.pretrained import Pretrained
from resilin.models.settings import ModelContext


class NewExpert(Pretrained):
    """An expert beside a frozen anchor, whose folder is `path`: its feed-forwards, rows and offsets are trained."""

    seed: Path
    """The folder with the expert's name and the rows it starts from."""
    offsets: bool = True
    """Whether the expert has an offset below 0 on its logit in each layer: it then claims only what it is really good
    at, beside experts it has never met."""
    offset_start: float = Field(default=-0.1, lt=0)
    """Of the offsets."""

    def build(self, context: ModelContext) -> nn.Module:
        """The decoder with its expert; it computes what the anchor computes.

        Raises:
            JoinError: the folders are no anchor and no seed, or do not belong together.
            ModelFolderError: as `Pretrained`.
        """
        model = super().build(context)
        assert isinstance(model, Decoder)
        return self._beside(model)

    def outline(self, context: ModelContext) -> nn.Module:
        """The same on the meta device.

        Raises:
            JoinError, ModelFolderError: as `build`.
        """
        model = super().outline(context)
        assert isinstance(model, Decoder)
        return self._beside(model)

    def _beside(self, model: Decoder) -> Decoder:
        anchor, seed = Anchor.read(self.path), Seed.read(self.seed)
        if seed.anchor != anchor.digest:
            raise JoinError(
                f"{self.seed}: was made for another anchor ({seed.anchor}) than {self.path} ({anchor.digest}): make it "
                "anew with `resilin experts seed`"
            )
        return beside_anchor(model, anchor.rows_LD, seed.rows_LD, self.offset_start if self.offsets else None)


class TunedRouter(Pretrained):
    """A joined model, whose folder is `path`, with every expert active: the rows of its router are trained."""

    def build(self, context: ModelContext) -> nn.Module:
        """The decoder; all but its router's rows is frozen.

        Raises:
            JoinError: the folder holds no joined model.
            ModelFolderError: as `Pretrained`.
        """
        model = super().build(context)
        assert isinstance(model, Decoder)
        return router_only(self._joined(model))

    def outline(self, context: ModelContext) -> nn.Module:
        """The same on the meta device.

        Raises:
            JoinError, ModelFolderError: as `build`.
        """
        model = super().outline(context)
        assert isinstance(model, Decoder)
        return router_only(self._joined(model))

    def _joined(self, model: Decoder) -> Decoder:
        JoinedRecord.read(self.path)
        return model


def router_only(model: Decoder) -> Decoder:
    """Train a joined model's rows of the router and nothing else, with every expert active.

    Args:
        model: changed in place.

    Raises:
        JoinError: it has no experts.
    """
    moe = model.settings.moe
    if moe is None:
        raise JoinError("the model has no experts, and so no router to tune")
    use_experts(model, moe.experts)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("moe.router.weight"))
    return model


def use_experts(model: Decoder, top_k: int) -> Decoder:
    """Let a token visit so many experts, from now on.

    Args:
        model: changed in place.
        top_k: how many.

    Raises:
        JoinError: it has fewer.
    """
    moe = model.settings.moe
    if moe is None or not 0 < top_k <= moe.experts:
        raise JoinError(f"top_k is {top_k}, and the model has {0 if moe is None else moe.experts} experts")
    moe = moe.model_copy(update={"experts_per_token": top_k})
    model.settings = model.settings.model_copy(update={"moe": moe})
    for block in model.blocks:
        if block.has_experts:
            block.moe.settings = moe  # type: ignore[union-attr]
    return model
