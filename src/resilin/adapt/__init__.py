"""Adapters: a frozen model with small trainable additions, merged, switched and exchanged with PEFT."""

from resilin.adapt.attach import attach
from resilin.adapt.merge import merge, unmerge
from resilin.adapt.peft_folder import load_adapter, save_adapter
from resilin.adapt.settings import AdapterSettings
from resilin.adapt.switch import before_training, use_adapters, with_adapters, without_adapters

__all__ = [
    "AdapterSettings",
    "attach",
    "before_training",
    "load_adapter",
    "merge",
    "save_adapter",
    "unmerge",
    "use_adapters",
    "with_adapters",
    "without_adapters",
]
