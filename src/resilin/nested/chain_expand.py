"""Giving a trained model another chain: what it was stays inside, to the bit, and what is new starts at nothing.

The model becomes the first chain (or keeps its chains) and is frozen; behind it comes a chain of new query heads, new
width and new neurons, that reads old and new. The new columns of the output matrix are zero, so the expanded model
computes the old one's logits exactly; in the first step they alone get a gradient, from the second step on the whole
chain does (Chain-of-Model, 2025, section 3.3).
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from resilin.models.chain_freeze import chain_of
from resilin.models.chain_settings import ChainSettings
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.initial import initial_value
from resilin.nested.budgets import BudgetError
from resilin.nested.in_place import decoder_in


def expanded_settings(
    settings: DecoderSettings, heads: int, *, neurons: int | None = None, share_keys: bool | None = None
) -> DecoderSettings:
    """The settings of a model with one more chain, the others frozen.

    Args:
        settings: of the trained model, with chains or without.
        heads: query heads of the new chain; the stream grows in proportion, and so do key heads unless shared.
        neurons: of its feed-forward; None: in proportion.
        share_keys: whether the new chain reads the keys that are there (CoLM-Air); None: as the model's chains do.

    Raises:
        BudgetError: the new chain does not come out even, or the model cannot have chains.
    """
    old = settings.chains
    if heads < 1:
        raise BudgetError(f"the new chain would have {heads} heads: give it at least one")
    if old is not None and share_keys is not None and share_keys != old.share_keys:
        raise BudgetError(
            f"the model's chains {'share' if old.share_keys else 'do not share'} keys, which a further chain cannot "
            "change: leave share_keys out"
        )
    shares = old.share_keys if old is not None else bool(share_keys)
    sizes = old.sizes if old is not None else (settings.heads,)
    per_head = {
        "hidden_size": settings.hidden_size,
        "mlp_size": settings.feed_forward_size if neurons is None else 0,
        "kv_heads": 0 if shares else settings.key_heads,
    }
    for name, whole in per_head.items():
        if whole * heads % settings.heads:
            step = _least(whole, settings.heads)
            raise BudgetError(
                f"{heads} new heads beside {settings.heads} would bring {whole * heads / settings.heads:g} of "
                f"{name} ({whole}): use a multiple of {step}"
                + (", or say how many neurons" if name == "mlp_size" else "")
                + (", or let the chain share keys" if name == "kv_heads" else "")
            )
    if shares and heads % settings.key_heads:
        raise BudgetError(
            f"{heads} new heads are no multiple of the {settings.key_heads} kv_heads that they would share: use a "
            f"multiple of {settings.key_heads}"
        )
    new_neurons = settings.feed_forward_size * heads // settings.heads if neurons is None else neurons
    of_mlp = (*settings.widths.mlp, new_neurons)
    chains: dict[str, Any] = {"sizes": (*sizes, heads), "share_keys": shares, "frozen": len(sizes)}
    if neurons is not None or (old is not None and old.mlp_sizes):
        chains["mlp_sizes"] = of_mlp
    changes = {
        "hidden_size": settings.hidden_size + per_head["hidden_size"] * heads // settings.heads,
        "heads": settings.heads + heads,
        "kv_heads": settings.key_heads + per_head["kv_heads"] * heads // settings.heads,
        "head_size": settings.head_width,
        "mlp_size": sum(of_mlp),
        "tie_embeddings": False,
        "chains": ChainSettings(**chains),
    }
    try:
        return DecoderSettings.model_validate(settings.model_copy(update=changes).model_dump())
    except ValidationError as error:
        reasons = "; ".join(str(one["msg"]).removeprefix("Value error, ") for one in error.errors())
        raise BudgetError(f"the model cannot be expanded by a chain: {reasons}") from None


def _least(whole: int, heads: int) -> int:
    """The fewest heads that bring a whole number."""
    return next(n for n in range(1, heads + 1) if whole * n % heads == 0)


@torch.no_grad()
def expand(
    model: nn.Module,
    heads: int,
    *,
    neurons: int | None = None,
    share_keys: bool | None = None,
    init_std: float = 0.02,
    seed: int = 0,
) -> Decoder:
    """A model with one more chain: its logits are the old model's, and only the new chain is trained.

    The new chain's matrices are N(0, init_std**2), projections back to the stream 1 / sqrt(2 layers) of that, its norms
    1, its columns of the output matrix 0. A tied output matrix is untied: zero columns could not be the embedding's.

    Args:
        model: a decoder, or a module that has one inside; it is not changed, and its weights are copied.
        heads: query heads of the new chain.
        neurons: of its feed-forward; None: in the proportion of the heads.
        share_keys: CoLM-Air: the new chain has no keys and values of its own; None: as the model's chains have it.
        init_std: of the new matrices.
        seed: of the new weights, which are a function of it and of each parameter's name.

    Raises:
        BudgetError: see `expanded_settings`.
    """
    old = decoder_in(model)
    settings = expanded_settings(old.settings, heads, neurons=neurons, share_keys=share_keys)
    assert settings.chains is not None
    device, dtype = old.embed.weight.device, old.embed.weight.dtype
    new: Decoder = Decoder(settings, seed=None, device="meta").to(dtype).to_empty(device=device).train(old.training)
    if device.type == "meta":
        return new
    known = dict(old.named_parameters(remove_duplicate=False))
    if old.head is None:
        known |= {name.replace("embed.", "head.", 1): p for name, p in known.items() if name.startswith("embed.")}
    drawn = settings.model_copy(update={"init": "normal", "init_std": init_std})
    for name, parameter in new.named_parameters():
        if chain_of(name) < settings.chains.frozen:
            source = known[name if old.settings.chains is not None else name.replace(".chains.0.", ".")]
            if source.dtype != parameter.dtype:  # norms may be kept wider than matrices
                parameter.data = parameter.data.to(source.dtype)
            parameter.copy_(source)
        elif name.startswith("head."):
            parameter.zero_()
        else:
            parameter.copy_(_drawn(name, parameter.shape, drawn, seed))
    return new


def _drawn(name: str, shape: torch.Size, settings: DecoderSettings, seed: int) -> torch.Tensor:
    values = initial_value(name, shape, settings, seed)
    back = ".attention.o." in name or ".mlp.down." in name
    return values * (2 * settings.layers) ** -0.5 if back else values
