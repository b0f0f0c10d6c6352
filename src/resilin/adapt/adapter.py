"""The adapters of one linear map, by method.

Several adapters on one map are applied in order, each to the weight that those before it give:
W_0 = the base, W_i = T_i(W_{i-1}), y = x W_n^T + b. What only adds (miss, mini, lora, rslora) commutes; what
multiplies or normalises the weight (bat_*, dora) does not. `Below` is the map with the weight W_{i-1}.

Every adapter is the identity when it is made, to the bit: what is added is a product with zeros.
Shapes: O outputs, I inputs, r rank or block size.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from resilin.adapt import tiles
from resilin.adapt.fused import bat_col_linear, lora_linear, miss_linear
from resilin.adapt.settings import TILED, AdapterSettings
from resilin.keys import Keys, dropout
from resilin.models.linear import product


class Below(Protocol):
    """A linear map to which an adapter is applied."""

    @property
    def bias(self) -> Tensor | None:
        """(O,), or None."""

    @property
    def plain(self) -> bool:
        """Whether it is `x W^T + b` with a W that gets no gradient."""

    def __call__(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""

    def weight(self) -> Tensor:
        """(O, I)."""


def dropped(x: Tensor, p: float, keys: Keys | None) -> Tensor:
    """Keyed dropout of activations whose rows may be flattened: (B * T, I) as well as (B, T, I)."""
    if keys is None or p == 0.0:
        return x
    samples = len(keys.slots_B)
    if x.shape[0] == samples:
        return dropout(x, p, keys)
    return dropout(x.reshape(samples, -1, x.shape[-1]), p, keys).view(x.shape)


class Adapter(nn.Module, ABC):
    """One adapter on one linear map.

    Attributes:
        settings: of the adapter.
    """

    invertible = True
    """Whether the weight can be computed back from the merged one."""

    def __init__(self, settings: AdapterSettings) -> None:
        super().__init__()
        self.settings = settings

    def fill(self, keys: Keys) -> None:
        """Random initial values, where there are some; drawn on the CPU."""

    @abstractmethod
    def output(self, x: Tensor, below: Below, strength: float, keys: Keys | None) -> Tensor:
        """The map with this adapter, (..., I) -> (..., O); `keys` for dropout, None: none."""

    @abstractmethod
    def changed(self, weight_OI: Tensor, strength: float) -> Tensor:
        """The weight with this adapter, differentiable; in the wider of both formats."""

    @abstractmethod
    def restored(self, weight_OI: Tensor, strength: float) -> Tensor:
        """The weight before `changed`.

        Raises:
            ValueError: it cannot be computed back.
        """


class Miss(Adapter):
    """dW[:, k] = D[k mod r, :], D (r, O) zero at first (Bone of version 4, MiSS)."""

    def __init__(self, settings: AdapterSettings, inputs: int, outputs: int, **kind: object) -> None:
        super().__init__(settings)
        self.block = nn.Parameter(torch.zeros(settings.rank, outputs, **kind))  # type: ignore[call-overload]

    def whole(self) -> Tensor:
        """D (r, O)."""
        return self.block

    def output(self, x: Tensor, below: Below, strength: float, keys: Keys | None) -> Tensor:
        """`below(x) + fold(x) D`."""
        p = self.settings.dropout
        if below.plain and (keys is None or not p):
            return miss_linear(x, below.weight(), below.bias, self.whole(), strength)
        y = below(x)
        folded = tiles.fold(dropped(x, p, keys), self.settings.rank)
        added = folded @ self.whole().to(folded.dtype)
        return y + (added if strength == 1 else added * strength)

    def changed(self, weight_OI: Tensor, strength: float) -> Tensor:
        """W + dW."""
        return weight_OI + tiles.miss_delta(strength * self.whole(), weight_OI.shape[1])

    def restored(self, weight_OI: Tensor, strength: float) -> Tensor:
        """W' - dW, computed in float64."""
        delta = tiles.miss_delta(strength * self.whole().double(), weight_OI.shape[1])
        return (weight_OI.double() - delta).to(weight_OI.dtype)


class Mini(Miss):
    """As `Miss` with D = M repeated along the outputs, M (r, mini_rank)."""

    def __init__(self, settings: AdapterSettings, inputs: int, outputs: int, **kind: object) -> None:
        assert settings.mini_rank is not None
        super().__init__(settings, inputs, settings.mini_rank, **kind)
        self.repeats = outputs // settings.mini_rank

    def whole(self) -> Tensor:
        """D (r, O)."""
        return self.block.repeat(1, self.repeats)


class BatCol(Adapter):
    """W'[a][c] = W[a][c] (I + B[a]) + B[a], B (O / r, r, r) zero at first (Bone-col of versions 1 to 3, Bat)."""

    def __init__(self, settings: AdapterSettings, inputs: int, outputs: int, **kind: object) -> None:
        super().__init__(settings)
        r = settings.rank
        self.block = nn.Parameter(torch.zeros(outputs // r, r, r, **kind))  # type: ignore[call-overload]

    def _strong(self, strength: float) -> Tensor:
        return self.block if strength == 1 else self.block * strength

    def output(self, x: Tensor, below: Below, strength: float, keys: Keys | None) -> Tensor:
        """The product with the changed weight, which is not kept for the backward pass."""
        if below.plain:
            return bat_col_linear(x, below.weight(), below.bias, self._strong(strength))
        return product(x, self.changed(below.weight(), strength), below.bias)

    def changed(self, weight_OI: Tensor, strength: float) -> Tensor:
        """W'."""
        dtype = torch.promote_types(weight_OI.dtype, self.block.dtype)
        return tiles.bat_col(weight_OI.to(dtype), self._strong(strength).to(dtype))

    def restored(self, weight_OI: Tensor, strength: float) -> Tensor:
        """Through the inverse of I + B[a] in float64."""
        return tiles.bat_col_inverse(weight_OI, self._strong(strength))


class BatRow(Adapter):
    """W'[a][c] = W[a][c] (I + B[c]) + B[c], B (I / r, r, r) zero at first (Bone-row).

    B[c] meets the weight's columns, so that the input can be turned in its place: W' x = W (x + B x) + sum_c B[c] x_c.
    No weight is made.
    """

    def __init__(self, settings: AdapterSettings, inputs: int, outputs: int, **kind: object) -> None:
        super().__init__(settings)
        r = settings.rank
        self.block = nn.Parameter(torch.zeros(inputs // r, r, r, **kind))  # type: ignore[call-overload]

    def blocks(self, strength: float) -> tuple[Tensor, Tensor]:
        """The block that multiplies and the one that is added."""
        block = self.block if strength == 1 else self.block * strength
        return block, block

    def output(self, x: Tensor, below: Below, strength: float, keys: Keys | None) -> Tensor:
        """Two products with the input's groups around `below`."""
        left, offset = self.blocks(strength)
        turned = tiles.block_diagonal(x, left.to(x.dtype))
        added = turned if offset is left else tiles.block_diagonal(x, offset.to(x.dtype))
        y = below(x + turned.flatten(-2).to(x.dtype))
        return y + tiles.unfold(added.sum(-2), y.shape[-1]).to(y.dtype)

    def changed(self, weight_OI: Tensor, strength: float) -> Tensor:
        """W'."""
        dtype = torch.promote_types(weight_OI.dtype, self.block.dtype)
        left, offset = self.blocks(strength)
        return tiles.bat_ab(weight_OI.to(dtype), left.to(dtype), offset.to(dtype))

    def restored(self, weight_OI: Tensor, strength: float) -> Tensor:
        """Through the inverse of I + B[c] in float64."""
        return tiles.bat_ab_inverse(weight_OI, *self.blocks(strength))


class BatAB(BatRow):
    """W'[a][c] = W[a][c] (I + A[c]) + B[c], two blocks (I / r, r, r), zero at first (Bone-AB)."""

    def __init__(self, settings: AdapterSettings, inputs: int, outputs: int, **kind: object) -> None:
        super().__init__(settings, inputs, outputs, **kind)
        self.offset = nn.Parameter(torch.zeros_like(self.block))

    def blocks(self, strength: float) -> tuple[Tensor, Tensor]:
        """A, B."""
        return self.block * strength, self.offset * strength


class Lora(Adapter):
    """dW = s B A, A (r, I) uniform in +-1 / sqrt(I), B (O, r) zero (Hu et al., 2021; rsLoRA: s = alpha / sqrt(r))."""

    def __init__(self, settings: AdapterSettings, inputs: int, outputs: int, **kind: object) -> None:
        super().__init__(settings)
        self.down = nn.Parameter(torch.empty(settings.rank, inputs, **kind))  # type: ignore[call-overload]
        self.up = nn.Parameter(torch.zeros(outputs, settings.rank, **kind))  # type: ignore[call-overload]

    @torch.no_grad()
    def fill(self, keys: Keys) -> None:
        """A's values, as PEFT distributes them."""
        bound = self.down.shape[1] ** -0.5
        drawn = torch.empty(self.down.shape).uniform_(-bound, bound, generator=keys.generator())
        self.down.copy_(drawn)

    def output(self, x: Tensor, below: Below, strength: float, keys: Keys | None) -> Tensor:
        """`below(x) + s (x A^T) B^T`."""
        p, scale = self.settings.dropout, self.settings.scale * strength
        if below.plain and (keys is None or not p):
            return lora_linear(x, below.weight(), below.bias, self.down, self.up, scale)
        return below(x) + self._low(dropped(x, p, keys)) * scale

    def _low(self, x: Tensor) -> Tensor:
        low = nn.functional.linear(x, self.down.to(x.dtype))
        return nn.functional.linear(low, self.up.to(low.dtype))

    def changed(self, weight_OI: Tensor, strength: float) -> Tensor:
        """W + s B A."""
        return weight_OI + (self.settings.scale * strength) * (self.up @ self.down)

    def restored(self, weight_OI: Tensor, strength: float) -> Tensor:
        """W' - s B A, computed in float64."""
        delta = (self.settings.scale * strength) * (self.up.double() @ self.down.double())
        return (weight_OI.double() - delta).to(weight_OI.dtype)


class Dora(Lora):
    """W' = m (W + s B A) / ||W + s B A||, norms over each output's row, m (O,) at first ||W|| (Liu et al., 2024).

    The norm is no part of the graph (their section 4.3). It is computed from ||W||, W A^T and A A^T: no (O, I)
    matrix is made for it.
    """

    invertible = False

    def __init__(self, settings: AdapterSettings, inputs: int, outputs: int, **kind: object) -> None:
        super().__init__(settings, inputs, outputs, **kind)
        self.magnitude = nn.Parameter(torch.ones(outputs, **kind))  # type: ignore[call-overload]

    @torch.no_grad()
    def start_from(self, weight_OI: Tensor) -> None:
        """Set m to ||W||, the norm as it stands with B = 0."""
        self.magnitude.copy_(self._norm(weight_OI))

    @torch.no_grad()
    def _norm(self, weight_OI: Tensor) -> Tensor:
        dtype = torch.promote_types(weight_OI.dtype, torch.float32)
        weight, down, up = (t.to(dtype) for t in (weight_OI, self.down, self.up))
        scale, own = self.settings.scale, torch.linalg.vector_norm(weight, dim=1)
        crossed = 2 * ((weight @ down.t()) * up).sum(1) + scale * ((up @ (down @ down.t())) * up).sum(1)
        norm: Tensor = (own * own + scale * crossed).clamp_min(0).sqrt()
        return norm

    def _factor(self, weight_OI: Tensor, strength: float) -> Tensor:
        if strength != 1:
            raise ValueError(f"a dora adapter has no strength but 1 (asked for {strength}): it rescales the weight")
        return self.magnitude / self._norm(weight_OI).to(self.magnitude.dtype)

    def output(self, x: Tensor, below: Below, strength: float, keys: Keys | None) -> Tensor:
        """`below(x)` and the low-rank part, rescaled."""
        p = self.settings.dropout
        y, factor = below(x), self._factor(below.weight(), strength)
        factor = factor.to(y.dtype)
        part = x if keys is None or not p else dropped(x, p, keys)
        linear = y if part is x else below(part)
        if below.bias is not None:
            linear = linear - below.bias.to(linear.dtype)
        return y + (factor - 1) * linear + factor * (self._low(part) * self.settings.scale)

    def changed(self, weight_OI: Tensor, strength: float) -> Tensor:
        """W'."""
        return self._factor(weight_OI, strength)[:, None] * super().changed(weight_OI, strength)

    def restored(self, weight_OI: Tensor, strength: float) -> Tensor:
        """Never: the norm of W + s B A is not in the merged weight."""
        raise ValueError("a dora adapter cannot be computed out of a merged weight: merge with keep=True")


METHODS: dict[str, type[Adapter]] = {
    "miss": Miss,
    "mini": Mini,
    "bat_col": BatCol,
    "bat_row": BatRow,
    "bat_ab": BatAB,
    "lora": Lora,
    "rslora": Lora,
    "dora": Dora,
}


def misfit(settings: AdapterSettings, maps: Mapping[str, tuple[int, int]]) -> str | None:
    """What does not fit this method, with the nearest sizes that fit all maps; None: nothing.

    Args:
        settings: of the adapter.
        maps: outputs and inputs of every map, by name.
    """
    sides = {path: (shape if settings.method in TILED else ()) for path, shape in maps.items()}
    outputs = {path: (shape[:1] if settings.mini_rank is not None else ()) for path, shape in maps.items()}
    for name, size, lengths in (("rank", settings.rank, sides), ("mini_rank", settings.mini_rank, outputs)):
        for path, needed in lengths.items():
            if size is not None and any(length % size for length in needed):
                common = math.gcd(*(length for each in lengths.values() for length in each))
                fitting = [d for d in range(1, common + 1) if common % d == 0]
                near = [d for d in fitting if d < size][-1:] + [d for d in fitting if d > size][:1]
                what = "both sides" if name == "rank" else "the outputs"
                return (
                    f"{path} is {maps[path][0]} x {maps[path][1]} (outputs x inputs), and {name} {size} should divide "
                    f"{what}: the nearest that fit all {len(maps)} maps: {' and '.join(map(str, near))}"
                )
    return None
