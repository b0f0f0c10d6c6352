"""The memory of all ranks of a mesh in one process: parameters and moments where a layout puts them, padding as NaN.

Every rank has its own buffers and its own optimizer, which sees nothing else. So what a rank would have to send is
really missing elsewhere, and an element that was taken for padding, or the reverse, is a NaN in the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from resilin.checkpoint.coordinator import Threads
from resilin.checkpoint.folder import CheckpointFolder
from resilin.checkpoint.load import load_part
from resilin.layout import Flat, Layout, Mesh, ParamSpec, Place, Window, check, flat_group, layout_of, named, specs_of
from resilin.layout import staged as with_stages
from resilin.layout.memory import Array, gather, view
from resilin.layout.spec import SpecRule
from resilin.models.decoder_settings import DecoderSettings
from resilin.optim.adamw import AdamW, AdamWPart
from resilin.optim.groups import Group
from resilin.parallel.decoder_specs import Sharding, decoder_stages

KINDS = ("model", "exp_avg", "exp_avg_sq")
Memory = dict[Place, dict[str, Tensor]]


@dataclass(frozen=True)
class Grouped:
    """The stored tensors of one optimizer group."""

    names: tuple[str, ...]
    lr_scale: float
    weight_decay: float


def make_layout(
    shapes: Mapping[str, tuple[int, ...]],
    groups: tuple[Grouped, ...],
    rules: list[SpecRule],
    settings: DecoderSettings,
    mesh: Mesh,
    sharding: Sharding,
) -> tuple[Layout, dict[str, ParamSpec]]:
    """Where the stored tensors lie; ZeRO-1 and 2 have one flat buffer for each optimizer group, ZeRO-3 one a tensor."""
    specs = specs_of({name: (shape, "F32") for name, shape in shapes.items()}, rules)
    if mesh.axis("pp") > 1:
        specs = with_stages(specs, decoder_stages(shapes, settings, mesh.axis("pp")))
    if sharding in ("zero1", "zero2"):
        flat: dict[str, ParamSpec] = {}
        for number, group in enumerate(groups):
            flat |= flat_group({n: specs[n] for n in group.names}, mesh, "dp", buffer=f"group {number}")
        specs = {name: flat[name] for name in specs}
    elif sharding == "zero3":
        specs = {n: ParamSpec(s.shape, s.dtype, (*s.cuts, Flat("dp")), s.padded) for n, s in specs.items()}
    elif sharding != "none":
        raise ValueError(f"sharding {sharding!r} is not part of this recipe")
    layout = named(layout_of(specs, mesh))
    check(layout)
    return layout, specs


class Ranks:
    """All ranks of a mesh.

    Args:
        layout: of the stored tensors, all buffers named.
        specs: it was made from.
        mesh: the ranks.
        groups: of the optimizer.
        optimizer: settings of AdamW.
    """

    def __init__(
        self, layout: Layout, specs: Mapping[str, ParamSpec], mesh: Mesh, groups: tuple[Grouped, ...], optimizer: AdamW
    ) -> None:
        self.layout, self.mesh, self.groups, self.optimizer = layout, mesh, groups, optimizer
        sizes = _buffer_sizes(layout, specs, mesh)
        self.memory: dict[str, Memory] = {
            kind: {
                place: {name: torch.full((n,), math.nan) for name, n in mine.items()} for place, mine in sizes.items()
            }
            for kind in (*KINDS, "grad")
        }
        self.steps = 0
        self._parts = {place: self._part(place) for place in layout.places}

    def _part(self, place: Place) -> AdamWPart | None:
        """The optimizer of one rank, over its own buffers."""
        values = self.memory["model"][place]
        belongs = {name: group for group in self.groups for name in group.names}
        mine: dict[int, list[tuple[str, nn.Parameter]]] = {}
        done: set[str] = set()
        for holding in self.layout.at(place):
            if holding.buffer not in done:
                done.add(holding.buffer)
                parameter = nn.Parameter(values[holding.buffer])
                mine.setdefault(self.groups.index(belongs[holding.tensor]), []).append((holding.buffer, parameter))
        if not mine:
            return None
        groups = [Group(tuple(m), self.groups[g].lr_scale, self.groups[g].weight_decay) for g, m in mine.items()]
        settings = self.optimizer
        part = AdamWPart(
            groups, settings.lr, independent=settings.decay == "independent", betas=settings.betas, eps=settings.eps
        )
        for member in part.members():
            for kind in ("exp_avg", "exp_avg_sq"):
                member.moments[kind].fill_(math.nan)  # what is not set from a state is padding
                self.memory[kind][place][member.name] = member.moments[kind]
            self.memory["model"][place][member.name] = member.parameter.data
            member.parameter.grad = self.memory["grad"][place][member.name]
        return part

    def put(self, kind: str, tensors: Mapping[str, Tensor]) -> None:
        """Give every rank its regions of whole tensors."""
        whole = {name: tensor.detach().contiguous().numpy() for name, tensor in tensors.items()}
        memory = self.arrays(kind)
        for holding in self.layout:
            target = view(memory[holding.place][holding.buffer], holding, holding.region.sizes)
            target[...] = whole[holding.tensor][holding.region.slices]

    def arrays(self, kind: str) -> dict[Place, dict[str, Array]]:
        """The ranks' buffers as numpy arrays that share their memory."""
        return {place: {name: t.numpy() for name, t in mine.items()} for place, mine in self.memory[kind].items()}

    def whole(self, kind: str) -> dict[str, Tensor]:
        """Whole tensors out of the ranks' regions."""
        return {name: torch.from_numpy(a) for name, a in gather(self.layout, self.arrays(kind)).items()}

    @torch.no_grad()
    def update(self, factor: float) -> None:
        """One step of every rank's optimizer, from the gradients that were put."""
        for part in self._parts.values():
            if part is not None:
                part.update(factor, record=False)
        self.steps += 1

    def start_moments(self) -> None:
        """Zero moments, as a new optimizer has."""
        for kind in ("exp_avg", "exp_avg_sq"):
            zero = {name: torch.zeros(held.shape) for name, held in self.layout.tensors.items()}
            self.put(kind, zero)
        self.set_steps(0)

    def set_steps(self, steps: int) -> None:
        """Adam's own count of steps, at every rank."""
        self.steps = steps
        for part in self._parts.values():
            for member in part.members() if part is not None else ():
                member.moments["step"].fill_(float(steps))

    # ---- through files ------------------------------------------------------------------------------------------

    def saver(self, path: Path, declared: Layout) -> Callable[[], None]:
        """What saves as often as it is called: every rank writes its part, in a thread of its own.

        Args:
            path: of a folder of checkpoints.
            declared: where the ranks say that their regions belong (the ranks' own layout, unless that is the mistake
                to be shown).
        """
        layout = state_layout(declared)
        folders = [CheckpointFolder(path, coordinator=rank) for rank in Threads.of(len(declared.places))]

        def one(number: int) -> None:
            place = declared.places[number]
            tree = {"step": self.steps, **self._tree(declared, place)}
            buffers = {f"{kind}/{n}": t for kind in KINDS for n, t in self.memory[kind][place].items()}
            folders[number].save(self.steps, tree, layout, buffers=buffers)
            folders[number].close()

        def save() -> None:
            with ThreadPoolExecutor(len(folders)) as pool:
                list(pool.map(one, range(len(folders))))

        return save

    def _tree(self, declared: Layout, place: Place) -> dict[str, Any]:
        tree: dict[str, dict[str, Tensor]] = {kind: {} for kind in KINDS}
        spans: dict[str, tuple[str, int, int]] = {}
        for holding in declared.at(place):
            last = holding.start + sum((s - 1) * t for s, t in zip(holding.region.sizes, holding.strides, strict=True))
            _, low, high = spans.get(holding.tensor, ("", holding.start, last))
            spans[holding.tensor] = (holding.buffer, min(low, holding.start), max(high, last))
        for name, (buffer, low, high) in spans.items():
            for kind in KINDS:
                tree[kind][name] = self.memory[kind][place][buffer][low : high + 1]
        return tree

    def load(self, path: Path) -> None:
        """Every rank reads its part of the newest checkpoint, whatever layout wrote it."""
        folder = CheckpointFolder(path)
        step = folder.latest()
        if step is None:
            raise ValueError(f"{path}: no checkpoint")
        layout = state_layout(self.layout)
        for place in self.layout.places:
            part = load_part(folder.step_path(step), layout, place)
            for kind in KINDS:
                for name, tensor in self.memory[kind][place].items():
                    loaded = part.buffers.get(f"{kind}/{name}")
                    if loaded is not None:
                        tensor[: loaded.numel()] = loaded.reshape(-1)
        self.set_steps(step)


def state_layout(layout: Layout) -> Layout:
    """Parameters and both moments, each in buffers of its own, laid out alike."""
    many = len(layout.buffers)
    tensors = {}
    for row, kind in enumerate(KINDS):
        made: dict[int, Any] = {}
        for name, held in layout.tensors.items():
            if id(held) not in made:
                made[id(held)] = replace(held, buffers=held.buffers + np.int32(row * many))
            tensors[f"{kind}/{name}"] = made[id(held)]
    return Layout(layout.places, tensors, tuple(f"{kind}/{name}" for kind in KINDS for name in layout.buffers))


def _buffer_sizes(layout: Layout, specs: Mapping[str, ParamSpec], mesh: Mesh) -> dict[Place, dict[str, int]]:
    """Elements of every rank's buffers, the padding at their ends included."""
    sizes: dict[Place, dict[str, int]] = {place: {} for place in layout.places}
    for name, spec in specs.items():
        window = next((cut for cut in spec.cuts if isinstance(cut, Window)), None)
        buffer = window.buffer if window else name
        for place, shape in zip(layout.places, spec.local_shapes(mesh), strict=True):
            if shape is not None:
                sizes[place][buffer] = math.prod(shape)
    return sizes


def _padding(sizes: dict[Place, dict[str, int]]) -> Memory:
    return {place: {name: torch.full((n,), math.nan) for name, n in mine.items()} for place, mine in sizes.items()}
