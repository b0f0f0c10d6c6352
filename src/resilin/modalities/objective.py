"""The next group of tokens: one loss over text, pictures, video and sound (ERNIE 5.0, section 3).

Text: cross-entropy of the next token, and of those after it. Pictures: of the bits of all tokens of a scale at once,
with bits of the history flipped at random. Sound: of the levels of the next frame.

Shapes: B rows, T positions, P pictures, N places of a picture, M of them predicted, D hidden size, d bits, Q levels, A
positions that predict sound.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from resilin.keys import Keys
from resilin.modalities.balance import BalanceSettings, LossBalance
from resilin.modalities.model import GroupDecoder, Kinds
from resilin.modalities.mtp import further
from resilin.modalities.picture_batch import PictureBatch, PictureNoise, read_pictures
from resilin.modalities.pictures import bit_losses
from resilin.modalities.scale_tokens import ScaleTokenizer
from resilin.modalities.seen import SeenPictures
from resilin.modalities.sequence import PICTURE, TEXT
from resilin.modalities.sound import SoundSteps
from resilin.models.decoder import DecoderOutput
from resilin.models.groups import Groups, ends_of, frame_gaps
from resilin.nouns import Batch, Log, Loss, Mean, State, StepView
from resilin.objective.next_token import NextToken, NextTokenLoss, valid_labels
from resilin.objective.settings import ObjectiveContext

_KINDS = ("text", "pictures", "sound")


class NextGroup(NextToken):
    """Cross-entropy of the next group; the options of text are those of `NextToken`."""

    mtp_weight: float = Field(default=0.3, ge=0)
    """Of the tokens after the next one, where the model has modules for them (ERNIE 5.0: 0.3, in mid-training 0.1)."""
    balance: BalanceSettings | None = None
    """Brings the losses of text, pictures and sound to one range; left out: they count as they are."""
    flips: float = Field(default=0.0, ge=0, le=0.5)
    """Each picture's history has a share of its bits flipped that is drawn between 0 and this (Infinity: 0.3)."""
    early: float = Field(default=0.0, ge=0)
    """e: a token of a scale of n tokens counts n**-e as much, the mean over a picture being 1; 1: all scales alike."""
    frame_window: int | None = Field(default=None, ge=1)
    """Frames of its video that a token sees, its own included; left out: all before it."""
    hidden_frames: float = Field(default=0.0, ge=0, lt=1)
    """Share of the frames of a history that later frames do not see, drawn anew for each row."""
    growing_bits: tuple[tuple[int, int], ...] = ()
    """(step, bits): how many bits of a picture's tokens are in use from each step on; empty: all, always."""

    @model_validator(mode="after")
    def _bits_grow(self) -> NextGroup:
        steps, bits = [step for step, _ in self.growing_bits], [count for _, count in self.growing_bits]
        if self.growing_bits and (steps[0] != 0 or steps != sorted(set(steps)) or bits != sorted(set(bits))):
            raise ValueError(f"growing_bits = {list(self.growing_bits)}: steps begin at 0, and both numbers increase")
        if self.growing_bits and bits[0] < 1:
            raise ValueError("growing_bits begins with 1 bit or more")
        return self

    def build(self, context: ObjectiveContext | None = None) -> NextGroupLoss:
        """The loss; pictures need the run, whose source has their tokenizer."""
        source = None if context is None else context.source
        return NextGroupLoss(self, getattr(source, "picture_tokenizer", None))


class NextGroupLoss(NextTokenLoss):
    """The loss summed over positions that predict something: each is one unit, whatever it predicts.

    Batches hold `tokens` and `labels`, and of rows with more than text the fields of `resilin.modalities.sequence` and
    `resilin.modalities.picture_batch`. In evaluation nothing is flipped, hidden, balanced or predicted further on.

    Attributes:
        balance: the weights of kinds, or None.
        bits: of a picture's token that are in use now; None: all.
    """

    by_token = False  # pictures and modules for further tokens have to see whole rows

    def __init__(self, settings: NextGroup, pictures: ScaleTokenizer | None = None) -> None:
        super().__init__(settings)
        self.own, self.tokenizer = settings, pictures
        self.balance = LossBalance(settings.balance) if settings.balance is not None else None
        self.bits = settings.growing_bits[0][1] if settings.growing_bits else None
        largest = settings.growing_bits[-1][1] if settings.growing_bits else 0
        if pictures is not None and largest > pictures.bits:
            raise ValueError(
                f"growing_bits goes up to {largest} bits, and the source's tokenizer has {pictures.bits}: raise its "
                "bits"
            )

    # -- the loss -----------------------------------------------------------------------------------------------

    def __call__(self, model: nn.Module, batch: Batch, keys: Keys | None) -> Loss:
        """The loss sum, its units, and logs by kind."""
        inner: Any = getattr(model, "_orig_mod", model)
        if not isinstance(inner, GroupDecoder):
            raise TypeError(
                f"the next group is predicted by a GroupDecoder, and the model is a {type(inner).__name__}: set "
                "model.use = 'resilin.modalities.model:GroupDecoderSettings'"
            )
        pictures = self._pictures(inner, batch, keys)
        kinds = self._kinds(inner, batch, pictures, keys)
        output = model(batch["tokens"], batch.get("positions"), batch.get("documents"), keys=keys, kinds=kinds)
        units_B = torch.zeros(len(batch), dtype=torch.float64, device=batch["tokens"].device)
        sums: dict[str, Tensor] = {}
        logs: dict[str, Log] = {}
        routers = list(getattr(output, "router_logits", ()))
        sums["text"] = self._text(inner, batch, output, kinds, keys, units_B, logs, routers)
        if inner.pictures is not None and kinds is not None:
            sums["pictures"] = self._of_pictures(inner, batch, output, pictures, units_B, logs)
        if inner.sound is not None and kinds is not None:
            sums["sound"] = self._of_sound(inner, batch, output, kinds, units_B, logs)
        weigh = self.balance is not None and keys is not None
        loss = torch.zeros((), dtype=torch.float64, device=units_B.device)
        for kind, value in sums.items():
            loss = loss + (self.balance.weight(kind) if weigh and self.balance is not None else 1.0) * value
        if routers:
            usual = inner.decoder.settings.moe.experts_per_token  # type: ignore[union-attr]
            choices = tuple(output.choices) or (usual,) * len(output.router_logits)
            choices += (usual,) * (len(routers) - len(choices))
            loss = loss + self._router_losses(
                inner.decoder, tuple(routers), choices, batch.get("documents"), units_B, logs
            )
        return Loss(loss, units_B.sum(), logs)

    def _pictures(self, model: GroupDecoder, batch: Batch, keys: Keys | None) -> PictureBatch | None:
        if batch.get("pictures") is None:
            return None
        if self.tokenizer is None or model.pictures is None:
            raise ValueError(
                "the batch holds pictures, and "
                + (
                    "the source has no tokenizer of them"
                    if self.tokenizer is None
                    else "the model has no part for them"
                )
                + ": set source.pictures and model.pictures together"
            )
        if model.pictures.bits != self.tokenizer.bits:
            raise ValueError(
                f"model.pictures.bits = {model.pictures.bits}, and the source's tokenizer has {self.tokenizer.bits}: "
                "make them equal"
            )
        noise = None if keys is None else PictureNoise(keys, self.own.flips)
        return read_pictures(batch, self.tokenizer, self.bits, noise)

    def _kinds(
        self, model: GroupDecoder, batch: Batch, pictures: PictureBatch | None, keys: Keys | None
    ) -> Kinds | None:
        modality_BT = batch.get("modality")
        if modality_BT is None:
            return None
        codes_BTQ, steps = batch.get("codes"), None
        if model.sound is not None and codes_BTQ is not None:
            next_NQ = batch["next_codes"].flatten(0, 1)
            index_A = (next_NQ[:, 0] >= 0).nonzero()[:, 0]
            steps = SoundSteps(index_A, next_NQ.index_select(0, index_A))
        features = None if pictures is None else pictures.features_PNF
        return Kinds(modality_BT, self.groups(batch, keys), features, codes_BTQ, steps, self._seen(model, batch))

    @staticmethod
    def _seen(model: GroupDecoder, batch: Batch) -> SeenPictures | None:
        numbers_BF = batch.get("seen_numbers")
        if numbers_BF is None:
            return None
        if model.seen is None:
            raise ValueError(
                "the batch holds pictures to look at, and the model has no part for them: set source.seen and "
                "model.seen together"
            )
        there_BF = numbers_BF >= 0
        return SeenPictures(batch["seen"][there_BF].float(), numbers_BF[there_BF])

    def groups(self, batch: Batch, keys: Keys | None) -> Groups:
        """Who sees whom in these rows; frames of the past are hidden where there are keys."""
        frames_BT = batch["frames"].long()
        gap_BT2 = hidden_BT = None
        if self.own.frame_window is not None:
            gap_BT2 = frame_gaps(frames_BT, batch["videos"].long(), self.own.frame_window)
        if self.own.hidden_frames and keys is not None and batch.get("frame_numbers") is not None:
            shape = tuple(batch["frame_numbers"].shape[1:])
            drawn_BF = keys.fold("hidden frames").uniform(shape, frames_BT.device) < self.own.hidden_frames
            hidden_BT = drawn_BF.gather(1, frames_BT.clamp(min=0)) & (frames_BT >= 0)
        return Groups(ends_of(batch["groups"]), gap_BT2, hidden_BT, frames_BT)

    def _text(
        self,
        model: GroupDecoder,
        batch: Batch,
        output: Any,
        kinds: Kinds | None,
        keys: Keys | None,
        units_B: Tensor,
        logs: dict[str, Log],
        routers: list[Tensor],
    ) -> Tensor:
        valid_BT, weights_BT = valid_labels(batch), batch.get("weights")
        sums, _ = self._sums(model, output, batch, valid_BT)
        tokens = valid_BT.sum()
        units_B += (valid_BT if weights_BT is None else weights_BT * valid_BT).double().sum(1)
        logs |= {"text": Mean(sums.nll, tokens), "accuracy": Mean(sums.hits, tokens), "log_z": Mean(sums.log_z, tokens)}
        if self.settings.z_loss:
            logs["z_loss"] = Mean(sums.z_loss, tokens)
        if not len(model.mtp) or keys is None or not self.own.mtp_weight:
            return sums.loss
        text_BT = None if kinds is None or kinds.modality_BT is None else kinds.modality_BT == TEXT
        asked = [further(batch, depth, text_BT) for depth in range(1, len(model.mtp) + 1)]
        states, more = model.further(
            output.hidden_BTD,
            [(one.tokens_BT, one.there_BT) for one in asked],
            batch.get("positions"),
            batch.get("documents"),
            None if kinds is None else kinds.groups,
            keys,
        )
        routers += more
        total = sums.loss
        for depth, (one, state_BTD) in enumerate(zip(asked, states, strict=True), 1):
            fields = {**batch.fields, "labels": one.labels_BT}
            if one.weights_BT is not None:
                fields["weights"] = one.weights_BT
            behind = Batch(batch.slots_B, fields)
            valid_BT = valid_labels(behind)
            of_depth, _ = self._sums(model, DecoderOutput(state_BTD), behind, valid_BT)
            logs[f"mtp_{depth}"] = Mean(of_depth.nll, valid_BT.sum())
            total = total + self.own.mtp_weight / len(asked) * of_depth.loss
        return total

    def _of_pictures(
        self,
        model: GroupDecoder,
        batch: Batch,
        output: Any,
        pictures: PictureBatch | None,
        units_B: Tensor,
        logs: dict[str, Log],
    ) -> Tensor:
        part, shape = model.pictures, None if self.tokenizer is None else self.tokenizer.shape
        if pictures is None or part is None or shape is None or not len(pictures.bits_PMd):
            nothing = torch.zeros((), dtype=torch.float64, device=units_B.device)
            logs |= {"pictures": Mean(nothing, nothing), "bits_right": Mean(nothing, nothing)}
            return nothing
        count, width = len(pictures.bits_PMd), output.hidden_BTD.shape[-1]
        hidden_PND = output.hidden_BTD[batch["modality"] == PICTURE].view(count, shape.places, width)
        logits = part.logits(hidden_PND[:, : shape.predicted].flatten(0, 1))
        active = part.bits if self.bits is None else self.bits
        nll_N, right_N = bit_losses(logits, pictures.bits_PMd.flatten(0, 1), active)
        sizes = torch.tensor([height * width for height, width in shape.scales], device=nll_N.device)
        weight_M = torch.repeat_interleave(sizes.double() ** -self.own.early, sizes)
        weight_M = weight_M / weight_M.mean()
        units_B += pictures.counts_B.to(units_B.device) * shape.predicted
        asked = torch.tensor(float(len(nll_N)), dtype=torch.float64)
        logs |= {"pictures": Mean(nll_N.detach().double().sum(), asked), "bits_right": Mean(right_N.sum(), asked)}
        return (nll_N.double().view(count, -1) * weight_M).sum()

    def _of_sound(
        self,
        model: GroupDecoder,
        batch: Batch,
        output: Any,
        kinds: Kinds,
        units_B: Tensor,
        logs: dict[str, Log],
    ) -> Tensor:
        steps, zero = kinds.steps, torch.zeros((), dtype=torch.float64, device=units_B.device)
        assert model.sound is not None
        total, hits = zero, zero
        asked = torch.tensor(0.0, dtype=torch.float64)
        if steps is not None:
            levels = range(model.sound.levels)
            nll = [F.cross_entropy(steps.logits[q], steps.next_AQ[:, q], reduction="sum").double() for q in levels]
            hits = sum(((steps.logits[q].argmax(-1) == steps.next_AQ[:, q]).double().sum() for q in levels), zero)
            total = torch.stack(nll).sum() / len(nll)
            units_B += (batch["next_codes"][..., 0] >= 0).double().sum(1)
            asked = torch.tensor(float(len(steps.index_A)), dtype=torch.float64)
        logs["sound"] = Mean(total.detach(), asked)
        logs["codes_right"] = Mean(hits / model.sound.levels, asked)
        return total

    # -- between steps ------------------------------------------------------------------------------------------

    def before_step(self, view: StepView) -> None:
        """Take as many bits of a picture's tokens as the step has."""
        for step, bits in self.own.growing_bits:
            if view.step >= step:
                self.bits = bits

    before_step.keeps_weights = True  # type: ignore[attr-defined]

    def after_step(self, view: StepView) -> None:
        """Follow the losses of the kinds."""
        if self.balance is not None:
            self.balance.observe({kind: view.logs[kind] for kind in _KINDS if kind in view.logs})
            for kind in self.balance.averages:
                view.note(f"weight_{kind}", self.balance.weight(kind))

    def state_dict(self) -> State:
        """The averages of the balance, and the bits in use."""
        if self.balance is None and self.bits is None:
            return {}
        return {"averages": dict(self.balance.averages) if self.balance is not None else {}, "bits": self.bits}

    def load_state_dict(self, state: State) -> None:
        """Take them back."""
        if self.balance is not None:
            self.balance.averages = dict(state.get("averages", {}))
        self.bits = state.get("bits", self.bits)
