"""What one adapter is: its method, its size and where it goes.

Names. The method of arXiv 2409.15371 changed its name three times, and `bone` meant different things:

    here      paper v1-v3   paper v4, first PEFT   PEFT today (MissConfig.init_weights)
    bat_col   Bone-col      Bat                    "bat"
    bat_row   Bone-row      -                      -
    bat_ab    Bone-AB       -                      -
    miss      -             Bone                   True
    mini      -             -                      "mini"
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from resilin.config import Settings

Method = Literal["miss", "mini", "bat_col", "bat_row", "bat_ab", "lora", "rslora", "dora"]
Bias = Literal["none", "all", "only"]

ALIASES: dict[str, Method] = {
    "bone": "miss",
    "bat": "bat_col",
    "bone_col": "bat_col",
    "bone_row": "bat_row",
    "bone_ab": "bat_ab",
}
"""Other names of the methods; `bone` as in PEFT's BoneConfig and the paper's version 4."""

LOW_RANK: frozenset[Method] = frozenset({"lora", "rslora", "dora"})
TILED: frozenset[Method] = frozenset({"bat_col", "bat_row", "bat_ab"})


def _canonical(method: object) -> object:
    return ALIASES.get(method.lower().replace("-", "_"), method) if isinstance(method, str) else method


class AdapterSettings(Settings):
    """One adapter: the same method and size on every linear map it goes to."""

    method: Annotated[Method, BeforeValidator(_canonical)] = "miss"
    """miss: one block shared along the input (quick); bat_col: a block that multiplies the frozen weight's own tiles
    (quality); bat_row, bat_ab: the tiles' columns share; mini: a miss block repeated along the output; lora, rslora,
    dora. `bone`, `bat`, `bone_col`, `bone_row` and `bone_ab` are other names."""
    rank: int = Field(default=64, gt=0)
    """r: rank of LoRA's factors; side of a block."""
    mini_rank: int | None = Field(default=None, gt=0)
    """mini: width of the block, which is repeated along the output and must divide it."""
    alpha: float | None = Field(default=None, gt=0)
    """lora, dora: the product of the factors is scaled by alpha / r; rslora: by alpha / sqrt(r). None: alpha = r."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the adapter's inputs set to zero in training. bat_* have none: they change the weight, not an input."""
    targets: str | tuple[str, ...] = "all-linear"
    """Which linear maps: a list of names (`q`, `attention.q`, or Hugging Face's `q_proj`) that a module's name ends
    with; one regular expression that matches whole names; or `all-linear`, every one but the head and routers."""
    exclude: str | tuple[str, ...] = ()
    """Taken out of the targets again, written like them."""
    layers: tuple[int, ...] | None = None
    """Only in these layers (from 0); None: in all. The layer is the first number in a module's name."""
    bias: Bias = "none"
    """Which of the model's own biases are trained too: none, all of them, or only those of the adapted maps."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained in full and kept with the adapter, by the end of their names (`head`, `norm`)."""

    @property
    def scale(self) -> float:
        """The factor of the product of LoRA's two matrices."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / self.rank**0.5 if self.method == "rslora" else alpha / self.rank

    @model_validator(mode="after")
    def _check(self) -> AdapterSettings:
        def refuse(kind: str, text: str) -> None:
            raise PydanticCustomError(kind, text, {"method": self.method})

        if self.alpha is not None and self.method not in LOW_RANK:
            refuse("alpha", "method {method} has no alpha: it starts at the identity without a scale; leave it out")
        if self.dropout and self.method in TILED:
            refuse("dropout", "method {method} changes the weight and has no input of its own to drop: set dropout = 0")
        if self.method == "mini" and self.mini_rank is None:
            refuse("mini_rank", "method mini needs mini_rank, the width of its block")
        if self.method != "mini" and self.mini_rank is not None:
            refuse("mini_rank", "mini_rank belongs to method mini, not to {method}: leave it out")
        if not self.targets:
            refuse("targets", "targets names no module: use 'all-linear', or names such as ['q', 'v']")
        return self


def facts(settings: AdapterSettings) -> dict[str, Any]:
    """The settings that a reader wants to see, without those left at nothing."""
    tree = settings.model_dump(mode="json")
    return {key: value for key, value in tree.items() if value not in (None, [], 0.0, "none")}
