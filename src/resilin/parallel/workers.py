"""Steps computed by many workers together: each its micro-batches, sums at the owners, one update everywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn

from resilin.keys import Keys
from resilin.layout.dealing import VIRTUAL_SHARDS
from resilin.nouns import Batch, Loss, Objective, Source
from resilin.optim.clip import clip_factor, global_norm, total_norm
from resilin.optim.rows import gradient_holders, gradients_of
from resilin.parallel.activity import doing, waiting
from resilin.parallel.canonical import GradientSum, Node
from resilin.parallel.errors import ParallelError
from resilin.parallel.exchange import add_up_all, largest, share
from resilin.parallel.group import Group
from resilin.parallel.handing import Handing
from resilin.parallel.messages import tell_all
from resilin.parallel.micro_batches import Dealt, along_data, even_batches, micro_batches, shared_batches
from resilin.parallel.reduction import Reduced
from resilin.parallel.report import Report, Summed
from resilin.parallel.step import Autocast, StepGradient, check_units, non_finite_slots
from resilin.parallel.stretches import Kept, LeafSums, StretchSums, blocks_in, in_all, in_one
from resilin.parallel.whole_model import Passes
from resilin.parallel.world import World


class Tracer(Protocol):
    """Looks at the passes of chosen steps."""

    def step(self, step: int) -> AbstractContextManager[object]:
        """Entered by all workers while the passes of a step run."""


class Agreement(Protocol):
    """How ranks of several reductions that have one parameter come to one sum of its gradient.

    Attributes:
        given: whether this rank has nothing of the sum by itself.
    """

    @property
    def given(self) -> bool:
        """See above."""

    def agree(self, mine: Sequence[Tensor]) -> None:
        """Make what this rank owns of the sum, as `Reduced.sums_of` gives it, that of all. All call together."""


@dataclass(frozen=True, slots=True)
class Giver:
    """A rank that has the whole sum, and gives all of a group, who own the same elements, what they own of it.

    Attributes:
        group: in which it is.
        index: its place there.
    """

    group: Group
    index: int

    @property
    def is_here(self) -> bool:
        """Whether it is this rank."""
        return self.group.index == self.index

    @property
    def given(self) -> bool:
        """Whether it is another."""
        return not self.is_here

    def agree(self, mine: Sequence[Tensor]) -> None:
        """Give, or be given."""
        for part in mine:
            nothing = part.new_empty(0)
            share([part if index == self.index else nothing for index in range(self.group.size)], self.group)()


@dataclass(frozen=True, slots=True)
class Trained:
    """A trained parameter of this worker, as the engine has to know it.

    Attributes:
        parameter: this worker's part.
        reduction: the name of the group that its gradient is summed over, and its optimizer's states divided over.
        sum_over: further groups in which each rank has only a part of the gradient's sum.
        agreement: with ranks of other reductions that have the same parameter.
        counted: whether this worker's part counts in the gradient's norm: of copies one does.
        row: its number among all parameters of the whole model.
    """

    parameter: nn.Parameter
    reduction: str
    sum_over: tuple[Group, ...] = ()
    agreement: Agreement | None = None
    counted: bool = True
    row: int = 0


class Workers:
    """The `Engine` of many workers.

    Micro-batches are dealt to the data axis in runs. A rank of the context axis has a part of every sequence of its
    micro-batches, and is one more worker to the sums.

    Args:
        world: all workers.
        passes: of this one.
        trained: this worker's trained parameters, by name, in the model's order.
        reductions: by the names that `trained` uses.
        rows: trained parameters of the whole model.
        objective: of the run, for finding slots that are not finite.
        micro_batch_size: slots computed at once; 0: a worker's share of the step.
        clip_norm: see `train.clip_norm`.
        exact: whether sums have the order of one process: then the norm has too.
        device, autocast: as for `OneProcess`.
        model: what the objective calls when it looks for bad slots; None: they are not looked for.
        lockstep: whether workers of the data axis exchange something during a pass.
        lent: trained parameters whose memory is elsewhere (`resilin.optim.rows`); no other worker has them.

    Attributes:
        trace: looks at the passes of some steps.
        dealt: who computes which micro-batches: along the data axis, runs of neighbours.
        evaluates: which of so many held-out batches this worker takes.
        even: whether micro-batches are cut so that all workers have equally many slots, however many there are: sums
            of other micro-batches are equal to rounding.
        cut_for: by stage, for how many workers of the data axis micro-batches of a step are cut.
        stage: this worker's.
        together: whether all workers of a stage compute at the same time, and stages keep in step (`shared_batches`).
        keeps: whether what a step has finished is kept, for ending it with other workers: until the next one begins,
            or, where sums are not exact, until it is over, and only once all of this worker's is there, as one sum.
        kept: that; a step of the same number goes on from there.
        handing: gradients of a step that is redone, which were computed where the parameters were before.
        computed: called once this worker's micro-batches are done, before gradients are exchanged.
        ready: called before the last exchange of a step's gradient: once it returns at all workers, the step may be
            taken.
    """

    def __init__(
        self,
        world: World,
        passes: Passes,
        trained: Mapping[str, Trained],
        reductions: Mapping[str, Reduced],
        *,
        rows: int,
        objective: Objective,
        micro_batch_size: int,
        clip_norm: float,
        exact: bool,
        device: torch.device,
        autocast: Autocast,
        model: nn.Module | None = None,
        lockstep: bool = False,
        lent: Sequence[nn.Parameter] = (),
    ) -> None:
        self._lockstep, self._lent = lockstep, tuple(lent)
        self.trace: Tracer | None = None
        self.kept: Kept | None = None
        self.handing: Handing | None = None
        self.keeps = self.even = False
        self.dealt: Dealt = along_data(world)
        self.stage, self.together = 0, False
        self.cut_for: Callable[[int], Sequence[int]] = lambda step: (world.axis("dp"),)
        self.evaluates: Callable[[int], Sequence[int]] = self._share
        self.computed: Callable[[], None] = lambda: None
        self.ready: Callable[[], None] = lambda: None
        self.world, self.passes, self.trained, self.reductions = world, passes, dict(trained), dict(reductions)
        self._rows, self._objective, self._model = rows, objective, model
        self._micro, self._clip, self._exact = micro_batch_size, clip_norm, exact
        self._device, self._autocast = device, autocast
        self._report = Report(world.everyone, device)
        collected = {name for name, entry in self.trained.items() if self.reductions[entry.reduction].collects}
        by_parameter = {id(entry.parameter): name for name, entry in self.trained.items() if name in collected}
        self.collected = [
            [by_parameter[id(p)] for p in parameters if id(p) in by_parameter] for parameters in passes.collected
        ]
        given = {name for name, entry in self.trained.items() if entry.agreement and entry.agreement.given}
        missing = collected - given - {name for names in self.collected for name in names}
        if missing:
            raise ParallelError(f"parameter {min(missing)!r} is in no part of the model that this worker has")
        self._shared = self._sums_over()

    @property
    def exact(self) -> bool:
        """Whether sums have the order of one process."""
        return self._exact

    @property
    def lead(self) -> bool:
        """Whether this is the first worker."""
        return self.world.rank == 0

    # -- slots --------------------------------------------------------------------------------------------------

    def micro_batches(self, count: int, step: int) -> list[range]:
        """The slots of every micro-batch of a step of `count` slots."""
        if self.together:
            return shared_batches(count, self._micro, self.cut_for(step))[self.stage]
        if self.even:
            return even_batches(count, self._micro, self.cut_for(step)[self.stage], alike=self._lockstep)
        return micro_batches(count, self._micro, self.world.axis("dp"))

    def _rows_of(self, count: int, step: int) -> int:
        """How many micro-batches of a step have losses: those of the last stage, where each has its own."""
        if not self.together:
            return len(self.micro_batches(count, step))
        return len(shared_batches(count, self._micro, self.cut_for(step))[-1])

    def _micros_of(self, step: int, count: int) -> list[tuple[int, ...]]:
        """Which micro-batches each worker computes."""
        return [tuple(each) for each in self.dealt(step, len(self.micro_batches(count, step)))]

    def _missing(self, step: int, count: int) -> tuple[int, ...]:
        """This worker's micro-batches of a step that are not finished yet."""
        mine, kept = self._micros_of(step, count)[self.world.rank], self._kept_of(step)
        return tuple(number for number in mine if kept is None or number not in kept.micros)

    def _kept_of(self, step: int) -> Kept | None:
        kept = self.kept  # another thread may drop it, though not that of a step that can still be redone
        return kept if kept is not None and kept.step == step else None

    def slots(self, count: int, step: int) -> Sequence[int]:
        """Those of this worker's micro-batches that are still to be computed."""
        micros = self.micro_batches(count, step)
        todo = self._missing(step, count)
        if todo and all(micros[one].stop == micros[other].start for one, other in pairwise(todo)):
            mine: Sequence[int] = range(micros[todo[0]].start, micros[todo[-1]].stop)
        else:
            mine = [slot for number in todo for slot in micros[number]]
        # Where others exchange something with this worker, and it has no slot, one stands in.
        return mine or range(1 if todo else 0)

    # -- the step -----------------------------------------------------------------------------------------------

    def gradient(self, batch: Batch, keys: Keys, count: int) -> StepGradient:
        """Forward and backward over this worker's micro-batches; sums, norm and clipping with all others."""
        cut, todo = self.micro_batches(count, keys.step), self._missing(keys.step, count)
        parts, row = [], 0
        for number in todo:
            rows = (row, row + len(cut[number])) if cut[number] else (0, 1)
            parts.append((batch.rows(*rows), keys.rows(*rows)))
            row += len(cut[number])
        idle = [place for place, number in enumerate(todo) if not cut[number]]
        if self.handing is not None and self.handing.step != keys.step:
            self.handing = None
        sums = [self._summing(names, todo) for names in self.collected]
        finished: list[list[int]] = [[] for _ in sums]
        losses: dict[int, Loss] = {}

        def collect(part: int, place: int) -> None:
            sums[part].collect(todo[place])
            finished[part].append(todo[place])

        def kept(micros: Sequence[int]) -> Kept:
            told = {todo[place]: loss for place, loss in losses.items() if self.passes.speaks}
            blocks = [one.blocks() if self._exact else in_one(one.blocks()) for one in sums]
            about = len(cut), self.cut_for(keys.step)[self.stage], not self._exact
            made = Kept(keys.step, tuple(todo), told, blocks, self.collected, *about).only(micros)
            before = self._kept_of(keys.step)
            return made if before is None else made.after(before)

        try:
            with self.trace.step(keys.step) if self.trace is not None else nullcontext():
                self.passes.train(parts, collect, losses, idle)
        except (RuntimeError, OSError):
            if self.keeps and self._exact and not self.passes.in_order:
                whole = in_all([[part] for part in finished])  # a tied weight may be behind the rest of its stage
                self.kept = kept(whole[0][0])
            raise
        made = kept(todo)
        self.kept = made if self.keeps else None
        self.computed()
        doing("adding gradients up")
        self._reduce(made.chunks, keys.step, count)
        self.ready()
        told = self._tell(made.losses, self._rows_of(count, keys.step))
        if not self._exact:
            self.kept = None
        return told

    def _summing(self, names: Sequence[str], todo: Sequence[int]) -> StretchSums | LeafSums:
        parameters = [self.trained[name].parameter for name in names]
        if self.passes.in_order:
            return StretchSums(partial(GradientSum, parameters), todo)
        return LeafSums(parameters)

    def _reduce(self, nodes: Sequence[Sequence[Node]], step: int, count: int) -> None:
        blocks = [node[:2] for node in nodes[0]]
        leaves: list[dict[str, Tensor | None]] = [{} for _ in blocks]
        for number, leaf in enumerate(leaves):
            for names, part in zip(self.collected, nodes, strict=True):
                for name, grad in zip(names, part[number].sum, strict=True):
                    before = leaf.get(name)  # a tied weight of two stages of this worker
                    leaf[name] = grad if before is None else before if grad is None else before + grad
        for reduction in self.reductions.values():
            names = reduction.names if reduction.collects else []
            mine = [
                Node(start, height, [leaf.get(name) for name in names])
                for (start, height), leaf in zip(blocks, leaves, strict=True)
            ]
            if self.kept is not None and reduction.group.size == 1:  # what is kept is added up, and scaled, in place
                mine = [node._replace(sum=[None if g is None else g.clone() for g in node.sum]) for node in mine]
            reduction.reduce(mine, self._blocks_in(reduction.group, step, count))
        if self.handing is not None:
            self.handing.go(lambda name: self.reductions[self.trained[name].reduction].sums_of(name))
        for group, names in self._shared:  # who has a part of the sums owns the same elements of it
            reductions = [self.reductions[self.trained[name].reduction] for name in names]
            sums = [part for r, name in zip(reductions, names, strict=True) for part in r.sums_of(name)]
            add_up_all(sums, group, in_order=self._exact)
        for name, entry in self.trained.items():
            if entry.agreement is not None:
                entry.agreement.agree(self.reductions[entry.reduction].sums_of(name))

    def _blocks_in(self, group: Group, step: int, count: int) -> list[list[tuple[int, int]]]:
        """The blocks of every rank of a group."""
        dealt = self._micros_of(step, count)
        return [blocks_in(dealt[rank]) for rank in group.ranks]

    def _sums_over(self) -> list[tuple[Group, list[str]]]:
        found: dict[tuple[int, ...], tuple[Group, list[str]]] = {}
        for name, entry in self.trained.items():
            for group in entry.sum_over:
                if group.size > 1 and self.reductions[entry.reduction].collects:
                    found.setdefault(group.ranks, (group, []))[1].append(name)
        return list(found.values())

    def _tell(self, losses: Mapping[int, Loss], micros: int) -> StepGradient:
        context, part = self.world.axis("cp"), self.world.coordinate("cp")
        rows = {number * context + part: loss for number, loss in losses.items()}
        used, squares = self._facts()
        summed, more = self._report.exchange(rows, micros * context, torch.cat([used, squares.reshape(-1)]))
        check_units(summed.units)
        flags, squares = more[: self._rows] > 0, more[self._rows :]
        if self._exact:
            squares = squares.view(self._rows, VIRTUAL_SHARDS)[flags]
        norm = float(total_norm(squares.reshape(-1))) / summed.units
        factor = clip_factor(norm, self._clip) / summed.units
        for reduction in self.reductions.values():
            reduction.set_gradients([bool(flags[self.trained[name].row]) for name in reduction.names])
            if grads := reduction.gradients():  # of small parameters one worker may own all
                torch._foreach_mul_(grads, factor)
        if grads := [h.grad for h in gradient_holders(self._lent) if h.grad is not None]:
            torch._foreach_mul_(grads, factor)
        return StepGradient(summed.loss / summed.units, summed.units, norm, summed.logs)

    def _facts(self) -> tuple[Tensor, Tensor]:
        """(rows,) which parameters have a gradient here; (rows, V) or (1,) the squared norms of what is owned here."""
        used = torch.zeros(self._rows, dtype=torch.float64)
        squares = torch.zeros(self._rows, VIRTUAL_SHARDS if self._exact else 1, dtype=torch.float64)
        for reduction in self.reductions.values():
            entries = [self.trained[name] for name in reduction.names]
            at = torch.tensor([entry.row for entry in entries], dtype=torch.int64)
            counted = torch.tensor([entry.counted for entry in entries], dtype=torch.bool)
            used[at] += reduction.used()
            found = reduction.squares().where(counted[:, None], 0.0)
            squares[at] += found if self._exact else found.sum(1, keepdim=True)
        for name in self.handing.used if self.handing is not None else ():
            used[self.trained[name].row] += 1
        if self._lent:
            return used, squares.sum()[None] + global_norm(gradients_of(self._lent)).square().cpu()
        return used, squares if self._exact else squares.sum()[None]

    def non_finite(self, batch: Batch, keys: Keys) -> list[int] | None:
        """Looked for by each worker among its own slots, where it can compute a slot by itself."""
        for reduction in self.reductions.values():
            for shard in reduction.shards.values():
                shard.grad = None
        if self._model is None:
            return None
        found: list[int] = []
        if len(batch):
            found = non_finite_slots(
                self._model, self._objective, batch, keys, device=self._device, autocast=self._autocast
            )
        return sorted({slot for each in tell_all(found, self.world.everyone) for slot in each})

    # -- everything else ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, source: Source, indices: Iterable[int]) -> Summed:
        """Batches are dealt to the data axis, as many to each as can be."""
        everything = list(indices)
        context, part = self.world.axis("cp"), self.world.coordinate("cp")
        mine = self.evaluates(len(everything))
        # Where workers exchange weights or tokens on the way, each computes as often as all others.
        rounds = -(-len(everything) // self.world.axis("dp"))
        more = [0] * (rounds - len(mine)) if self._lockstep else []
        taken = [everything[number] for number in [*mine, *more]]
        batches = [source.fetch(index, range(source.slots(index))) for index in taken]
        losses = self.passes.evaluate(batches, len(everything))[: len(mine)]
        rows = {n * context + part: loss for n, loss in zip(mine, losses, strict=False)} if self.passes.speaks else {}
        summed, _ = self._report.exchange(rows, len(everything) * context)
        return summed

    def _share(self, batches: int) -> range:
        rounds, dp = -(-batches // self.world.axis("dp")), self.world.coordinate("dp")
        return range(min(dp * rounds, batches), min((dp + 1) * rounds, batches))

    def loaded(self) -> None:
        """Shards take their weights from the parameters."""
        for reduction in self.reductions.values():
            reduction.read()

    def agreed(self, value: int) -> int:
        """The largest of all."""
        if self.world.size == 1:
            return value
        told = torch.tensor([value], dtype=torch.int64, device=self._device)
        everyone = self.world.everyone
        with waiting(everyone.ranks, "hearing whether all go on"):
            return int(largest(told, everyone))
