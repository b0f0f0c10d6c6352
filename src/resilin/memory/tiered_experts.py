"""Experts whose states are on disk, in host memory and on the device, each where it is needed when it is needed.

Shapes: E experts, A of them that are used, D hidden size, F expert size, P parameters of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resilin.config import UserError
from resilin.memory.cache_policy import CachePolicy, Key
from resilin.memory.expert_layer import ExpertLayer, StackRows, Unit, common_shape
from resilin.memory.expert_loans import ExpertLoans
from resilin.memory.expert_state import Record
from resilin.memory.expert_store import ExpertStore, Geometry
from resilin.memory.expert_updates import ExpertUpdates, outline_of
from resilin.memory.host_cache import HostCache
from resilin.memory.settings import ExpertTiers
from resilin.memory.tier_report import TierReport
from resilin.models.moe import Experts, Matrices
from resilin.nouns import Deferred
from resilin.optim.clip import global_norm
from resilin.optim.rows import give_rows, gradients_of
from resilin.optim.settings import OptimizerSettings


class TieredExperts:
    """Takes the experts out of a model, and lends them to it while it computes.

    Results are those of the same model in memory, whatever the cache, the policy and what was read ahead: a state that
    was not foreseen is read when it is needed. An expert that no token visited is not fetched; the updates that it
    missed are made up for when it is (see `ExpertUpdates`).

        tiers = TieredExperts(model, folder, ExpertTiers(), AdamW(), total_steps)
        for step in range(tiers.steps, total_steps):
            loss.backward()
            factor = clip(dense gradients' squared norm + tiers.squared_norm())
            tiers.scale(factor)
            tiers.step(step)
            if step % 10 == 9:
                tiers.write_back()  # what is lost when the process dies is what came after

    Of the stacks of experts there stay parameters on the meta device: named, counted, without memory.

    Args:
        model: whose `Experts` are taken, all of one shape.
        folder: of the lowest tier. Where it holds a store, states are those of its last commit, else the model's.
        settings: the tiers.
        optimizer: of the run; experts are updated by its rule.
        total_steps: of the run.
        outline: names and shapes by which the optimizer groups parameters; None: the model's.
        values: of a model without memory: (name, shape) -> the initial values of a stack.
        device: where the model computes; None: where its experts are.
        scratch: keep nothing that outlives this process: files of half the size, and no `write_back`.

    Raises:
        UserError: the model has no experts, or of several shapes; not one state fits in host memory; or the optimizer
            cannot update experts one by one.
        StoreError: the folder holds other experts.

    Attributes:
        names: of the stacks, in the model's order.
        steps: of the last commit, and counted on.
    """

    def __init__(
        self,
        model: nn.Module,
        folder: Path,
        settings: ExpertTiers,
        optimizer: OptimizerSettings,
        total_steps: int,
        *,
        outline: nn.Module | None = None,
        values: Callable[[str, torch.Size], Tensor] | None = None,
        device: torch.device | None = None,
        scratch: bool = False,
    ) -> None:
        modules = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
        self.shape, experts, trained = common_shape(modules)
        self.device = device or next(iter(modules.values())).up.device
        self.settings, outline = settings, outline_of(model) if outline is None else outline
        self._layers: list[ExpertLayer] = []
        self._trained = trained
        for prefix, module in modules.items():
            layer = ExpertLayer(prefix, module, None, [Unit() for _ in range(experts)])
            if trained:
                layer.updates = ExpertUpdates(optimizer, outline, total_steps, layer.names(self.shape), self.shape)
            self._layers.append(layer)
        self.names = [name for layer in self._layers for name in layer.names(self.shape).values()]
        rule = self._layers[0].updates
        self.record = Record(self.shape, (), ()) if rule is None else rule.record
        geometry = Geometry(len(modules), experts, self.record.record_bytes, 1 if scratch else 2)
        capacity = settings.host_bytes // geometry.record_bytes
        if not capacity:
            raise UserError(
                f"memory.experts.host_bytes ({settings.host_bytes}) is less than the state of one expert, "
                f"{geometry.record_bytes} bytes: raise it to a few times the number of experts that a layer uses"
            )
        capacity = min(capacity, len(modules) * experts)
        policy = CachePolicy(capacity, settings.policy, settings.threshold, settings.period, settings.decay)
        rate = settings.megabytes_per_second
        self.store = ExpertStore(folder, geometry, None if rate is None else rate * 1e6)
        self.cache = HostCache(self.store, policy, pin_memory=self.device.type == "cuda")
        self.steps = self.store.step
        most = settings.device_layers
        self._loans = ExpertLoans(self.shape, self.device, most, self._bring, self._add_gradients)
        self._zeros_P = torch.zeros(self.record.parameters) if trained else torch.empty(0)
        self._gradient_peak = self._active = self._counted = 0
        self._fill(values, keep=not self.store.fresh)
        for number, layer in enumerate(self._layers):
            self._take(number, layer)

    # -- forward and backward -----------------------------------------------------------------------------------

    def lend(self, layer: int, experts: list[int]) -> AbstractContextManager[Matrices]:
        """The matrices of some experts of a layer, for its forward pass (`ExpertLoans.lend`).

        Where no token came, one expert is lent all the same, for the graph to go on.
        """
        experts, known = experts or [0], self._layers[layer]
        trained = self._trained and torch.is_grad_enabled()
        if torch.is_grad_enabled():
            known.used |= dict.fromkeys(experts)
            known.trained = trained
        come = partial(self._read_ahead, layer + 1, expected=True)
        again = partial(self._read_ahead, layer - 1, expected=False)
        return self._loans.lend(layer, experts, trained=trained, come=come, again=again)

    def _add_gradients(self, layer: int, experts: tuple[int, ...], grads: tuple[Tensor | None, ...]) -> None:
        units = self._layers[layer].units
        for row, expert in enumerate(experts):
            unit = units[expert]
            fresh = unit.grad is None
            if unit.grad is None:
                unit.grad = torch.empty(self.record.parameters)
            for name, grad in zip(self.shape.names, grads, strict=True):
                part = self.shape.matrix(name, unit.grad)
                if grad is None:
                    part.zero_() if fresh else None
                elif fresh:
                    part.copy_(grad[row])
                else:
                    part.add_(grad[row].to(part))
        held = sum(unit.grad is not None for one in self._layers for unit in one.units)
        self._gradient_peak = max(self._gradient_peak, held * self.record.parameters * 4)

    # -- the update ---------------------------------------------------------------------------------------------

    def gradients(self) -> dict[Key, Tensor]:
        """By layer and expert, (P,) each, of those that tokens visited since the last step."""
        return {
            (number, expert): unit.grad
            for number, layer in enumerate(self._layers)
            for expert, unit in enumerate(layer.units)
            if unit.grad is not None
        }

    def squared_norm(self) -> float:
        """Of all experts' gradients, in one order for any cache.

        On several ranks that hold different experts, the sum over them is one number each.
        """
        stacks = [getattr(layer.module, short) for layer in self._layers for short in self.shape.names]
        return float(global_norm(gradients_of(stacks))) ** 2

    def scale(self, factor: float) -> None:
        """Multiply all gradients: by one over the number of units, or to clip them."""
        for grad in self.gradients().values():
            grad.mul_(factor)

    def drop_gradients(self) -> None:
        """Forget what a step that is not committed has found."""
        for layer in self._layers:
            layer.trained = False
            layer.used.clear()
            for unit in layer.units:
                unit.grad = None

    def step(self, step: int) -> None:
        """Update all experts, those that no token visited when they are needed; and forget the gradients.

        Args:
            step: the number of the update, by which the schedule goes.
        """
        gradients = self.gradients()
        keys = sorted(gradients)
        for place, key in enumerate(keys):
            if self.settings.prefetch and place % 4 == 0:
                self.cache.forget_ahead()
                self.cache.read_ahead(keys[place : place + 8])
            layer = self._layers[key[0]]
            with self.cache.state(key, change=True) as record:
                state = self.record.of(record)
                layer.make_up(state, self._zeros_P)
                assert layer.updates is not None
                layer.updates.apply(state, gradients[key], (step,))
        for layer in self._layers:
            if layer.trained:
                layer.missed.append(step)
            layer.expected = sorted(layer.used)
        self._loans.clear()
        self._active += len(keys)
        self._counted += 1
        self.steps = step + 1
        self.drop_gradients()
        self._read_ahead(0, expected=True)

    def settle(self) -> None:
        """Make up for all updates that experts missed, and bring all states to the store."""
        for number, layer in enumerate(self._layers):
            if layer.missed:
                for expert in range(self.store.geometry.experts):
                    with self.cache.aside((number, expert), change=True) as record:
                        layer.make_up(self.record.of(record), self._zeros_P)
                layer.before += len(layer.missed)
                layer.missed.clear()
        self.cache.flush()

    def write_back(self) -> None:
        """Bring all changes to disk: from now on this step is what a process that starts anew finds."""
        self.settle()
        self.cache.write_back(self.steps)

    # -- what is inside -----------------------------------------------------------------------------------------

    def moments(self) -> dict[str, dict[str, Tensor | Deferred]]:
        """What the optimizer keeps of them, as it would itself: by name and kind, likewise; none where frozen."""
        if not self._trained:
            return {}
        self.settle()
        found: dict[str, dict[str, Tensor | Deferred]] = {}
        for number, short, name in self._stacks():
            place = self.shape.names.index(short)
            first = self.record.of(self.store.view((number, 0)))
            found[name] = {kind: first.single[kind][place].clone() for kind in self.record.single}
            found[name] |= {kind: self._stack(number, short, kind) for kind in self.record.wide}
        return found

    @torch.no_grad()
    def load_weights(self, layer: int, stacks: Mapping[str, Tensor]) -> None:
        """Take the matrices of a layer's experts, by `ExpertShape.names`, (E, ...) each."""
        self.settle()  # what an expert has missed moves the weights it had
        self._loans.clear()
        for expert in range(self.store.geometry.experts):
            with self.cache.aside((layer, expert), change=True) as record:
                weights_P = self.record.of(record).weights_P
                for short, stack in stacks.items():
                    self.shape.matrix(short, weights_P).copy_(stack[expert])

    @torch.no_grad()
    def load_moments(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take back what `moments` gave, or the optimizer of a model in memory; see `check_moments`."""
        if not self._trained:
            return
        experts = self.store.geometry.experts
        for number, layer in enumerate(self._layers):
            layer.missed.clear()
            layer.before = 0
            for expert in range(experts):
                with self.cache.aside((number, expert), change=True) as record:
                    state = self.record.of(record)
                    state.updates.zero_()
                    for short, name in layer.names(self.shape).items():
                        for kind, moment in state.moments(self.shape, short).items():
                            moment.copy_(saved[name][kind][expert] if kind in self.record.wide else saved[name][kind])

    def check_moments(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Refuse moments of another model or optimizer.

        Raises:
            ValueError: naming what is missing or has another shape.
        """
        if not self._trained:
            return
        kinds, experts = {*self.record.wide, *self.record.single}, self.store.geometry.experts
        for _, short, name in self._stacks():
            if name not in saved:
                raise ValueError(f"the saved optimizer state lacks parameter {name!r}, which this model trains")
            if set(saved[name]) != kinds:
                raise ValueError(
                    f"the saved optimizer state of {name!r} holds {', '.join(sorted(saved[name])) or 'nothing'}, and "
                    f"this optimizer keeps {', '.join(sorted(kinds)) or 'nothing'}: was it saved by another one?"
                )
            for kind, moment in saved[name].items():
                shape = (experts, *self.shape.matrix_shape(short)) if kind in self.record.wide else ()
                if tuple(moment.shape) != shape:
                    raise ValueError(
                        f"the saved {kind!r} of parameter {name!r} has shape {tuple(moment.shape)}; this model's is "
                        f"{shape}"
                    )

    def stacked(self, layer: int) -> dict[str, Tensor]:
        """All states of a layer by name: "up" (E, F, D), "up.exp_avg", "up.exp_avg_sq", ..."""
        self.settle()
        found = {}
        for number, short, _ in self._stacks():
            if number == layer:
                found[short] = self._stack(layer, short).read()
                found |= {f"{short}.{kind}": self._stack(layer, short, kind).read() for kind in self.record.wide}
        return found

    def report(self) -> TierReport:
        """What the tiers took and did so far."""
        counts, geometry = self.cache.counts, self.store.geometry
        return TierReport(
            disk_bytes=geometry.disk_bytes,
            host_bytes=self.cache.bytes,
            gradient_bytes=self._gradient_peak,
            device_bytes=self._loans.peak,
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

    def _stacks(self) -> Iterator[tuple[int, str, str]]:
        """Layer, short name and name in the model of every stack."""
        for number, layer in enumerate(self._layers):
            yield from ((number, short, name) for short, name in layer.names(self.shape).items())

    def _stack(self, layer: int, name: str, kind: str | None = None) -> Deferred:
        """One stack, of weights or of a moment, as the store has it when it is read."""

        def read() -> Tensor:
            states = (self.record.of(self.store.view((layer, e))) for e in range(self.store.geometry.experts))
            flat = (state.weights_P if kind is None else state.wide[kind] for state in states)
            return torch.stack([self.shape.matrix(name, one_P) for one_P in flat])

        return Deferred(torch.float32, (self.store.geometry.experts, *self.shape.matrix_shape(name)), read)

    @torch.no_grad()
    def _fill(self, values: Callable[[str, torch.Size], Tensor] | None, *, keep: bool) -> None:
        """The states that the model begins with; with `keep`, those that are there."""
        if keep:
            for number, layer in enumerate(self._layers):
                layer.before = int(self.record.of(self.store.view((number, 0))).updates)
            return
        record = torch.zeros(self.record.record_bytes, dtype=torch.uint8)
        weights_P = self.record.of(record).weights_P
        for number, layer in enumerate(self._layers):
            stacks: dict[str, Tensor] = {}
            for short, name in layer.names(self.shape).items():
                mine: nn.Parameter = getattr(layer.module, short)
                stacks[short] = mine.detach() if values is None else values(name, mine.shape)
            for expert in range(self.store.geometry.experts):
                for short, stack in stacks.items():
                    self.shape.matrix(short, weights_P).copy_(stack[expert])
                self.store.write((number, expert), record)
        if self.store.geometry.slots > 1:
            self.store.commit(0)

    def _take(self, number: int, layer: ExpertLayer) -> None:
        """Leave names and shapes of a layer's stacks, and lend it what it needs."""
        for short in self.shape.names:
            before: nn.Parameter = getattr(layer.module, short)
            outline = nn.Parameter(torch.empty_like(before, device="meta"), requires_grad=self._trained)
            give_rows(outline, StackRows(layer.units if self._trained else [], short, self.shape))
            setattr(layer.module, short, outline)
        layer.module.lend = partial(self.lend, number)

        def saved(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
            self.settle()
            state |= {prefix + short: self._stack(number, short) for short in self.shape.names}

        def loaded(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
            stacks = {short: state[prefix + short] for short in self.shape.names if prefix + short in state}
            if not stacks:
                return
            shapes = {short: tuple(getattr(module, short).shape) for short in stacks}
            if all(tuple(stack.shape) == shapes[short] for short, stack in stacks.items()):  # or else torch says so
                self.load_weights(number, stacks)
                state |= {prefix + short: torch.empty(shape, device="meta") for short, shape in shapes.items()}

        layer.module.register_state_dict_post_hook(saved)
        layer.module.register_load_state_dict_pre_hook(loaded)

    def _bring(self, layer: int, expert: int, matrices: dict[str, Tensor]) -> None:
        """Put an expert's weights, as they are now, into its matrices on the device."""
        with self.cache.state((layer, expert)) as record:
            state = self.record.of(record)
            if self._layers[layer].make_up(state, self._zeros_P):
                self.cache.changed((layer, expert))
            for name, matrix in matrices.items():
                matrix.copy_(self.shape.matrix(name, state.weights_P))

    def _read_ahead(self, layer: int, *, expected: bool) -> None:
        """States of a layer that will be needed next: in the forward pass those that the last step used."""
        if not self.settings.prefetch or not 0 <= layer < len(self._layers):
            return
        known = self._layers[layer]
        self.cache.forget_ahead()
        experts = known.expected if expected else sorted(known.used)
        self.cache.read_ahead([(layer, expert) for expert in experts])
