"""The settings of a sparse model: which layers, which pattern, when the masks move."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Annotated, Literal

from pydantic import Field, model_validator
from torch import nn

from resilin.config import UserError, component
from resilin.keys import Keys
from resilin.models.settings import ModelContext, ModelSettings
from resilin.optim.schedule import Steps
from resilin.sparsity.linear import Metric, SparseLinear
from resilin.sparsity.low_rank import LowRankBoost
from resilin.sparsity.masks import MovingMasks, sparse_layers

NAME = "sparsity"
"""What the moving masks are called in the model."""


class SparsityError(UserError, ValueError):
    """A model that cannot be made sparse as asked; the text says which layer and why."""


class Sparse(ModelSettings):
    """A model whose linear layers keep n of every m weights, by a mask that moves while they train (AST).

    Forward passes use the masked weights; gradients reach all. The decay that draws masked weights to zero is the
    optimizer's: `resilin.sparsity.adamw:SparseAdamW`, or `resilin.sparsity.decay:MaskDecay` around any other.
    """

    n: int = Field(default=2, ge=1)
    """Weights kept of a group."""
    m: int = Field(default=4, ge=1)
    """Consecutive inputs that form a group."""
    density: float | None = Field(default=None, gt=0, le=1)
    """Instead of n:m, the share kept of each row (0.5: its larger half), wherever it lies."""
    metric: Metric = "magnitude"
    """magnitude: |W|, which the paper found better; wanda: |W| times the norm of the input it multiplies, over the
    steps since the last update."""
    calibration_batches: int = Field(default=1, ge=1)
    """wanda: batches of the run that the first mask is made from."""
    update_every: int = Field(default=10, ge=0)
    """Optimizer steps between updates of the masks; 0: the one-shot masks stay. They are also made once more after the
    last step."""
    update_until: Steps = 1.0
    """The last step, or fraction of the run, at which masks move."""
    targets: tuple[str, ...] = ("blocks.*",)
    """Shell patterns of the linear layers' names; embeddings and head lie outside blocks."""
    exclude: tuple[str, ...] = ("*.router", "*.shared_gate")
    """Taken out of the targets again."""
    remainder: Literal["refuse", "pad", "dense"] = "refuse"
    """Where m does not divide a layer's inputs. pad: the last group is smaller and keeps at most n; dense: the layer
    is left as it is."""
    slorb: LowRankBoost | None = None
    """SLoRB: a low-rank correction beside each masked weight; a table with k, init and train_pooling."""
    model: Annotated[ModelSettings, component("resilin.models.decoder_settings:DecoderSettings")] = Field(
        default_factory=dict, validate_default=True
    )
    """The dense model."""

    @model_validator(mode="after")
    def _check(self) -> Sparse:
        if self.density is None and self.n > self.m:
            raise ValueError(
                f"n ({self.n}) is larger than m ({self.m}), but n of every m weights are kept: use n = 1 to {self.m} "
                f"({self.m} keeps all)"
            )
        return self

    def build(self, context: ModelContext) -> nn.Module:
        """The dense model with its layers masked in place, as their initial weights ask for.

        Raises:
            SparsityError: no layer matches, one is masked already, m or k does not divide the inputs of one.
        """
        model = self.model.build(context)
        if any(True for _ in sparse_layers(model)):
            raise SparsityError("the model has masks already: use Sparse once")
        chosen = list(self._chosen(model))
        common = math.gcd(*(linear.in_features for _, linear in chosen))
        for name, linear in chosen:
            self._check_layer(name, linear, common)
        if not chosen:
            names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
            raise SparsityError(
                f"model.targets {list(self.targets)} match no linear layer (or model.exclude and remainder = 'dense' "
                f"leave none); names look like {', '.join(names[:4]) or 'none at all'}"
            )
        keys = Keys.of_step(context.seed, 0).fold("slorb")
        layers = {}
        for name, linear in chosen:
            layers[name] = sparse = SparseLinear(
                linear,
                n=self.n,
                m=self.m,
                density=self.density,
                metric=self.metric,
                moves=self.update_every > 0,
                boost=self.slorb,
                keys=keys.fold(name),
            )
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, sparse)
        calibration = self.calibration_batches if self.metric == "wanda" else 0
        model.add_module(
            NAME, MovingMasks(layers, every=self.update_every, until=self.update_until, calibration=calibration)
        )
        return model

    def _chosen(self, model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
        for name, module in model.named_modules():
            wanted = any(fnmatchcase(name, pattern) for pattern in self.targets)
            unwanted = any(fnmatchcase(name, pattern) for pattern in self.exclude)
            if not isinstance(module, nn.Linear) or not wanted or unwanted:
                continue
            if self._divides(module) or self.remainder != "dense":
                yield name, module

    def _divides(self, linear: nn.Linear) -> bool:
        return self.density is not None or linear.in_features % self.m == 0

    def _check_layer(self, name: str, linear: nn.Linear, common: int) -> None:
        """Args:
        name: of the layer, for the message.
        linear: the layer.
        common: what divides the inputs of all chosen layers.
        """
        if not self._divides(linear) and self.remainder == "refuse":
            near = nearest_divisors(common, self.m, at_least=self.n)
            fits = f"{self.n}:{near[0]} fits all layers; or " if near and near[0] > self.n else ""
            raise SparsityError(
                f"{name} has {linear.in_features} inputs, which m = {self.m} does not divide: {fits}set remainder = "
                "'pad' (its last group is smaller) or 'dense' (the layer stays dense)"
            )
        if self.slorb is not None and linear.in_features % self.slorb.k:
            use = " or ".join(map(str, sorted(nearest_divisors(common, self.slorb.k)[:2])))
            raise SparsityError(
                f"slorb.k ({self.slorb.k}) does not divide the {linear.in_features} inputs of {name}: use {use}"
            )


def nearest_divisors(number: int, wanted: int, at_least: int = 1) -> list[int]:
    """The divisors of a number that are not smaller than `at_least`, the one nearest to `wanted` first."""
    divisors = (d for d in range(at_least, number + 1) if number % d == 0)
    return sorted(divisors, key=lambda d: abs(d - wanted))
