"""One decoder over groups of text, pictures and sound: what goes into it and what comes out, kind by kind.

Shapes: B rows, T positions, D hidden size, P pictures, N places of a picture, F features of a place, Q levels of sound,
K codes of a level, A positions of sound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from resilin.keys import Keys
from resilin.modalities.mtp import MtpModule, MtpSettings
from resilin.modalities.pictures import PicturePart, PicturePartSettings
from resilin.modalities.seen import SeenPart, SeenPartSettings, SeenPictures
from resilin.modalities.sequence import PICTURE, SEEN, SOUND
from resilin.modalities.sound import SoundPart, SoundPartSettings, SoundSteps
from resilin.models.around import AroundDecoder
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.given import Given
from resilin.models.groups import Groups
from resilin.models.initial import initial_value
from resilin.models.rope import rotation
from resilin.models.settings import ModelContext, ModelSettings


class GroupDecoderSettings(ModelSettings):
    """A decoder with parts around it for pictures, sound and tokens further on; each is there where it is named."""

    decoder: DecoderSettings = Field(default_factory=DecoderSettings)
    """Of the decoder."""
    mtp: MtpSettings | None = None
    """Modules that predict the tokens after the next one; left out of every export."""
    pictures: PicturePartSettings | None = None
    """How pictures go in and out."""
    seen: SeenPartSettings | None = None
    """How pictures that are only looked at go in."""
    sound: SoundPartSettings | None = None
    """How sound goes in and out."""

    @model_validator(mode="after")
    def _layers_for_levels(self) -> GroupDecoderSettings:
        if self.sound is not None and self.sound.levels > self.decoder.layers:
            raise ValueError(
                f"sound.levels = {self.sound.levels}, each predicted behind a layer of its own, and decoder.layers = "
                f"{self.decoder.layers}: use more layers or fewer levels"
            )
        if self.decoder.loop is not None or self.decoder.chains is not None:
            raise ValueError("a decoder of groups has neither loops nor chains: leave decoder.loop and .chains out")
        return self

    def build(self, context: ModelContext) -> GroupDecoder:
        """The decoder and its parts, with initial weights."""
        decoder = self.decoder.build(context)
        model = GroupDecoder(self, decoder)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not name.startswith(("decoder.", "seen.")):
                    parameter.copy_(initial_value(name, parameter.shape, decoder.settings, context.seed))
            if model.seen is not None:
                model.seen.fill(context.seed)
        return model


@dataclass(frozen=True)
class Kinds:
    """What the positions of a batch are, beside text.

    Attributes:
        modality_BT: int64, see `resilin.modalities.sequence`; None: all of it is text.
        groups: who sees whom.
        features_PNF: of the places of every picture, in the order of rows and places.
        codes_BTQ: of sound, -1 where there is none.
        steps: what is predicted of sound, and how.
        seen: pictures that are looked at.
    """

    modality_BT: Tensor | None = None
    groups: Groups | None = None
    features_PNF: Tensor | None = None
    codes_BTQ: Tensor | None = None
    steps: SoundSteps | None = None
    seen: SeenPictures | None = None


class GroupOutput(NamedTuple):
    """What the decoder gives.

    Attributes:
        hidden_BTD: after the final norm.
        router_logits, choices: as of `resilin.models.decoder.DecoderOutput`.
        sound: (A, K) logits of each level, of the positions that `SoundSteps` names.
    """

    hidden_BTD: Tensor
    router_logits: tuple[Tensor, ...] = ()
    choices: tuple[int, ...] = ()
    sound: tuple[Tensor, ...] = ()


class GroupDecoder(AroundDecoder):
    """See `GroupDecoderSettings`; of text alone it gives what its decoder gives."""

    def __init__(self, settings: GroupDecoderSettings, decoder: Decoder) -> None:
        super().__init__()
        self.own = settings
        self.decoder = decoder
        decoder.indivisible = "the parts of a GroupDecoder see whole rows, so it goes with data parallelism alone"
        width, own = decoder.settings.hidden_size, decoder.settings
        depths = range(1, settings.mtp.depth + 1) if settings.mtp is not None else ()
        self.mtp = nn.ModuleList(MtpModule(own, depth) for depth in depths)
        self.pictures = PicturePart(settings.pictures, own) if settings.pictures is not None else None
        self.sound = SoundPart(settings.sound, own) if settings.sound is not None else None
        self.seen = SeenPart(settings.seen, own) if settings.seen is not None else None
        self.width = width

    @property
    def inner(self) -> Decoder:
        """The decoder."""
        return self.decoder

    def plain_form(self) -> nn.Module:
        """The decoder, which has nothing around it any more."""
        self.decoder.indivisible = None
        return self.decoder

    def embedded(self, tokens_BT: Tensor, kinds: Kinds) -> Tensor:
        """(B, T, D): what goes into the first block."""
        x_BTD: Tensor = self.decoder.embed(tokens_BT).to(self.decoder.stream_dtype)
        if kinds.modality_BT is None:
            return x_BTD
        values: dict[int, Tensor] = {}
        if self.pictures is not None and kinds.features_PNF is not None:
            values[PICTURE] = self.pictures.embedded(kinds.features_PNF.flatten(0, 1))
        if self.sound is not None and kinds.codes_BTQ is not None:
            values[SOUND] = self.sound.embedded(kinds.codes_BTQ[kinds.modality_BT == SOUND])
        if self.seen is not None and kinds.seen is not None:
            values[SEEN] = self.seen.embedded(kinds.seen)
        for kind, values_ND in values.items():
            index_N = (kinds.modality_BT == kind).flatten().nonzero()[:, 0]
            if kind == SEEN and len(index_N) != len(values_ND):
                raise ValueError(
                    f"{len(index_N)} positions for {len(values_ND)} tokens of pictures that are looked at: "
                    "source.seen.cell is model.seen.patch * side, and frames are the same in both"
                )
            flat_ND = x_BTD.flatten(0, 1).index_copy(0, index_N, values_ND.to(x_BTD.dtype))
            x_BTD = flat_ND.view(x_BTD.shape)
        return x_BTD

    def forward(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        *,
        keys: Keys | None = None,
        kinds: Kinds | None = None,
        **more: Any,
    ) -> Any:
        """What the decoder gives; with `kinds`, of rows that hold more than text."""
        if kinds is None:
            return self.decoder(tokens_BT, positions_BT, documents_BT, keys=keys, **more)
        after = None
        if kinds.steps is not None:
            assert self.sound is not None
            after = self.sound.predicting(kinds.steps, self.decoder.settings.layers)
        given = Given(self.embedded(tokens_BT, kinds), kinds.groups, after)
        output = self.decoder(tokens_BT, positions_BT, documents_BT, keys=keys, given=given)
        found = () if kinds.steps is None else tuple(kinds.steps.logits)
        return GroupOutput(output.hidden_BTD, output.router_logits, output.choices, found)

    def further(
        self,
        states_BTD: Tensor,
        ahead_BT: list[tuple[Tensor, Tensor]],
        positions_BT: Tensor | None,
        documents_BT: Tensor | None,
        groups: Groups | None,
        keys: Keys | None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The states (B, T, D) from which the head predicts the tokens after the next one, depth by depth, and the
        logits of routers on the way.

        Args:
            states_BTD: the decoder's, after its final norm.
            ahead_BT: for each depth the tokens that it reads, and which are there.
            positions_BT: as for the decoder.
            documents_BT: as for the decoder.
            groups: as for the decoder.
            keys: for dropout.
        """
        decoder, T = self.decoder, states_BTD.shape[1]
        positions = torch.arange(T, device=states_BTD.device) if positions_BT is None else positions_BT
        turn = rotation(decoder.settings, positions, T)
        last = decoder.settings.window_of(decoder.settings.layers - 1)
        mask = decoder.masks_of(documents_BT, None, None, T, states_BTD.device, groups)[last]
        found, routers, x_BTD = [], [], states_BTD
        for module, (tokens_BT, there_BT) in zip(self.mtp, ahead_BT, strict=True):
            token_BTD = decoder.embed(tokens_BT).to(x_BTD.dtype) * there_BT[..., None]
            x_BTD, router = module(x_BTD, token_BTD, turn, mask, keys)
            found.append(module.norm(x_BTD))  # type: ignore[operator]
            if router is not None:
                routers.append(router)
        return found, routers
