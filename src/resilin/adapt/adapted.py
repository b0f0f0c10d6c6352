"""A model with adapters, as a run's settings name it.

[model]
use = "resilin.adapt.adapted:Adapted"
[model.model]
use = "resilin.models.pretrained:Pretrained"
path = "models/smollm2"
[model.adapters.default]
method = "miss"
rank = 64
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError
from torch import nn

from resilin.adapt.attach import adapter_parameters, attach
from resilin.adapt.peft_folder import load_adapter
from resilin.adapt.settings import AdapterSettings
from resilin.adapt.stored import store_frozen
from resilin.adapt.switch import use_adapters
from resilin.adapt.targets import AdapterError
from resilin.config import UserError, component
from resilin.models.settings import ModelContext, ModelSettings


class Adapted(ModelSettings):
    """A frozen model and the adapters that are trained in its place; it stays a model of its own kind."""

    model: Annotated[ModelSettings, component("resilin.models.decoder_settings:DecoderSettings")] = Field(
        default_factory=dict, validate_default=True
    )
    """The model underneath."""
    adapters: dict[str, AdapterSettings] = Field(default={})
    """Adapters by name, applied in this order. With none here and none in `load`: one `default` of default settings."""
    load: dict[str, Path] = Field(default={})
    """Adapters that start from PEFT folders, by name; their settings are in the folders. They are applied before
    `adapters`."""
    active: tuple[str, ...] | None = None
    """Which to use, in this order; None: all. The others are attached, and stay as they are."""
    frozen: tuple[str, ...] = ()
    """Adapters that are used but not trained."""
    base_dtype: Literal["float32", "bfloat16"] = "float32"
    """What the frozen matrices are stored in; bfloat16 halves them. Adapters, norms and moments are float32, and
    `precision.compute` says what is computed in."""

    @model_validator(mode="after")
    def _names_exist(self) -> Adapted:
        both = sorted(set(self.adapters) & set(self.load))
        if both:
            raise PydanticCustomError(
                "adapter_twice", "adapter {name} stands in both adapters and load: leave one of them", {"name": both[0]}
            )
        known = [*self.load, *(self.adapters or ([] if self.load else ["default"]))]
        for field, names in (("active", self.active or ()), ("frozen", self.frozen)):
            for name in names:
                if name not in known:
                    raise PydanticCustomError(
                        "unknown_adapter",
                        "{field} names an adapter {name} that is not there; the adapters are: {known}",
                        {"field": field, "name": repr(name), "known": ", ".join(known)},
                    )
        return self

    @model_validator(mode="after")
    def _adapters_fit(self) -> Adapted:
        """Told before any data are read, where the model's shape can be; the smallest vocabulary does."""
        try:
            model = self.model.outline(ModelContext(0, 1))
        except (UserError, ValueError, OSError):
            return self  # no model at all, which building it will tell
        if model is not None and self._new():
            try:
                attach(model, self._new())
            except AdapterError as error:
                raise PydanticCustomError("adapters", "{text}", {"text": str(error)}) from None
        return self

    def _new(self) -> dict[str, AdapterSettings]:
        return self.adapters or ({} if self.load else {"default": AdapterSettings()})

    def build(self, context: ModelContext) -> nn.Module:
        """The model with its adapters; it computes the same as without those of `adapters`.

        Raises:
            AdapterError: an adapter fits no map, or a PEFT folder cannot be read.
        """
        return self._adapted(self.model.build(context), context)

    def outline(self, context: ModelContext) -> nn.Module | None:
        """The same on the meta device.

        Raises:
            AdapterError: as `build`.
        """
        inner = self.model.outline(context)
        return None if inner is None else self._adapted(inner, context)

    def _adapted(self, model: nn.Module, context: ModelContext) -> nn.Module:
        for name, folder in self.load.items():
            load_adapter(model, folder, name)
        adapters = self._new()
        if adapters:
            attach(model, adapters, seed=context.seed)
        if self.base_dtype != "float32":
            store_frozen(model, getattr(torch, self.base_dtype), adapters)
        if self.active is not None:
            use_adapters(model, self.active)
        used = (*self.load, *adapters) if self.active is None else self.active
        for name in (*self.load, *adapters):
            if name in self.frozen or name not in used:
                for _, parameter in adapter_parameters(model, name):
                    parameter.requires_grad_(False)
        if not any(p.requires_grad for p in model.parameters()):
            raise AdapterError("no adapter is left to train: all are frozen or not active")
        return model
