"""What a budget comes to in a decoder: the sizes of what is left, and the settings of an ordinary decoder of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from resilin.models.chain_settings import ChainSettings
from resilin.models.decoder_settings import DecoderSettings, LayerSizes
from resilin.models.hybrid_settings import HybridLayerSizes, HybridSettings
from resilin.models.loop_settings import LoopSettings, reduced
from resilin.nested.budgets import Budget, BudgetError


@dataclass(frozen=True, slots=True)
class LayerPart:
    """What is used of one layer.

    Attributes:
        layer: its number in the full model.
        heads: query heads, equally many of each key head's.
        key_heads: leading key heads.
        ffn: neurons of the feed-forward or of each expert.
        experts: their numbers; () where the layer has none.
        top_k: experts that a token visits; 0 where there are none.
        mamba_heads: heads of a Mamba-2 layer, equally many of each group; 0, like the next two, where it is none.
        mamba_head_size: their leading channels.
        state_size: leading numbers of their states.
    """

    layer: int
    heads: int
    key_heads: int
    ffn: int
    experts: tuple[int, ...] = ()
    top_k: int = 0
    mamba_heads: int = 0
    mamba_head_size: int = 0
    state_size: int = 0


@dataclass(frozen=True, slots=True)
class SubModel:
    """What is used of a decoder: two budgets are the same sub-model where this is equal.

    Attributes:
        hidden: leading values of the residual stream.
        layers: those that are left, in order.
        trajectory: steps of the loops they are run in, the smallest whole numbers of their proportion; (1,): once.
    """

    hidden: int
    layers: tuple[LayerPart, ...]
    trajectory: tuple[int, ...] = (1,)


def _entry(name: str, value: Any, layer: int, layers: int) -> Any:
    """A budget's entry for one layer."""
    if not isinstance(value, tuple):
        return value
    if len(value) != layers:
        raise BudgetError(
            f"{name} has {len(value)} entries and the model {layers} layers: give one for each layer (also for those "
            "that are skipped), or one number for all"
        )
    return value[layer]


def _at_most(name: str, layer: int, value: int | None, most: int) -> int:
    if value is None:
        return most
    if value > most:
        raise BudgetError(f"{name} of layer {layer} is {value}, and the layer has {most}: use at most {most}")
    return value


def _heads(layer: int, own: DecoderSettings, heads: int | None, key_heads: int | None) -> tuple[int, int]:
    """Query and key heads of a layer."""
    group = own.heads // own.key_heads
    if key_heads is not None:
        _at_most("kv_heads", layer, key_heads, own.key_heads)
    if heads is None:
        return (key_heads or own.key_heads) * group, key_heads or own.key_heads
    _at_most("heads", layer, heads, own.heads)
    if key_heads is None:
        if heads % group == 0:
            return heads, heads // group
        key_heads = own.key_heads
    if heads % key_heads or heads // key_heads > group:
        options = [n * key_heads for n in range(1, group + 1)]
        raise BudgetError(
            f"heads of layer {layer} is {heads}, which {key_heads} key heads of at most {group} query heads each "
            f"cannot share equally: use one of {', '.join(map(str, options))}, or whole groups (a multiple of {group})"
        )
    return heads, key_heads


def _experts(layer: int, own: DecoderSettings, chosen: Any, top_k: int | None) -> tuple[tuple[int, ...], int]:
    assert own.moe is not None
    have = own.moe.experts
    if isinstance(chosen, tuple):
        if not chosen:
            raise BudgetError(f"experts of layer {layer} are none: keep at least one, or skip the layer")
        if chosen[-1] >= have:
            raise BudgetError(f"experts of layer {layer} name expert {chosen[-1]}; the layer has 0 to {have - 1}")
        kept = chosen
    else:
        kept = tuple(range(_at_most("experts", layer, chosen, have)))
    if top_k is None:
        return kept, min(own.moe.experts_per_token, len(kept))
    if top_k > len(kept):
        raise BudgetError(f"top_k of layer {layer} is {top_k}, and {len(kept)} experts are left: use at most that")
    return kept, top_k


def _hybrid_part(layer: int, own: HybridSettings, budget: Budget) -> LayerPart:
    """What is used of one layer of a hybrid decoder."""

    def asked(name: str) -> int | None:
        size: int | None = _entry(name, getattr(budget, name), layer, own.layers)
        return size

    kind, mamba = own.kind_of(layer), own.mamba
    if kind == "mlp":
        return LayerPart(layer, 0, 0, _at_most("ffn", layer, asked("ffn"), own.feed_forward_size))
    if kind == "attention":
        return LayerPart(layer, *_heads(layer, own, asked("heads"), asked("kv_heads")), 0)
    heads = _at_most("mamba_heads", layer, asked("mamba_heads"), mamba.heads)
    if heads % mamba.groups:
        options = ", ".join(str(n) for n in range(mamba.groups, mamba.heads + 1, mamba.groups))
        raise BudgetError(
            f"mamba_heads of layer {layer} is {heads}, which {mamba.groups} groups cannot share equally: use one of "
            f"{options}"
        )
    size = _at_most("mamba_head_size", layer, asked("mamba_head_size"), mamba.head_size)
    state = _at_most("state_size", layer, asked("state_size"), mamba.state_size)
    return LayerPart(layer, 0, 0, 0, mamba_heads=heads, mamba_head_size=size, state_size=state)


def _check_kinds(settings: DecoderSettings, budget: Budget) -> None:
    """Refuse sizes of what the model has none of."""
    if settings.moe is None and (budget.experts is not None or budget.top_k is not None):
        raise BudgetError("experts and top_k: the model has no experts; leave them out")
    named = [name for name in ("mamba_heads", "mamba_head_size", "state_size") if getattr(budget, name) is not None]
    if named and not (isinstance(settings, HybridSettings) and settings.layers_of("mamba")):
        raise BudgetError(f"{named[0]}: the model has no Mamba-2 layers; leave it out")


def _trajectory(settings: DecoderSettings, loops: int | tuple[int, ...] | None) -> tuple[int, ...]:
    """The steps of the loops that are run."""
    if loops is None:
        return settings.trajectory
    steps = reduced((1,) * loops if isinstance(loops, int) else loops)
    if settings.loop is None:
        if steps != (1,):
            raise BudgetError("loops: the model's blocks are run once (it has no model.loop); leave it out")
        return steps
    if settings.loop.condition != "time_and_step" and len(set(steps)) > 1:
        raise BudgetError(
            f"loops are the steps {steps}, and this model's blocks do not know of steps (model.loop.condition is "
            f"{settings.loop.condition!r}): give their number, {len(steps)}"
        )
    return steps


def _chains(settings: DecoderSettings, budget: Budget) -> int | None:
    """How many chains are used; None: the model has none."""
    if settings.chains is None:
        if budget.chains is not None:
            raise BudgetError("chains: the model has none (it has no model.chains); leave it out")
        return None
    named = [name for name in ("hidden", "heads", "kv_heads", "ffn") if getattr(budget, name) is not None]
    if named:
        raise BudgetError(
            f"{named[0]}: of a decoder of chains, whole chains, layers and loops can be left out: name chains, skip or "
            "loops"
        )
    have = len(settings.chains.sizes)
    if budget.chains is not None and budget.chains > have:
        raise BudgetError(f"chains is {budget.chains}, and the model has {have}: use at most that")
    return budget.chains or have


def _chain_sizes(settings: DecoderSettings, chains: int) -> tuple[int, int, int, int]:
    """Width of the stream, query heads, key heads and neurons of the first chains."""
    widths = settings.widths.upto(chains)
    head = settings.head_width
    return sum(widths.hidden), sum(widths.queries) // head, sum(widths.keys) // head, sum(widths.mlp)


@lru_cache(maxsize=4096)
def sub_model(settings: DecoderSettings, budget: Budget) -> SubModel:
    """The sizes that a budget leaves of a decoder.

    Raises:
        BudgetError: it names a layer that is not there, exceeds or empties one, does not divide its heads, names
            experts, loops or chains of a model that has none, or cuts through chains.
    """
    layers = settings.layers
    beyond = [layer for layer in budget.skip if layer >= layers]
    if beyond:
        raise BudgetError(f"skip names layer {beyond[0]}; layers count from 0 to {layers - 1}")
    if len(budget.skip) == layers:
        raise BudgetError(f"skip names all {layers} layers: leave at least one")
    _check_kinds(settings, budget)
    hidden = budget.hidden or settings.hidden_size
    if hidden > settings.hidden_size:
        raise BudgetError(f"hidden is {hidden}, and the model's is {settings.hidden_size}: use at most that")
    chains = _chains(settings, budget)
    if chains is not None:
        hidden, heads, key_heads, ffn = _chain_sizes(settings, chains)
        of_chains = tuple(
            LayerPart(layer, heads, key_heads, ffn) for layer in range(layers) if layer not in budget.skip
        )
        return SubModel(hidden, of_chains, _trajectory(settings, budget.loops))
    kept = []
    for layer in range(layers):
        own = settings.at(layer)
        if isinstance(own, HybridSettings):
            if layer not in budget.skip:
                kept.append(_hybrid_part(layer, own, budget))
            continue
        ffn, heads, key_heads, experts, top_k = (
            _entry(name, getattr(budget, name), layer, layers)
            for name in ("ffn", "heads", "kv_heads", "experts", "top_k")
        )
        if layer in budget.skip:
            continue
        count, keys = _heads(layer, own, heads, key_heads)
        if settings.is_moe_layer(layer):
            assert own.moe is not None
            numbers, visited = _experts(layer, own, experts, top_k)
            width = _at_most("ffn", layer, ffn, own.moe.expert_size)
            kept.append(LayerPart(layer, count, keys, width, numbers, visited))
        else:
            kept.append(LayerPart(layer, count, keys, _at_most("ffn", layer, ffn, own.feed_forward_size)))
    return SubModel(hidden, tuple(kept), _trajectory(settings, budget.loops))


def _sub_loop(loop: LoopSettings | None, trajectory: tuple[int, ...]) -> LoopSettings | None:
    """A trajectory as settings; None: blocks are run once and told nothing, which is an ordinary decoder."""
    if loop is None or (loop.condition == "none" and len(trajectory) == 1):
        return None
    steps = () if len(set(trajectory)) == 1 else trajectory
    return loop.model_copy(update={"times": len(trajectory), "steps": steps})


def _sub_chains(settings: DecoderSettings, chains: int) -> ChainSettings | None:
    """The first chains as settings; None: the first one alone, which is an ordinary decoder."""
    assert settings.chains is not None
    if chains == 1:
        return None
    sizes = {name: getattr(settings.chains, name)[:chains] for name in ("sizes", "mlp_sizes")}
    frozen = settings.chains.frozen if settings.chains.frozen < chains else 0
    return settings.chains.model_copy(update={**sizes, "frozen": frozen})


def _common(values: list[int], default: int) -> int:
    """The largest, of which a layer may have less; `default` where no layer has any."""
    return max(values) if values else default


def _sub_hybrid(settings: HybridSettings, part: SubModel) -> HybridSettings:
    """The settings of a hybrid decoder of some sizes."""
    kinds = {one.layer: settings.kind_of(one.layer) for one in part.layers}
    usual = {
        "heads": ("attention", "heads", settings.heads),
        "kv_heads": ("attention", "key_heads", settings.key_heads),
        "mlp_size": ("mlp", "ffn", settings.feed_forward_size),
        "mamba_heads": ("mamba", "mamba_heads", settings.mamba.heads),
        "mamba_head_size": ("mamba", "mamba_head_size", settings.mamba.head_size),
        "state_size": ("mamba", "state_size", settings.mamba.state_size),
    }
    common = {
        name: _common([getattr(one, size) for one in part.layers if kinds[one.layer] == kind], default)
        for name, (kind, size, default) in usual.items()
    }
    if common["heads"] % common["kv_heads"]:
        common["heads"] = common["kv_heads"] * -(-common["heads"] // common["kv_heads"])
    own = []
    for one in part.layers:
        sizes = {name: getattr(one, size) for name, (kind, size, _) in usual.items() if kind == kinds[one.layer]}
        own.append(HybridLayerSizes(**{name: size for name, size in sizes.items() if size != common[name]}))
    changes: dict[str, Any] = {
        "hidden_size": part.hidden,
        "layers": len(part.layers),
        "pattern": "".join(settings.pattern[one.layer] for one in part.layers),
        "heads": common["heads"],
        "kv_heads": common["kv_heads"],
        "head_size": settings.head_width,
        "mlp_size": common["mlp_size"],
        "mamba": settings.mamba.model_copy(
            update={
                "heads": common["mamba_heads"],
                "head_size": common["mamba_head_size"],
                "state_size": common["state_size"],
            }
        ),
        "layer_sizes": tuple(own) if any(one != HybridLayerSizes() for one in own) else (),
    }
    return HybridSettings.model_validate(settings.model_copy(update=changes).model_dump())


@lru_cache(maxsize=4096)
def sub_settings(settings: DecoderSettings, budget: Budget) -> DecoderSettings:
    """The settings of an ordinary decoder of the sizes that a budget leaves.

    Where all layers keep the same sizes these are plain numbers, else `layer_sizes` has them.

    Raises:
        BudgetError: the budget does not fit.
    """
    part, whole = sub_model(settings, budget), sub_model(settings, Budget())
    if part == whole:
        return settings
    if part.hidden == whole.hidden and part.layers == whole.layers:
        return settings.model_copy(update={"loop": _sub_loop(settings.loop, part.trajectory)})
    if isinstance(settings, HybridSettings):
        return _sub_hybrid(settings, part)
    layers = part.layers
    numbers = [one.layer for one in layers]
    dense = [one for one in layers if not one.experts]
    mixed = [one for one in layers if one.experts]
    heads, key_heads = max(one.heads for one in layers), max(one.key_heads for one in layers)
    if heads % key_heads:
        heads = key_heads * -(-heads // key_heads)
    mlp_size = _common([one.ffn for one in dense], settings.feed_forward_size)
    changes: dict[str, Any] = {
        "hidden_size": part.hidden,
        "layers": len(layers),
        "heads": heads,
        "kv_heads": key_heads,
        "head_size": settings.head_width,
        "mlp_size": mlp_size,
        "layer_sizes": (),
        "loop": _sub_loop(settings.loop, part.trajectory),
    }
    moe = settings.moe
    if moe is not None:
        changes["moe"] = None
        if mixed:
            changes["moe"] = moe = moe.model_copy(
                update={
                    "experts": max(len(one.experts) for one in mixed),
                    "experts_per_token": max(one.top_k for one in mixed),
                    "expert_size": max(one.ffn for one in mixed),
                    "dense_layers": tuple(number for number, one in enumerate(layers) if not one.experts),
                }
            )
    chains = _chains(settings, budget)
    if chains is not None:
        changes["chains"] = _sub_chains(settings, chains)
    if settings.window_layers is not None:
        windowed = tuple(new for new, old in enumerate(numbers) if old in settings.window_layers)
        changes["window_layers"] = windowed or None
        if not windowed:
            changes["sliding_window"] = None
    own = []
    for one in layers:
        sizes = {"heads": (one.heads, heads), "kv_heads": (one.key_heads, key_heads)}
        if one.experts:
            assert moe is not None
            sizes["mlp_size"] = (one.ffn, moe.expert_size)
            sizes["experts"] = (len(one.experts), moe.experts)
            sizes["experts_per_token"] = (one.top_k, moe.experts_per_token)
        else:
            sizes["mlp_size"] = (one.ffn, mlp_size)
        own.append(LayerSizes(**{name: mine for name, (mine, usual) in sizes.items() if mine != usual}))
    if any(one != LayerSizes() for one in own):
        changes["layer_sizes"] = tuple(own)
    return DecoderSettings.model_validate(settings.model_copy(update=changes).model_dump())
