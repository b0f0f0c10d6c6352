"""How a decoder lies over a mesh: heads stay whole, nothing is lost, every axis cuts what it should."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resilin.layout import LayoutError, Mesh, check, layout_of, plan
from resilin.layout.memory import apply, gather, scatter
from resilin.models.decoder_settings import DecoderSettings, MoESettings
from resilin.models.settings import ModelContext
from resilin.parallel.decoder_specs import Shapes, decoder_specs, decoder_stages
from resilin.run.model_layout import lay_out, shapes_of

SMALL = DecoderSettings(vocab_size=101, hidden_size=24, layers=3, heads=6, kv_heads=3, qkv_bias=True)
MOE = SMALL.model_copy(update={"moe": MoESettings(experts=4), "tie_embeddings": True})


def shapes(settings: DecoderSettings) -> Shapes:
    return shapes_of(settings.outline(ModelContext(0, None)))


meshes = st.builds(
    lambda pp, dp, ep, tp: Mesh.of(pp=pp, dp=dp, ep=ep, tp=tp),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 2),
    st.sampled_from([1, 2, 3, 6]),
)
shardings = st.sampled_from(["none", "fsdp", "zero1", "zero3", "dealt"])


@settings(max_examples=50, deadline=None)
@given(meshes, shardings, meshes, shardings, st.booleans())
def test_from_any_mesh_to_any_other_every_value_arrives_and_padding_does_not(here, one, there, other, moe):
    settings = MOE if moe else SMALL
    known = shapes(settings)
    layouts = [
        layout_of(decoder_specs(known, settings, mesh, sharding, vocabulary_multiple=8), mesh)
        for mesh, sharding in ((here, one), (there, other))
    ]
    for layout in layouts:
        check(layout)
    g = np.random.default_rng(0)
    values = {name: g.standard_normal(shape).astype(np.float32) for name, (shape, _) in known.items()}
    zeros = {name: np.zeros_like(value) for name, value in values.items()}
    got = scatter(layouts[1], zeros, fill=np.nan)
    apply(plan(*layouts), scatter(layouts[0], values, fill=np.nan), got)
    for name, array in gather(layouts[1], got).items():
        np.testing.assert_array_equal(array, values[name])


def test_a_rank_of_tensor_parallelism_computes_whole_heads():
    known = shapes(SMALL)
    specs = decoder_specs(known, SMALL, Mesh.of(tp=2))
    local = {name: spec.local_shapes(Mesh.of(tp=2)) for name, spec in specs.items()}
    assert local["blocks.0.attention.k.weight"] == [(8, 24), (4, 24)]  # three heads of four on two ranks
    assert local["blocks.0.attention.q.weight"] == [(16, 24), (8, 24)]  # and the two query heads of each
    assert local["blocks.0.attention.o.weight"] == [(24, 16), (24, 8)]
    assert local["blocks.0.attention_norm.weight"] == [(24,), (24,)]
    wide = decoder_specs(known, SMALL, Mesh.of(tp=6))["blocks.0.attention.k.weight"]
    assert wide.local_shapes(Mesh.of(tp=6)) == [(4, 24)] * 6  # two ranks share a head


def test_a_layer_cut_over_ranks_computes_what_the_whole_one_does():
    """Column-parallel gate and up, row-parallel down: partial sums over ranks are the layer's output."""
    torch.manual_seed(0)
    model = SMALL.build(ModelContext(0, None))
    mlp, mesh = model.blocks[0].mlp, Mesh.of(tp=3)
    layout = lay_out(model, mesh, "none")
    values = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    buffers = scatter(layout, values)
    specs = decoder_specs(shapes_of(model), SMALL, mesh)
    x = torch.randn(5, 24)
    total = torch.zeros(5, 24)
    for number, place in enumerate(layout.places):
        gate, up, down = (
            torch.from_numpy(buffers[place][f"blocks.0.mlp.{name}.weight"]).view(
                specs[f"blocks.0.mlp.{name}.weight"].local_shapes(mesh)[number]
            )
            for name in ("gate", "up", "down")
        )
        total += (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    torch.testing.assert_close(total, mlp(x))


def test_stages_hold_runs_of_blocks_and_a_tied_embedding_is_in_both_ends():
    stages = decoder_stages(shapes(SMALL), SMALL, 2)
    assert [stages[f"blocks.{i}.mlp.up.weight"] for i in range(3)] == [(0,), (0,), (1,)]
    assert (stages["embed.weight"], stages["norm.weight"], stages["head.weight"]) == ((0,), (1,), (1,))
    assert decoder_stages(shapes(MOE), MOE, 3)["embed.weight"] == (0, 2)
    with pytest.raises(LayoutError, match="4 pipeline stages cannot share 3 blocks"):
        decoder_stages(shapes(SMALL), SMALL, 4)
    with pytest.raises(LayoutError, match="axis 'ep' has 5 ranks, but the model has 4 experts"):
        decoder_specs(shapes(MOE), MOE, Mesh.of(ep=5))


def test_zero_shards_hold_equal_shares():
    layout = layout_of(decoder_specs(shapes(SMALL), SMALL, Mesh.of(dp=4), "zero1"), Mesh.of(dp=4))
    held = list(layout.bytes_at().values())
    assert sum(held) == layout.bytes
    assert max(held) - min(held) <= 4 * 8
