"""A multi-scale tokenizer whose tokens are bits: patches in principal components, quantised by sign, scale by scale.

Every scale quantises what the coarser ones left (residual quantisation over scales: Tian et al., VAR, 2024, algorithms
1 and 2), each value by its sign (Han et al., Infinity, 2024): with F the components of a picture on the finest grid and
G = 0, for each scale k

    bits_k = [area(F - G, grid_k) > 0],      G <- G + bilinear((2 bits_k - 1) * a_k)

where a_k, one number for each scale and component, is the mean absolute residual of the pictures it was fitted to: the
best two values for a sign. Components are in the order of their variance, so a tokenizer of b bits is the first b bits
of a larger one, and bits can be added while training.

Bits may be flipped on the way. The residual of finer scales is then that of the flipped picture, so targets correct
what was flipped (Infinity, section 3.3), and what goes into the model is the flipped picture.

Shapes: P pictures, C channels, H, W pixels, d bits (components), h, w cells of a grid, S scales, N places of a picture.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resilin.data.errors import DataError
from resilin.modalities.shape import PictureShape


class EncodedPictures(NamedTuple):
    """Pictures as a model sees and predicts them.

    Attributes:
        features_PNF: of every place, F = 2 d + 2: the picture so far on the place's grid, the frame before on it, and
            whether there are the one and the other.
        bits_PMd: bool, the targets of the M places that are predicted, scale by scale.
        made_Pdhw: the picture that the (flipped) bits add up to, in components.
    """

    features_PNF: Tensor
    bits_PMd: Tensor
    made_Pdhw: Tensor


@dataclass(frozen=True)
class ScaleTokenizer:
    """See the module. Made by `fit`.

    Attributes:
        shape: of a picture's tokens.
        patch: pixels of a patch's side.
        mean_E: of patches, E = C * patch * patch.
        basis_Ed: principal components, the largest first.
        step_Sd: a_k.
        channels: C.
    """

    shape: PictureShape
    patch: int
    mean_E: Tensor
    basis_Ed: Tensor
    step_Sd: Tensor
    channels: int

    @property
    def bits(self) -> int:
        """D."""
        return self.basis_Ed.shape[1]

    @property
    def features(self) -> int:
        """F."""
        return 2 * self.bits + 2

    @property
    def size(self) -> tuple[int, int]:
        """Pixels of a picture's height and width."""
        return self.shape.finest[0] * self.patch, self.shape.finest[1] * self.patch

    # -- pixels and components ----------------------------------------------------------------------------------

    def components(self, pixels_PCHW: Tensor) -> Tensor:
        """(P, d, h, w): the components of each patch.

        Raises:
            DataError: pictures of another size.
        """
        if tuple(pixels_PCHW.shape[1:]) != (self.channels, *self.size):
            raise DataError(
                f"pictures of {tuple(pixels_PCHW.shape[1:])} (channels, height, width) for a tokenizer of "
                f"{(self.channels, *self.size)}: patch {self.patch} times the finest scale {self.shape.finest}"
            )
        patches_PEN = _patches(pixels_PCHW, self.patch)
        mean_E1, basis_Ed = self.mean_E.to(pixels_PCHW)[:, None], self.basis_Ed.to(pixels_PCHW)
        made_PdN: Tensor = basis_Ed.t() @ (patches_PEN - mean_E1)
        return made_PdN.view(*made_PdN.shape[:2], *self.shape.finest)

    def pixels(self, made_Pdhw: Tensor) -> Tensor:
        """(P, C, H, W): the pictures of such components."""
        patches_PEN = self.basis_Ed.to(made_Pdhw) @ made_Pdhw.flatten(2) + self.mean_E.to(made_Pdhw)[:, None]
        (h, w), p = self.shape.finest, self.patch
        patches_PCpphw = patches_PEN.view(len(made_Pdhw), self.channels, p, p, h, w)
        return patches_PCpphw.permute(0, 1, 4, 2, 5, 3).reshape(len(made_Pdhw), self.channels, h * p, w * p)

    # -- scales -------------------------------------------------------------------------------------------------

    def contribution(self, scale: int, bits_Pdhw: Tensor, active: int | None = None) -> Tensor:
        """(P, d, h, w) on the finest grid: what a scale's bits add to the picture.

        Args:
            scale: its number.
            bits_Pdhw: bool, on its grid.
            active: leading bits that count; None: all.
        """
        step_d = self.step_Sd[scale].to(bits_Pdhw.device)
        if active is not None:
            step_d = step_d.where(torch.arange(self.bits, device=step_d.device) < active, 0.0)
        signed_Pdhw = (2.0 * bits_Pdhw.to(step_d.dtype) - 1.0) * step_d[:, None, None]
        return _fine(signed_Pdhw, self.shape.finest)

    def encode(
        self,
        pixels_PCHW: Tensor,
        begins_P: Tensor | None = None,
        active: int | None = None,
        flips: Sequence[Tensor] | None = None,
    ) -> EncodedPictures:
        """Pictures as features and targets.

        Args:
            pixels_PCHW: frames of a video one behind another.
            begins_P: bool, which pictures have no frame before them; None: all.
            active: leading bits in use; None: all.
            flips: for each scale bool (P, d, h, w), which bits the history has wrong; None: none.
        """
        wanted_Pdhw = self.components(pixels_PCHW)
        made_Pdhw = torch.zeros_like(wanted_Pdhw)
        begins_P = torch.ones(len(pixels_PCHW), dtype=torch.bool) if begins_P is None else begins_P
        so_far, targets = [], []
        for scale, grid in enumerate(self.shape.scales):
            so_far.append(made_Pdhw)
            bits_Pdhw = _coarse(wanted_Pdhw - made_Pdhw, grid) > 0
            targets.append(bits_Pdhw.flatten(2).transpose(1, 2))
            known_Pdhw = bits_Pdhw if flips is None else bits_Pdhw ^ flips[scale].to(bits_Pdhw.device)
            made_Pdhw = made_Pdhw + self.contribution(scale, known_Pdhw, active)
        if self.shape.seen_whole:
            so_far.append(made_Pdhw)
        features_PNF = self.features_of(so_far, made_Pdhw.roll(1, 0), ~begins_P.to(made_Pdhw.device))
        return EncodedPictures(features_PNF, torch.cat(targets, 1), made_Pdhw)

    def features_of(self, so_far: Sequence[Tensor], before_Pdhw: Tensor, follows_P: Tensor) -> Tensor:
        """(P, N, F): the features of the groups for which `so_far` says what the picture was before them.

        Args:
            so_far: (P, d, h, w) on the finest grid, for each group from the first.
            before_Pdhw: the frame before.
            follows_P: bool, whether there is one.
        """
        follows_P1 = follows_P[:, None].to(before_Pdhw.dtype)
        parts = []
        for number, made_Pdhw in enumerate(so_far):
            grid = self.shape.grids[number]
            own_PdN = _coarse(made_Pdhw, grid).flatten(2)
            old_PdN = _coarse(before_Pdhw, grid).flatten(2) * follows_P1[..., None]
            there_P1N = torch.full_like(own_PdN[:, :1], float(number > 0))
            then_P1N = follows_P1[..., None].expand_as(there_P1N)
            parts.append(torch.cat((own_PdN, old_PdN, there_P1N, then_P1N), 1).transpose(1, 2))
        return torch.cat(parts, 1)

    def decode(self, bits_PMd: Tensor, active: int | None = None, scales: int | None = None) -> Tensor:
        """(P, C, H, W): the pictures that bits stand for.

        Args:
            bits_PMd: bool, as `encode` gives them.
            active: leading bits in use; None: all.
            scales: only so many, from the coarsest; None: all.
        """
        made_Pdhw = torch.zeros(len(bits_PMd), self.bits, *self.shape.finest, device=bits_PMd.device)
        at = 0
        for scale, (height, width) in enumerate(self.shape.scales[:scales]):
            own_Pdhw = bits_PMd[:, at : at + height * width].transpose(1, 2).unflatten(2, (height, width))
            made_Pdhw = made_Pdhw + self.contribution(scale, own_Pdhw, active)
            at += height * width
        return self.pixels(made_Pdhw)

    # -- files --------------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write it to a safetensors file."""
        from safetensors.torch import save_file

        facts = {"scales": self.shape.scales, "seen_whole": self.shape.seen_whole, "patch": self.patch}
        facts["channels"] = self.channels
        tensors = {"mean": self.mean_E, "basis": self.basis_Ed.contiguous(), "step": self.step_Sd}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, {"scale_tokenizer": json.dumps(facts)})

    @classmethod
    def load(cls, path: Path) -> ScaleTokenizer:
        """Read it back.

        Raises:
            DataError: the file is none.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                facts = json.loads((file.metadata() or {})["scale_tokenizer"])
                found = {name: file.get_tensor(name) for name in ("mean", "basis", "step")}
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise DataError(f"{path}: holds no tokenizer of pictures: {error}") from None
        shape = PictureShape(tuple((h, w) for h, w in facts["scales"]), facts["seen_whole"])
        return cls(shape, facts["patch"], found["mean"], found["basis"], found["step"], facts["channels"])


def _patches(pixels_PCHW: Tensor, patch: int) -> Tensor:
    """(P, C * patch * patch, h * w): the pixels of each patch."""
    P, C, H, W = pixels_PCHW.shape
    h, w = H // patch, W // patch
    cut_PChpwp = pixels_PCHW.reshape(P, C, h, patch, w, patch)
    return cut_PChpwp.permute(0, 1, 3, 5, 2, 4).reshape(P, C * patch * patch, h * w)


def _coarse(x_Pdhw: Tensor, grid: tuple[int, int]) -> Tensor:
    return x_Pdhw if tuple(x_Pdhw.shape[2:]) == grid else F.adaptive_avg_pool2d(x_Pdhw, grid)


def _fine(x_Pdhw: Tensor, grid: tuple[int, int]) -> Tensor:
    if tuple(x_Pdhw.shape[2:]) == grid:
        return x_Pdhw
    return F.interpolate(x_Pdhw, grid, mode="bilinear", align_corners=False)


def check_scales(scales: Sequence[tuple[int, int]]) -> None:
    """Refuse scales that do not go from coarse to fine.

    Raises:
        ValueError: naming the two.
    """
    for coarse, fine in pairwise(scales):
        if fine[0] < coarse[0] or fine[1] < coarse[1]:
            raise ValueError(f"scales go from coarse to fine, and {fine} comes behind {coarse}")


@torch.no_grad()
def fit(pixels_PCHW: Tensor, shape: PictureShape, patch: int, bits: int) -> ScaleTokenizer:
    """A tokenizer for pictures like these.

    Args:
        pixels_PCHW: float32, thousands of patches at least.
        shape: of its tokens.
        patch: pixels of a patch's side.
        bits: d, at most C * patch * patch.

    Raises:
        DataError: the pictures do not have patch times the finest grid's pixels, or there are fewer values than bits.
    """
    channels, height, width = pixels_PCHW.shape[1:]
    if (height, width) != (shape.finest[0] * patch, shape.finest[1] * patch):
        raise DataError(
            f"pictures of {height} x {width} in patches of {patch} have {height / patch:g} x {width / patch:g} tokens; "
            f"the last of the scales should say so, and is {shape.finest[0]} x {shape.finest[1]}"
        )
    if bits > channels * patch * patch:
        raise DataError(
            f"bits = {bits}: a patch has {channels} x {patch} x {patch} = {channels * patch * patch} values: use as "
            "many bits at most, or a larger patch"
        )
    check_scales(shape.scales)
    patches_ME = _patches(pixels_PCHW.double(), patch).transpose(1, 2).flatten(0, 1)
    mean_E = patches_ME.mean(0)
    centred_ME = patches_ME - mean_E
    _, vectors_EE = torch.linalg.eigh(centred_ME.t() @ centred_ME / len(centred_ME))
    basis_Ed = vectors_EE.flip(1)[:, :bits]
    largest_1d = basis_Ed.abs().argmax(0, keepdim=True)
    basis_Ed = basis_Ed * basis_Ed.gather(0, largest_1d).sign()  # the sign of a component is anybody's choice
    empty_Sd = torch.zeros(len(shape.scales), bits)
    made = ScaleTokenizer(shape, patch, mean_E.float(), basis_Ed.float(), empty_Sd, channels)
    wanted_Pdhw = made.components(pixels_PCHW)
    made_Pdhw, steps = torch.zeros_like(wanted_Pdhw), []
    for scale, grid in enumerate(shape.scales):
        rest_Pdhw = _coarse(wanted_Pdhw - made_Pdhw, grid)
        steps.append(rest_Pdhw.abs().mean((0, 2, 3)))
        made = replace(made, step_Sd=torch.stack([*steps, *empty_Sd[scale + 1 :]]))
        made_Pdhw = made_Pdhw + made.contribution(scale, rest_Pdhw > 0)
    return made
