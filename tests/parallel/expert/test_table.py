from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilin.layout import Mesh, ParamSpec, Shard
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings, MoESettings
from resilin.parallel.decoder_specs import decoder_specs
from resilin.parallel.errors import ParallelError
from resilin.parallel.expert import ExpertTable


@given(experts=st.integers(1, 40), ranks=st.integers(1, 40))
def test_runs_are_what_the_layout_cuts(experts, ranks):
    if ranks > experts:
        with pytest.raises(ParallelError, match=f"use parallel.expert of {experts} or less"):
            ExpertTable.of(experts, ranks)
        return
    table = ExpertTable.of(experts, ranks)
    assert table.cut() == Shard("ep", 0)
    shapes = ParamSpec((experts, 3), cuts=(table.cut(),)).local_shapes(Mesh.of(ep=ranks))
    assert [shape[0] for shape in shapes] == list(table.counts)
    assert [e for rank in range(ranks) for e in table.held(rank)] == list(range(experts))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any))
def test_runs_of_any_lengths_are_cut_so(counts):
    table = ExpertTable.runs(counts)
    shapes = ParamSpec((table.experts, 3), cuts=(table.cut(),)).local_shapes(Mesh.of(ep=len(counts)))
    assert [shape[0] for shape in shapes] == counts


def test_a_decoders_own_rules_give_the_same_runs():
    settings = DecoderSettings(vocab_size=8, hidden_size=8, heads=2, layers=1, moe=MoESettings(experts=10))
    model = Decoder(settings, seed=None, device="meta")
    shapes = {name: (tuple(p.shape), "F32") for name, p in model.named_parameters()}
    mesh = Mesh.of(ep=4)
    specs = decoder_specs(shapes, settings, mesh)
    for name in ("gate", "up", "down"):
        found = specs[f"blocks.0.moe.experts.{name}"].local_shapes(mesh)
        assert tuple(shape[0] for shape in found) == ExpertTable.of(10, 4).counts == (3, 3, 3, 1)


@pytest.mark.parametrize("counts", [(), (0, 0), (2, -1)])
def test_a_table_without_experts_is_refused(counts):
    with pytest.raises(ParallelError, match="a count from 0 for each rank"):
        ExpertTable.runs(counts)
