"""Experts whose states are on disk, in host memory and on the device, each where it is needed when it is needed.

Shapes: A experts that are used, D hidden size, F expert size, P parameters of one expert.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from resilin.memory.cache_policy import CachePolicy, Key, Kind
from resilin.memory.expert_state import ExpertShape, ExpertState, LazyAdamW
from resilin.memory.expert_store import ExpertStore, Geometry
from resilin.memory.host_cache import HostCache
from resilin.models.moe import Experts, Matrices


@dataclass(frozen=True, slots=True)
class TierSettings:
    """Where experts live.

    Attributes:
        folder: of the lowest tier.
        host_bytes: for the cache of states in host memory: so many whole states as fit.
        device_layers: layers whose used experts may lie on the device at once; 2: one that is computed and one ahead.
        policy: who leaves the cache. "lru", where forward, backward and update ask for the same experts in one step
            (recipe `se-moe`: about two thirds of requests hit, one third under "lfu"); "lfu" for requests one by one.
        threshold: of the policy, like what follows.
        period: of the policy.
        decay: of the policy.
        prefetch: whether states of the next layer are read ahead.
        bytes_per_second: of the disk, to stand in for a slower one.
    """

    folder: Path
    host_bytes: int = 1 << 30
    device_layers: int = 2
    policy: Kind = "lru"
    threshold: float = 1.0
    period: int = 100
    decay: float = 0.5
    prefetch: bool = True
    bytes_per_second: float | None = None


@dataclass(frozen=True, slots=True)
class TierReport:
    """Attributes:
    disk_bytes: of the store's files.
    host_bytes: the most that buffers of states took.
    gradient_bytes: the most that experts' gradients took in host memory.
    device_bytes: the most that experts' matrices and their gradients took on the device.
    hit_rate: of requests for states.
    stall_s: seconds that computation waited for the disk.
    read_bytes: from disk.
    written_bytes: to disk.
    active: mean share of experts that a step used.
    """

    disk_bytes: int
    host_bytes: int
    gradient_bytes: int
    device_bytes: int
    hit_rate: float
    stall_s: float
    read_bytes: int
    written_bytes: int
    active: float


@dataclass
class _Layer:
    module: Experts
    expected: list[int] = field(default_factory=list)
    """The experts that the last step used: what the next one is expected to."""
    used: dict[int, None] = field(default_factory=dict)


class TieredExperts:
    """Takes the experts out of a model, and lends them to it while it computes.

    Results do not depend on the cache, the policy or what was read ahead: a state that was not foreseen is read when it
    is needed. An expert that no token visited in a step is not touched by it (see `LazyAdamW`).

        tiers = TieredExperts(model, settings, LazyAdamW(weight_decay=0.1))
        for step in range(steps):
            loss.backward()
            factor = clip(dense gradients' squared norm + tiers.squared_norm())
            tiers.step(lr, factor)
            if step % 10 == 9:
                tiers.write_back()  # what is lost when the process dies is what came after

    Args:
        model: whose `Experts` are taken, all of one shape. In a folder that holds a store their states are those of
            its last commit, else what the model has, without moments.
        settings: the tiers.
        optimizer: the update rule.

    Raises:
        ValueError: the model has no experts, or of several shapes; or not one state fits in host memory.
        StoreError: the folder holds other experts.
    """

    def __init__(self, model: nn.Module, settings: TierSettings, optimizer: LazyAdamW) -> None:
        modules = [module for module in model.modules() if isinstance(module, Experts)]
        shapes = {(len(m.up), m.up.shape[2], m.up.shape[1], m.gate is not None, m.up.device) for m in modules}
        if len(shapes) != 1:
            raise ValueError(f"tiers hold experts of one shape; the model's are {sorted(map(str, shapes)) or 'none'}")
        ((experts, hidden, wide, gated, self.device),) = shapes
        self.shape, self.optimizer, self.settings = ExpertShape(hidden, wide, gated), optimizer, settings
        geometry = Geometry(len(modules), experts, self.shape.record_bytes)
        capacity = settings.host_bytes // geometry.record_bytes
        if not capacity:
            raise ValueError(f"host_bytes ({settings.host_bytes}) is less than one expert's {geometry.record_bytes}")
        capacity = min(capacity, len(modules) * experts)
        policy = CachePolicy(capacity, settings.policy, settings.threshold, settings.period, settings.decay)
        self.store = ExpertStore(settings.folder, geometry, settings.bytes_per_second)
        self.cache = HostCache(self.store, policy, pin_memory=self.device.type == "cuda")
        self.steps, self._log_decay = self.store.step, self.store.note
        self._layers = [_Layer(module) for module in modules]
        self._gradients: dict[Key, Tensor] = {}
        self._loans: OrderedDict[tuple[int, tuple[int, ...]], dict[str, Tensor]] = OrderedDict()
        self._anchor = torch.zeros((), device=self.device, requires_grad=True)
        self._device_peak = self._gradient_peak = self._active = self._counted = 0
        if self.store.fresh:
            self._fill()
        for number, layer in enumerate(self._layers):
            for name in self.shape.names:
                delattr(layer.module, name)
                layer.module.register_parameter(name, None)
            layer.module.lend = _Lender(self, number)

    # -- forward and backward -----------------------------------------------------------------------------------

    @contextmanager
    def lend(self, layer: int, experts: list[int]) -> Iterator[Matrices]:
        """The matrices of some experts of a layer, for its forward pass; the backward pass asks for them again."""
        grad = torch.is_grad_enabled()
        if grad:
            self._layers[layer].used |= dict.fromkeys(experts)
        held = self._fetch(layer, experts)
        self._read_ahead(layer + 1, expected=True)
        matrices = list(held.values())
        if grad:
            lent = _Lend.apply(self._anchor, self, layer, tuple(experts), *matrices)
            matrices = list(lent)
        places = {matrix.untyped_storage().data_ptr(): name for name, matrix in zip(held, matrices, strict=True)}

        def pack(tensor: Tensor) -> Any:
            name = places.get(tensor.untyped_storage().data_ptr()) if tensor.numel() else None
            if name is None:
                return tensor
            return name, tensor.shape, tensor.stride(), tensor.storage_offset()

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            name, shape, stride, offset = packed
            again = self._fetch(layer, experts)[name]
            self._read_ahead(layer - 1, expected=False)
            return again.as_strided(shape, stride, offset)

        by_name = dict(zip(self.shape.names, matrices, strict=True))
        with saved_tensors_hooks(pack, unpack):
            yield by_name.get("gate"), by_name["up"], by_name["down"]

    def add_gradients(self, layer: int, experts: tuple[int, ...], grads: tuple[Tensor | None, ...]) -> None:
        """Add what a backward pass found for some experts' matrices, each (A, ...)."""
        self._measure(sum(grad.nbytes for grad in grads if grad is not None))
        for row, expert in enumerate(experts):
            key = layer, expert
            known = self._gradients.get(key)
            fresh = known is None
            if known is None:
                known = self._gradients[key] = torch.empty(self.shape.parameters)
            for name, grad in zip(self.shape.names, grads, strict=True):
                part = self.shape.matrix(name, known)
                if grad is None:
                    part.zero_() if fresh else None
                elif fresh:
                    part.copy_(grad[row])
                else:
                    part.add_(grad[row].to(part.device))
        self._gradient_peak = max(self._gradient_peak, len(self._gradients) * self.shape.parameters * 4)

    # -- the update ---------------------------------------------------------------------------------------------

    def squared_norm(self) -> float:
        """Of all experts' gradients: each by itself in float64, added in the order of layers and experts.

        The same for any cache. On several ranks that hold different experts, the sum over them is one number each.
        """
        norms = (torch.linalg.vector_norm(self._gradients[key], dtype=torch.float64) for key in sorted(self._gradients))
        return sum(float(norm) ** 2 for norm in norms)

    def gradients(self) -> dict[Key, Tensor]:
        """By layer and expert, (P,) each, of those that tokens visited since the last step."""
        return self._gradients

    def step(self, lr: float, factor: float = 1.0) -> None:
        """Update the experts that tokens visited, and forget the gradients.

        Args:
            lr: learning rate.
            factor: that gradients are multiplied by (clipping, or one over the number of units).
        """
        keys = sorted(self._gradients)
        for place, key in enumerate(keys):
            if self.settings.prefetch and place % 4 == 0:
                self.cache.forget_ahead()
                self.cache.read_ahead(keys[place : place + 8])
            grad_P = self._gradients.pop(key)
            if factor != 1.0:
                grad_P.mul_(factor)
            with self.cache.state(key, change=True) as record:
                state = ExpertState.of(record, self.shape)
                self.optimizer.update(state, grad_P, self.steps, lr, self._log_decay)
        self._log_decay += self.optimizer.log_decay(lr)
        self._loans.clear()
        self._active += len(keys)
        self._counted += 1
        self.steps += 1
        for layer in self._layers:
            layer.expected = sorted(layer.used)
            layer.used.clear()
        self._read_ahead(0, expected=True)

    def write_back(self) -> None:
        """Bring all changes to disk: from now on this step is what a process that starts anew finds."""
        self.cache.write_back(self.steps, self._log_decay)

    # -- what is inside -----------------------------------------------------------------------------------------

    def stacked(self, layer: int) -> dict[str, Tensor]:
        """All states of a layer by name: "up" (E, F, D), "up.exp_avg", "up.exp_avg_sq", ..., and "updates" (E,)."""
        experts = self.store.geometry.experts
        kinds = {"": 0, ".exp_avg": 1, ".exp_avg_sq": 2}
        rows: dict[str, list[Tensor]] = {}
        for expert in range(experts):
            with self.cache.state((layer, expert)) as record:
                state = ExpertState.of(record, self.shape)
                for name in self.shape.names:
                    for kind, place in kinds.items():
                        rows.setdefault(name + kind, []).append(self.shape.matrix(name, state[place]).clone())
                rows.setdefault("updates", []).append(state.counters[0].clone())
        return {name: torch.stack(parts) for name, parts in rows.items()}

    def report(self) -> TierReport:
        """What the tiers took and did so far."""
        counts, geometry = self.cache.counts, self.store.geometry
        return TierReport(
            disk_bytes=geometry.disk_bytes,
            host_bytes=self.cache.bytes,
            gradient_bytes=self._gradient_peak,
            device_bytes=self._device_peak,
            hit_rate=counts.hit_rate,
            stall_s=counts.stall_s,
            read_bytes=self.store.read_bytes,
            written_bytes=self.store.written_bytes,
            active=self._active / max(self._counted * geometry.layers * geometry.experts, 1),
        )

    def close(self) -> None:
        """End the thread and let go of the files; what was not written back is lost."""
        self.cache.close()
        self.store.close()

    # -- within -------------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        record = torch.zeros(self.shape.record_bytes, dtype=torch.uint8)
        state = ExpertState.of(record, self.shape)
        for number, layer in enumerate(self._layers):
            for expert in range(self.store.geometry.experts):
                for name in self.shape.names:
                    whole: Tensor = getattr(layer.module, name)
                    self.shape.matrix(name, state.weights_P).copy_(whole.detach()[expert])
                self.store.write((number, expert), record)
        self.store.commit(0)

    def _fetch(self, layer: int, experts: list[int]) -> dict[str, Tensor]:
        """The matrices of some experts on the device, (A, ...) each."""
        key = layer, tuple(experts)
        known = self._loans.get(key)
        if known is not None:
            self._loans.move_to_end(key)
            return known
        while len(self._loans) >= max(self.settings.device_layers, 1):
            self._loans.popitem(last=False)
        some = torch.empty(0, dtype=torch.float32)
        made = {
            name: torch.empty(
                (len(experts), *self.shape.matrix(name, some.new_empty(self.shape.parameters, device="meta")).shape),
                device=self.device,
            )
            for name in self.shape.names
        }
        for row, expert in enumerate(experts):
            with self.cache.state((layer, expert)) as record:
                weights_P = ExpertState.of(record, self.shape).weights_P
                for name, matrices in made.items():
                    matrices[row].copy_(self.shape.matrix(name, weights_P))
        self._loans[key] = made
        self._measure(0)
        return made

    def _measure(self, more: int) -> None:
        held = sum(matrix.nbytes for loan in self._loans.values() for matrix in loan.values())
        self._device_peak = max(self._device_peak, held + more)

    def _read_ahead(self, layer: int, *, expected: bool) -> None:
        """States of a layer that will be needed next: in the forward pass those that the last step used."""
        if not self.settings.prefetch or not 0 <= layer < len(self._layers):
            return
        known = self._layers[layer]
        self.cache.forget_ahead()
        experts = known.expected if expected else sorted(known.used)
        self.cache.read_ahead([(layer, expert) for expert in experts])


@dataclass(frozen=True)
class _Lender:
    """What `Experts.lend` calls."""

    tiers: TieredExperts
    layer: int

    def __call__(self, experts: list[int]) -> Any:
        return self.tiers.lend(self.layer, experts)


class _Lend(torch.autograd.Function):
    """Matrices that nobody but the graph's hooks keeps; their gradients go to host memory."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, tiers: TieredExperts, layer: int, experts: Any, *matrices: Tensor) -> Any:
        ctx.tiers, ctx.layer, ctx.experts = tiers, layer, experts
        return tuple(matrix.view_as(matrix) for matrix in matrices)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
        ctx.tiers.add_gradients(ctx.layer, ctx.experts, grads)
        return (None,) * (4 + len(grads))
