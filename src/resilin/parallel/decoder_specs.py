"""How a decoder lies over a mesh: tensor, expert and pipeline parallelism, with ZeRO or FSDP over the data axis.

What the axes `tp` and `ep` cut stands beside the model, in `resilin.models.decoder_plan`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from resilin.layout import Cut, Deal, Flat, Mesh, ParamSpec, Shard, flat_group, specs_of, staged
from resilin.layout.dealing import ALIGN, deal, virtual_shards
from resilin.layout.errors import LayoutError
from resilin.models.decoder_plan import decoder_rules
from resilin.models.decoder_settings import DecoderSettings

Sharding = Literal["none", "fsdp", "zero1", "zero2", "zero3", "dealt"]
_BLOCK = re.compile(r"blocks\.(\d+)\.")

Shapes = Mapping[str, tuple[tuple[int, ...], str]]


def decoder_stages(names: Mapping[str, object], settings: DecoderSettings, stages: int) -> dict[str, tuple[int, ...]]:
    """The pipeline stages of every parameter: blocks in runs as equal as can be, embedding first, norm and head last.

    Raises:
        LayoutError: when there are more stages than blocks.
    """
    if stages > settings.layers:
        raise LayoutError(f"{stages} pipeline stages cannot share {settings.layers} blocks; use at most as many")
    base, more = divmod(settings.layers, stages)
    ends = [(stage + 1) * base + min(stage + 1, more) for stage in range(stages)]
    found: dict[str, tuple[int, ...]] = {}
    for name in names:
        block = _BLOCK.match(name)
        if block:
            found[name] = (next(stage for stage, end in enumerate(ends) if int(block[1]) < end),)
        elif name.startswith("embed."):
            found[name] = tuple(sorted({0, stages - 1})) if settings.tie_embeddings else (0,)
        else:
            found[name] = (stages - 1,)
    return found


def decoder_specs(
    shapes: Shapes,
    settings: DecoderSettings,
    mesh: Mesh,
    sharding: Sharding = "none",
    vocabulary_multiple: int = 1,
    owners: tuple[int, ...] | None = None,
) -> dict[str, ParamSpec]:
    """Specifications of a decoder's parameters, or of optimizer states of their shapes.

    Args:
        shapes: name -> (shape, dtype).
        settings: of the decoder.
        mesh: with any of the axes `pp`, `dp`, `ep`, `tp`; what it lacks is not cut.
        sharding: what the axis `dp` cuts: "none" (copies), "fsdp" (the first dimension), "zero1" and "zero2" (one flat
            buffer of all parameters in order; what ZeRO shards are the optimizer states, and the gradients), "zero3"
            (each parameter flat), or "dealt" (virtual shards owned through a table, so that a loss moves few bytes).
        vocabulary_multiple: rows of embedding and head are padded to a multiple of this.
        owners: of "dealt", the owner of each virtual shard; None: equal runs, as in training (see `virtual_shards`).

    Raises:
        LayoutError: naming the parameter that the mesh cannot cut.
    """
    if settings.moe and mesh.axis("ep") > settings.moe.experts:
        raise LayoutError(f"axis 'ep' has {mesh.axis('ep')} ranks, but the model has {settings.moe.experts} experts")
    rules = decoder_rules(settings, vocabulary_multiple)
    specs = specs_of(shapes, rules, strict=False)
    if mesh.axis("pp") > 1:
        specs = staged(specs, decoder_stages(shapes, settings, mesh.axis("pp")))
    if sharding in ("zero1", "zero2"):
        return flat_group(specs, mesh, "dp")
    table = owners or deal(virtual_shards(mesh.axis("dp")), mesh.axis("dp"))
    last: dict[str, Cut] = {
        "fsdp": Shard("dp", 0),
        "zero3": Flat("dp"),
        "dealt": Deal("dp", table, rule="even", align=ALIGN),
    }
    if sharding == "none":
        return specs
    return {
        name: replace(spec, cuts=(*spec.cuts, last["zero3" if sharding == "fsdp" and not spec.shape else sharding]))
        for name, spec in specs.items()
    }
