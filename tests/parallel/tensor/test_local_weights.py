"""A rank's weights without the whole model: initial ones, a checkpoint's, a model folder's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_ranks
from torch import Tensor

from resilin.checkpoint.folder import CheckpointFolder
from resilin.checkpoint.load import load_part
from resilin.layout import Mesh
from resilin.layout import rank as place_of
from resilin.models import initial, weight_files
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings, MoESettings
from resilin.models.huggingface import load_pretrained, save_pretrained
from resilin.models.weight_files import StoredTensor
from resilin.parallel.group import Group
from resilin.parallel.local_model import LocalModel
from resilin.parallel.local_weights import draw_initial, read_folder
from resilin.parallel.tensor import parallelise

SETTINGS = DecoderSettings(
    vocab_size=21, hidden_size=8, layers=2, heads=4, kv_heads=2, mlp_size=10, qk_norm="rms", init="fan_in"
)
MOE = SETTINGS.model_copy(update={"moe": MoESettings(experts=3, expert_size=6), "qk_norm": "rms"})


def outline(settings: DecoderSettings, group: Group) -> LocalModel:
    model = Decoder(settings, seed=None, device="meta")
    return parallelise(model, model.tensor_plan(vocabulary_multiple=8), group, sequence=False)


def same(local: LocalModel, whole: dict[str, Tensor]) -> bool:
    """Every parameter is the part of the whole one, to the bit."""
    return all(torch.equal(local.part(name, whole[name]), p.detach()) for name, p in local.module.named_parameters())


def initial_parts(rank: int) -> bool:
    local, alive = outline(SETTINGS, Group.of()), []
    plain = initial.initial_value

    def watched(name: str, *arguments: Any) -> Tensor:
        import weakref

        assert not any(reference() is not None for reference in alive), "two whole tensors at once"
        value = plain(name, *arguments)
        alive.append(weakref.ref(value))
        return value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("resilin.parallel.local_weights.initial_value", watched)
        draw_initial(local, SETTINGS, seed=4)
    assert len(alive) == len(local.parameters)
    return same(local, dict(Decoder(SETTINGS, seed=4).named_parameters()))


def folder_parts(rank: int, folders: list[tuple[str, DecoderSettings]]) -> list[float]:
    """For each folder which share of its bytes this rank has read."""
    shares, plain = [], StoredTensor.part
    for folder, settings in folders:
        read = 0

        def counted(stored: StoredTensor, place: tuple[slice, ...]) -> Tensor:
            nonlocal read
            part = plain(stored, place)
            read += part.numel()
            return part

        local = outline(settings, Group.of())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(weight_files.StoredTensor, "part", counted)
            read_folder(local, folder, settings)
        whole = dict(load_pretrained(folder).named_parameters())
        assert same(local, whole)
        assert read == sum(held(local, name) for name in local.parameters)
        shares.append(read / sum(parameter.numel() for parameter in whole.values()))
    return shares


def held(local: LocalModel, name: str) -> int:
    return sum(int(torch.tensor([s.stop - s.start for s in source]).prod()) for source, _ in local.pieces(name))


def checkpoint_parts(rank: int, path: str) -> bool:
    local = outline(MOE, Group.of())
    local.module.to_empty(device="cpu")
    part = load_part(Path(path), local.layout(Mesh.of(tp=4), "model/"), place_of(rank), parts=["model"])
    local.take(part.tree["model"])
    return same(local, dict(Decoder(MOE, seed=3).named_parameters()))


@pytest.mark.parametrize("ranks", [2, 4])
def test_initial_weights_are_parts_of_the_whole_models_drawn_one_by_one(ranks: int) -> None:
    assert all(run_ranks(ranks, initial_parts))


def test_a_model_folder_is_read_in_parts(tmp_path: Path) -> None:
    folders = []
    for number, settings in enumerate((SETTINGS, MOE)):
        save_pretrained(Decoder(settings, seed=number), tmp_path / str(number), max_shard_bytes=4000)
        folders.append((str(tmp_path / str(number)), settings))
    shares = run_ranks(4, folder_parts, folders)
    assert max(max(share) for share in shares) < 0.4


def test_a_checkpoint_is_read_by_the_layout_of_the_parts(tmp_path: Path) -> None:
    model = Decoder(MOE, seed=3)
    folder = CheckpointFolder(tmp_path)
    folder.save(1, {"model": dict(model.state_dict())})
    assert all(run_ranks(4, checkpoint_parts, str(folder.step_path(1))))
