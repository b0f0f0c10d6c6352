"""Cutting a sub-model out: an ordinary decoder that knows nothing of the model it came from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from resilin.layout import Region
from resilin.models.decoder import Decoder
from resilin.models.huggingface import Piece, Target, fill_targets, folder_settings
from resilin.nested.budgets import Budget
from resilin.nested.in_place import decoder_in
from resilin.nested.regions import regions, shapes_of
from resilin.nested.sub_model import sub_model, sub_settings


def _name_of(name: str, new_layer: Mapping[int, int], small: Decoder) -> str:
    """What a parameter of the full model is called in the sub-model, whose layers are numbered anew."""
    if small.settings.chains is None:  # the first chain alone is an ordinary decoder
        name = name.replace(".chains.0.", ".")
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    return name if match is None else f"blocks.{new_layer[int(match[1])]}.{match[2]}"


def pieces_of(boxes: tuple[Region, ...]) -> tuple[Piece, ...]:
    """Where boxes lie in the whole parameter, and where in the one that is made of them, side by side."""
    if len(boxes) == 1:
        return ((boxes[0].slices, tuple(slice(0, size) for size in boxes[0].sizes)),)
    dim = next(d for d in range(len(boxes[0].sizes)) if len({box.offsets[d] for box in boxes}) > 1)
    found, at = [], 0
    for box in boxes:
        place = [slice(0, size) for size in box.sizes]
        place[dim] = slice(at, at + box.sizes[dim])
        at += box.sizes[dim]
        found.append((box.slices, tuple(place)))
    return tuple(found)


def _empty(settings_of: Decoder, dtype: torch.dtype, device: torch.device | str) -> Decoder:
    model: Decoder = settings_of.to(dtype).to_empty(device=device)
    return model


@torch.no_grad()
def extract(model: nn.Module, wanted: Budget) -> Decoder:
    """An ordinary decoder with copies of what a budget selects; nothing is trained.

    Args:
        model: a decoder, or a module that has one inside.
        wanted: what of it to take.

    Raises:
        BudgetError: the budget does not fit.
    """
    full = decoder_in(model)
    small = sub_settings(full.settings, wanted).on_meta()
    weight = full.embed.weight
    small = _empty(small, weight.dtype, weight.device).train(full.training)
    targets, sources = dict(small.named_parameters()), dict(full.named_parameters())
    new_layer = {part.layer: new for new, part in enumerate(sub_model(full.settings, wanted).layers)}
    for name, boxes in regions(full.settings, wanted).items():
        target, source = targets[_name_of(name, new_layer, small)], sources[name]
        if source.dtype != target.dtype:  # norms may be kept wider than matrices
            target.data = target.data.to(source.dtype)
        for taken, place in pieces_of(boxes):
            target[place] = source[taken]
    return small


@torch.no_grad()
def extract_folder(
    folder: Path | str, wanted: Budget, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Decoder:
    """The sub-model of a model on disk; of its files no more bytes are read than the sub-model has.

    Args:
        folder: a Hugging Face folder with safetensors.
        wanted: what of the model to take.
        dtype: of the parameters in memory.
        device: where they live.

    Raises:
        ModelFolderError: the folder cannot be read.
        BudgetError: the budget does not fit.
    """
    folder = Path(folder)
    settings = folder_settings(folder)
    small = _empty(sub_settings(settings, wanted).on_meta(), dtype, device)
    parameters = dict(small.named_parameters())
    new_layer = {part.layer: new for new, part in enumerate(sub_model(settings, wanted).layers)}
    used, targets = regions(settings, wanted), {}
    for name, shape in shapes_of(settings).items():
        if name in used:
            tensor: Tensor = parameters[_name_of(name, new_layer, small)].data
            targets[name] = Target(tensor, shape, pieces_of(used[name]))
        else:
            targets[name] = Target(torch.empty(0), shape, ())  # of a skipped layer: known, and not read
    fill_targets(folder, targets, settings)
    return small
