"""Pictures, video and sound from a trained decoder of groups, with or without a text in front; and text about pictures.

A picture takes one pass for each scale, sound one for each frame. Rows are read again as a whole each time: a cache of
keys and values holds no groups.

Shapes: R rows, P pictures of all rows, N places of a picture, d bits, h, w cells of the finest grid, Q levels, A frames
of sound, K codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from resilin.inference.sampling import GREEDY, Sampling, filtered
from resilin.inference.sampling import draw as draw_token
from resilin.keys import Keys
from resilin.modalities.model import GroupDecoder, Kinds
from resilin.modalities.scale_tokens import ScaleTokenizer
from resilin.modalities.seen import SeenPictures
from resilin.modalities.sequence import PICTURE, SOUND, Document, Frames, Seen, Sound, Words, places_of, row_of
from resilin.modalities.sound import SoundSteps
from resilin.models.groups import Groups, ends_of, frame_gaps

DrawBits = Callable[[int, int, Tensor], Tensor]
"""(frame, scale, probability of each bit being 1 (R, n, d)) -> bits (R, n, d) bool."""


def _rows(documents: Sequence[Document], levels: int, device: torch.device) -> dict[str, Tensor]:
    width = max(places_of(document) for document in documents)
    laid = [row_of([document], width, levels) for document in documents]
    return {name: torch.stack([row[name] for row in laid]).to(device) for name in laid[0]}


def _keyed_bits(seed: int, rows: int) -> DrawBits:
    keys = Keys(seed, 0, torch.arange(rows)).fold("picture")

    def draw(frame: int, scale: int, chance_Rnd: Tensor) -> Tensor:
        shape = tuple(chance_Rnd.shape[1:])
        return keys.fold(frame).fold(scale).uniform(shape, chance_Rnd.device) < chance_Rnd

    return draw


def _needed(part: object, what: str) -> None:
    if part is None:
        raise ValueError(f"the model has no part for {what}: train one with model.{what} set")


@torch.no_grad()
def sample_pictures(
    model: GroupDecoder,
    pictures: ScaleTokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    frames: int = 1,
    seed: int = 0,
    temperature: float = 1.0,
    active: int | None = None,
    frame_window: int | None = None,
    draw: DrawBits | None = None,
) -> Tensor:
    """(R, frames, C, H, W): a picture, or a video, behind each text.

    Args:
        model: in evaluation mode.
        pictures: the tokenizer it was trained with (`pictures.safetensors` in its run's folder).
        prompts: token ids of each text; empty ones are allowed.
        frames: of the video; 1: a picture.
        seed: of the draws; a row's picture depends on its prompt, its number and the seed.
        temperature: divides the logits of bits; 0: the more probable value of each bit.
        active: bits of a token in use; None: all.
        frame_window: as in training.
        draw: chooses bits in place of the seed.

    Raises:
        ValueError: the model has no part for pictures, or for others than these.
    """
    _needed(model.pictures, "pictures")
    assert model.pictures is not None
    if model.pictures.bits != pictures.bits:
        raise ValueError(f"the model's pictures have {model.pictures.bits} bits a token, these {pictures.bits}")
    rows, shape, device = len(prompts), pictures.shape, model.head_weight.device
    choose = draw or _keyed_bits(seed, rows)
    levels = 0 if model.sound is None else model.sound.levels
    texts = [[Words(list(ids))] if ids else [] for ids in prompts]
    fields = _rows([[*text, Frames(frames, shape)] for text in texts], levels, device)
    gap = None
    if frame_window is not None:
        gap = frame_gaps(fields["frames"], fields["videos"], frame_window)
    groups = Groups(ends_of(fields["groups"]), gap)
    there_RT = fields["modality"] == PICTURE
    features = torch.zeros(rows, frames, shape.places, pictures.features, device=device)
    empty = torch.zeros(rows, pictures.bits, *shape.finest, device=device)
    before, videos = empty, []
    for frame in range(frames):
        so_far = [empty]
        follows_R = torch.full((rows,), frame > 0, device=device)
        for scale, (height, width) in enumerate(shape.scales):
            known = pictures.features_of(so_far, before, follows_R)
            features[:, frame, : known.shape[1]] = known
            kinds = Kinds(fields["modality"], groups, features.flatten(0, 1), fields.get("codes"))
            output = model(fields["tokens"], fields["positions"], fields["documents"], kinds=kinds)
            hidden = output.hidden_BTD[there_RT].view(rows, frames, shape.places, -1)
            own = hidden[:, frame, known.shape[1] - height * width : known.shape[1]]
            logits_Rnd = model.pictures.logits(own)
            chance_Rnd = (logits_Rnd / temperature).sigmoid() if temperature else (logits_Rnd > 0).to(logits_Rnd.dtype)
            bits_Rdhw = choose(frame, scale, chance_Rnd).transpose(1, 2).unflatten(2, (height, width))
            so_far.append(so_far[-1] + pictures.contribution(scale, bits_Rdhw, active))
        if shape.seen_whole:
            features[:, frame] = pictures.features_of(so_far, before, follows_R)
        before = so_far[-1]
        videos.append(pictures.pixels(before))
    return torch.stack(videos, 1)


DrawCodes = Callable[[int, int, Tensor], Tensor]
"""(frame, level, logits (R, K)) -> codes (R,)."""


def _keyed_codes(seed: int, rows: int, temperature: float) -> DrawCodes:
    keys = Keys(seed, 0, torch.arange(rows)).fold("sound")

    def draw(frame: int, level: int, logits_RK: Tensor) -> Tensor:
        if not temperature:
            return logits_RK.argmax(-1)
        uniform_RK = keys.fold(frame).fold(level).uniform((logits_RK.shape[1],), logits_RK.device)
        gumbel_RK = -(-uniform_RK.clamp(min=1e-20).log()).log()
        return (logits_RK / temperature + gumbel_RK).argmax(-1)

    return draw


@torch.no_grad()
def sample_sound(
    model: GroupDecoder,
    prompts: Sequence[Sequence[int]],
    frames: int,
    *,
    seed: int = 0,
    temperature: float = 1.0,
    draw: DrawCodes | None = None,
) -> Tensor:
    """(R, frames, Q) int64: codes of sound behind each text; `SoundCodec.decode` makes sound of a row.

    Args:
        model: in evaluation mode.
        prompts: token ids of each text; empty ones are allowed.
        frames: A.
        seed: of the draws.
        temperature: divides logits; 0: the most probable code of each level.
        draw: chooses codes in place of the seed.

    Raises:
        ValueError: the model has no part for sound.
    """
    _needed(model.sound, "sound")
    assert model.sound is not None
    rows, device = len(prompts), model.head_weight.device
    choose = draw or _keyed_codes(seed, rows, temperature)
    codes_RAQ = torch.zeros(rows, 0, model.sound.levels, dtype=torch.int64)
    for frame in range(frames):
        documents: list[Document] = [
            [*([Words(list(ids))] if ids else []), Sound(codes_AQ)]
            for ids, codes_AQ in zip(prompts, codes_RAQ, strict=True)
        ]
        fields = _rows(documents, model.sound.levels, device)
        # All positions of sound are told the levels that follow, as in training; those of the last are drawn.
        index_A = (fields["modality"] == SOUND).flatten().nonzero()[:, 0]
        next_AQ = fields["next_codes"].flatten(0, 1)[index_A]
        steps = SoundSteps(index_A, next_AQ, partial(choose, frame))
        kinds = Kinds(fields["modality"], Groups(ends_of(fields["groups"])), None, fields["codes"], steps)
        model(fields["tokens"], fields["positions"], fields["documents"], kinds=kinds)
        new_R1Q = torch.stack(steps.drawn, 1)[:, None].cpu()
        codes_RAQ = torch.cat((codes_RAQ, new_R1Q), 1)
    return codes_RAQ


@torch.no_grad()
def sample_text(
    model: GroupDecoder,
    pixels_FCHW: Tensor,
    before: Sequence[int],
    after: Sequence[int],
    *,
    max_new_tokens: int = 32,
    sampling: Sampling = GREEDY,
    stop_ids: frozenset[int] = frozenset(),
) -> list[int]:
    """Tokens behind a picture, or a video, that the model looks at.

    Args:
        model: in evaluation mode.
        pixels_FCHW: of each frame, as the source gives them.
        before: token ids in front of it; may be empty.
        after: token ids behind it, at least one: a picture that is looked at predicts nothing.
        max_new_tokens: the most that are added.
        sampling: how tokens are chosen; a repetition penalty is refused.
        stop_ids: tokens that end the text; they are given too.

    Raises:
        ValueError: the model has no part for it, nothing stands behind the picture, or its sides do not fit.
    """
    _needed(model.seen, "seen")
    assert model.seen is not None
    if not after:
        raise ValueError("a picture that is looked at predicts nothing: give at least one token behind it")
    if sampling.repetition_penalty != 1.0:
        raise ValueError("a repetition penalty is not known here: set it to 1")
    part, (height, width) = model.seen, pixels_FCHW.shape[2:]
    look = Seen(len(pixels_FCHW), (height // part.cell, width // part.cell), part.own.frames)
    device, levels = model.head_weight.device, 0 if model.sound is None else model.sound.levels
    seen = SeenPictures(pixels_FCHW.to(device), torch.arange(len(pixels_FCHW), device=device))
    text, said = list(after), []
    for place in range(max_new_tokens):
        fields = _rows([[*([Words(list(before))] if before else []), look, Words(text)]], levels, device)
        kinds = Kinds(fields["modality"], Groups(ends_of(fields["groups"])), None, fields.get("codes"), seen=seen)
        output = model(fields["tokens"], fields["positions"], fields["documents"], kinds=kinds)
        logits_1V = model.logits(output.hidden_BTD[:, -1])
        if sampling.greedy:
            token = int(logits_1V.argmax(-1))
        else:
            uniform = Keys.of_step(sampling.seed, place).fold("text").uniform((1,))[0].double().to(device)
            token = int(draw_token(filtered(logits_1V, sampling), uniform)[0])
        text.append(token)
        said.append(token)
        if token in stop_ids:
            break
    return said
