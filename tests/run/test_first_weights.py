"""Workers start with parts of the weights that one process would start with, and never have the whole model."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_ranks

from resilin.config import parse_settings
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.settings import ModelContext
from resilin.parallel.blueprint import Blueprint
from resilin.parallel.local_model import cut_out
from resilin.parallel.part import cutting_of
from resilin.parallel.world import World
from resilin.run.build import build_run
from resilin.run.divided import tokens_of
from resilin.run.settings import RunSettings


def _differing(rank: int, folder: str, parallel: dict[str, Any], model: dict[str, Any]) -> list[str]:
    tree = {
        "source": {"paths": [f"{folder}/*.txt"], "cache": folder, "sequence_length": 32,
                   "tokenizer": {"kind": "bytes"}},
        "model": {"hidden_size": 32, "layers": 4, "heads": 4, **model},
        "train": {"steps": 2, "batch_size": 8, "micro_batch_size": 2, "threads": 1, "device": "cpu"},
        "precision": {"compute": "fp32"}, "evaluation": {"every": 0}, "parallel": parallel,
    }  # fmt: skip
    settings = parse_settings(RunSettings, tree, "test")
    assert isinstance(settings.model, DecoderSettings)
    world = World(settings.parallel.degrees(4), rank)
    built = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DecoderSettings, "build", lambda *_: built.append(1))
        run = build_run(settings, world=world)
    assert not built
    whole = settings.model.build(ModelContext(settings.seed, run.source.vocab_size))
    specs = cutting_of(settings.parallel, world, whole, tokens_of(run.source, whole)).specs
    blueprint = Blueprint(world.degrees, specs, tuple(specs))
    expected = {name: p.detach() for name, p in whole.named_parameters()}
    found = dict(run.model.named_parameters())
    assert found
    return [
        name
        for name, mine in found.items()
        if not torch.equal(
            mine, cut_out(specs[name], blueprint.mesh(blueprint.reduction_of(name)), rank, expected[name])
        )
    ]


MOE = {"moe": {"experts": 4, "experts_per_token": 2, "expert_size": 24}}


@pytest.mark.parametrize(
    ("parallel", "model"),
    [
        ({"pipeline": 2, "tensor": 2}, {}),
        ({"pipeline": 2, "schedule": "zb-v", "data": 2}, {"tie_embeddings": True}),
        ({"data": 2, "context": 2}, {}),
        ({"tensor": 2, "data": 2, "expert": 2}, MOE),
    ],
    ids=str,
)
def test_parts_of_the_same_weights(tmp_path: Path, parallel: dict[str, Any], model: dict[str, Any]):
    for name in ("this.py", "textwrap.py", "string.py"):
        text = (Path(sysconfig.get_paths()["stdlib"]) / name).read_bytes()
        (tmp_path / name).with_suffix(".txt").write_bytes(text)
    assert run_ranks(4, _differing, str(tmp_path), parallel, model) == [[]] * 4
