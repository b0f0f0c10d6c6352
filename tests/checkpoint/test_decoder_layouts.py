"""A decoder under AdamW over data, tensor and pipeline parallelism with ZeRO: one state, one set of bytes.

Grouped queries with fewer key heads than tensor ranks, a vocabulary that does not divide and is padded, layers and
ranks that do not divide each other; whatever is padding holds NaN.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import as_ranks

from resilin.checkpoint.consolidate import consolidate
from resilin.checkpoint.folder import CheckpointFolder
from resilin.checkpoint.load import load_part
from resilin.checkpoint.state_rules import StateTensor, with_states
from resilin.layout import Layout, Mesh, check, layout_of, rank
from resilin.layout.memory import gather, scatter
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.settings import ModelContext
from resilin.parallel.decoder_specs import Sharding, decoder_specs

SETTINGS = DecoderSettings(vocab_size=11, hidden_size=8, layers=3, heads=4, kv_heads=2, mlp_size=12)
FEW = [Mesh.of(pp=1, dp=3, tp=2), Mesh.of(pp=3, dp=1, tp=2), Mesh.of(pp=2, dp=2, tp=1), Mesh.of(pp=1, dp=1, tp=4)]
EVERY = [
    Mesh.of(pp=pp, dp=dp, tp=tp)
    for pp, dp, tp in itertools.product((1, 2, 3), (1, 2, 3, 4, 6), (1, 2, 4))
    if pp * dp * tp <= 8
]


def shapes() -> dict[str, tuple[tuple[int, ...], str]]:
    model = SETTINGS.build(ModelContext(0, None))
    return {name: (tuple(tensor.shape), "F32") for name, tensor in model.state_dict().items()}


def layout_on(mesh: Mesh, sharding: Sharding) -> Layout:
    plain = layout_of(decoder_specs(shapes(), SETTINGS, mesh, sharding, vocabulary_multiple=8), mesh)
    model = Layout(plain.places, {f"model/{name}": held for name, held in plain.tensors.items()}, plain.buffers)
    states = {
        f"optimizer/parameters/{name}/{key}": StateTensor(f"model/{name}", shape if key != "step" else (), "F32")
        for name, (shape, _) in shapes().items()
        for key in ("step", "exp_avg", "exp_avg_sq")
    }
    made = with_states(model, states)
    check(made)
    return made


def values() -> dict[str, np.ndarray]:
    g = np.random.default_rng(1)
    made = {}
    for name, (shape, _) in shapes().items():
        made[f"model/{name}"] = g.standard_normal(shape).astype(np.float32)
        for key in ("step", "exp_avg", "exp_avg_sq"):
            of = shape if key != "step" else ()
            made[f"optimizer/parameters/{name}/{key}"] = g.standard_normal(of).astype(np.float32)
    return made


def folder_hash(path: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.iterdir())}


@pytest.fixture(scope="module")
def canonical(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    tree: dict[str, Any] = {"run": {"step": 5}}
    for name, value in values().items():
        *path, last = name.split("/")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = torch.from_numpy(value)
    at = tmp_path_factory.mktemp("alone")
    folder = CheckpointFolder(at)
    folder.save(5, tree)
    folder.close()
    return folder_hash(consolidate(folder.step_path(5), at / "again").path)


@pytest.mark.parametrize(
    "sharding",
    [pytest.param("none", marks=pytest.mark.slow), pytest.param("zero1", marks=pytest.mark.slow), "zero3"],
)
def test_the_same_bytes_from_a_few_meshes_which_load_what_another_saved(
    tmp_path: Path, canonical: dict[str, str], sharding: Sharding
) -> None:
    from_mesh_to_mesh(tmp_path, canonical, sharding, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "fsdp", "zero1", "zero3", "dealt"])
def test_the_same_bytes_from_every_mesh_and_every_mesh_loads_what_another_saved(
    tmp_path: Path, canonical: dict[str, str], sharding: Sharding
) -> None:
    from_mesh_to_mesh(tmp_path, canonical, sharding, EVERY)


def from_mesh_to_mesh(tmp_path: Path, canonical: dict[str, str], sharding: Sharding, meshes: list[Mesh]) -> None:
    before: Path | None = None
    for number, mesh in enumerate(meshes):
        layout = layout_on(mesh, sharding)
        if before is not None:  # what the last mesh saved, on this one
            got = {}
            for place in layout.places:
                part = load_part(before, layout, place)
                own = {name: node_at(part.tree, name) for name in layout.tensors}
                memory = {n: t for n, t in own.items() if t.numel()} | part.buffers
                got[place] = {name: tensor.numpy().reshape(-1) for name, tensor in memory.items()}
                assert not any(np.isnan(array).any() for array in got[place].values())
            for name, array in gather(layout, got).items():
                np.testing.assert_array_equal(array, values()[name], err_msg=f"{mesh} {name}")
        buffers = scatter(layout, values(), math.nan)
        path = tmp_path / str(number)

        def work(c: Any, path: Path = path, layout: Layout = layout, buffers: Any = buffers) -> None:
            mine = {name: torch.from_numpy(array) for name, array in buffers.get(rank(c.rank), {}).items()}
            CheckpointFolder(path, coordinator=c).save(5, {"run": {"step": 5}}, layout, buffers=mine)

        as_ranks(mesh.size, work)
        before = CheckpointFolder(path).step_path(5)
        assert folder_hash(consolidate(before, path / "whole").path) == canonical, str(mesh)


def node_at(tree: Any, name: str) -> torch.Tensor:
    for key in name.split("/"):
        tree = tree[key]
    assert isinstance(tree, torch.Tensor)
    return tree
