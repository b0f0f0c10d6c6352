"""Weights for a rank's part of a decoder that was divided on the meta device: initial ones, or a model folder's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from resilin.models.decoder_settings import DecoderSettings
from resilin.models.huggingface import Target, fill_targets
from resilin.models.initial import initial_value
from resilin.parallel.local_model import LocalModel


def materialise(modules: Sequence[nn.Module], device: torch.device | str) -> None:
    """Give parameters on the meta device memory, without values; a parameter that several modules share stays one."""
    made: dict[int, nn.Parameter] = {}
    for module in (inner for outer in modules for inner in outer.modules()):
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(memory_for(parameter, device), requires_grad=parameter.requires_grad)
                made[id(parameter)].__dict__.update(parameter.__dict__)  # what it is a part of, say
            setattr(module, name, made[id(parameter)])


def memory_for(outline: Tensor, device: torch.device | str) -> Tensor:
    """Memory, without values, for a tensor on the meta device.

    Torch's own `empty_like` works out a meta tensor's strides in Python, for whose sake it imports sympy, while the
    others of an elastic run wait for a newcomer.
    """
    return torch.empty(outline.shape, dtype=outline.dtype, device=device)


def draw_initial(local: LocalModel, settings: DecoderSettings, seed: int, device: torch.device | str = "cpu") -> None:
    """Initial weights: parts of those that the whole model has for the same seed.

    Whole tensors are drawn one after the other, on the CPU, and this rank's parts kept.

    Args:
        local: on the meta device, or not.
        settings: of the decoder.
        seed: of the run.
        device: where its parameters shall be.
    """
    materialise([local.module], device)
    local.fill(lambda name, shape: initial_value(name, torch.Size(shape), settings, seed))


def read_folder(
    local: LocalModel, folder: Path | str, settings: DecoderSettings, device: torch.device | str = "cpu"
) -> None:
    """The weights of a Hugging Face folder: of its files only the bytes of this rank's parts are read.

    Args:
        local: on the meta device, or not.
        folder: with safetensors, whole or sharded.
        settings: of the decoder.
        device: where its parameters shall be.

    Raises:
        ModelFolderError: what is missing, broken or superfluous, by name.
    """
    materialise([local.module], device)
    targets = {}
    for name, parameter in local.module.named_parameters():
        target = Target(parameter.data, local.parameters[name].spec.shape, local.pieces(name))
        if target.wanted < parameter.numel():  # padding
            parameter.data.zero_()
        targets[name] = target
    fill_targets(Path(folder), targets, settings)
