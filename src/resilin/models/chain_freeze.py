"""Which chains of a decoder are trained."""

from __future__ import annotations

import re

from torch import nn

from resilin.models.chain_settings import ChainSettings

_CHAIN = re.compile(r"\.chains\.(\d+)\.")


def chain_of(name: str) -> int:
    """The chain that a parameter belongs to, from 0: shared keys, and what adapters add to them, are the first's."""
    found = _CHAIN.search(name)
    return int(found[1]) if found else 0


def freeze_chains(model: nn.Module, chains: ChainSettings) -> None:
    """Train what the settings say, and nothing else: of frozen parameters nobody makes gradients or optimizer states,
    and no weight decay moves them.

    Args:
        model: a decoder of chains.
        chains: its settings.
    """
    for name, parameter in model.named_parameters():
        wanted = chain_of(name) >= chains.frozen
        if chains.trained == "head":
            table = "head." if getattr(model, "head", None) is not None else "embed."
            wanted = wanted and name.startswith(table)
        if not wanted:
            parameter.requires_grad_(False)


def trained_again(model: nn.Module) -> nn.Module:
    """A model that was read, ready to be trained: all of it, but for what the settings of its chains freeze."""
    model.train().requires_grad_(True)
    for module in model.modules():
        chains = getattr(getattr(module, "settings", None), "chains", None)
        if isinstance(chains, ChainSettings):
            freeze_chains(module, chains)
    return model
