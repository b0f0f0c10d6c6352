"""A run whose workers come and go: what one of them does at every boundary of steps, and when something has changed.

The step loop stays what it is. Before each step this worker's states are copied and given to their holders; when an
exchange fails or the launcher says so, the worker comes out, takes the place that the next view gives it, fills what it
owns from the copies that survivors have, and the loop goes on (ElasWave, sections 6 to 9).
"""

from __future__ import annotations

import hashlib
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from resilin.checkpoint.background import BackgroundSaves
from resilin.checkpoint.folder import CheckpointFolder
from resilin.checkpoint.tree import put_together, take_apart
from resilin.cluster.addresses import joined, parse
from resilin.cluster.agent import Agent, HaltedError
from resilin.cluster.checksum import checksum
from resilin.cluster.links import Links
from resilin.cluster.parts import Parts
from resilin.cluster.peer import Address, Peer, PeerServer
from resilin.cluster.pool import Copy, Pool, copy_of
from resilin.cluster.protocol.messages import Adopt
from resilin.cluster.restore import Need, Piece, Restorer, Shared, pieces_held, pieces_owned
from resilin.cluster.snapshots import Snapshots
from resilin.cluster.store_connections import StoreConnections
from resilin.cluster.view import View
from resilin.cluster.view_blueprint import ViewBlueprint
from resilin.cluster.view_world import ViewWorld
from resilin.nouns import Optimizer
from resilin.parallel import activity
from resilin.parallel.assemble import Assembled
from resilin.parallel.reduction import Reduction
from resilin.parallel.state import StateLayout
from resilin.parallel.stretches import Kept
from resilin.run.elastic_ahead import WEIGHTS, ReadingAhead
from resilin.run.elastic_dealing import Dealing
from resilin.run.elastic_failure import is_own
from resilin.run.elastic_handing import hand_on
from resilin.run.elastic_placing import Placing
from resilin.run.run import Run
from resilin.transforms import OptimizerTransform

_REST = ("source", "objective", "run")
_MISSED = 0.05  # seconds that letting go may take before it is gone on beside it
_SETTLED = 2  # steps of a view after which it is thought of the next
_PAUSE = 1000  # more than anything else that workers agree on


class _Marking(OptimizerTransform):
    """Notes when the weights are between two versions."""

    def __init__(self, inner: Optimizer, weights: _Weights) -> None:
        super().__init__(inner)
        self._weights = weights

    def step(self, step: int) -> Mapping[str, float]:
        """The update of a step."""
        self._weights.version = None
        logs = self.inner.step(step)
        self._weights.version = step + 1
        return logs


@dataclass
class _Weights:
    """Which version the model's weights in this process are of (None: of none), and which of them are.

    With tensor parallelism they are of one part of every matrix.
    """

    version: int | None = None
    names: frozenset[str] = frozenset()
    part: int = 0


class Elastic:
    """What makes a run elastic, at one worker.

    Args:
        agent: speaks with the launcher.
    """

    def __init__(self, agent: Agent) -> None:
        self._agent, self.number = agent, agent.number
        self.pool = Pool(self.number)
        self._server = PeerServer(self.pool, agent.secret, agent.address)
        agent.store.set(f"peer/{self.number}", joined(agent.address, self._server.address.port))
        self.snapshots = Snapshots(self._connect, self._arrived)
        self._stores = StoreConnections(agent.store)
        self._weights = _Weights()
        self._made: Assembled | None = None
        self._links: Links | None = None
        self._staged: tuple[int, int] | None = None
        self._fresh = True
        self._kept: Kept | None = None
        self._handed = -1  # the step in which gradients of blocks were given to other stages
        self._ahead = ReadingAhead(
            self.pool, lambda view: self._blueprint(view), self._connect, lambda: self._agent.awaited
        )
        self.load: Callable[[Run], object] = lambda run: None
        """Fills a run that begins: from a checkpoint, where there is one."""
        agent.on_halt(self._sever)
        agent.on_probe(self._at)
        agent.on_prepare(self._ahead.beside)

    # -- the beginning ------------------------------------------------------------------------------------------

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The body, at one worker before all others: what it prepares, they find."""
        store, mine = self._agent.store, str(self.number)
        with activity.waiting((-1,), "waiting for what the first worker prepares"):
            # Once it is lost before it is done, whoever asks next is the first.
            while not (
                (first := store.compare_set("preparing", "", mine).decode() == mine) or store.check(["prepared"])
            ):
                self._agent.check()
                time.sleep(0.05)
        yield
        if first:
            store.set("prepared", mine)

    def first(self, placing: Placing, store: Callable[[ViewWorld], CheckpointFolder] | None = None) -> None:
        """Take this worker's first place, and build there.

        Args:
            placing: builds its part of any view.
            store: makes the folder of checkpoints of a view's workers.
        """
        self._placing, self._store = placing, store
        shapes = [placing.whole.specs[name].shape for name in placing.experts]
        change = self._agent.warm(placing.costs, max((shape[0] for shape in shapes), default=0), self._ahead.newcomer)
        while True:
            try:
                self._take_place(change)
            except (RuntimeError, OSError) as error:
                if is_own(error):
                    raise
                change = self._next(None, error)
            else:
                return

    def attach(self, run: Run) -> None:
        """Give a run that was just built this worker's states; returns once all workers have theirs."""
        self._go_on(run, self.change, placed=True)

    # -- at every boundary --------------------------------------------------------------------------------------

    def boundary(self, run: Run) -> None:
        """Before a step: keep a copy of this worker's states, and send it to its holders meanwhile."""
        epoch = self.change.view.epoch
        if self._staged != (epoch, run.step):
            activity.doing("copying its states")
            if run.step > self.change.version:  # an exchange under this view has been completed
                self.pool.forget(epoch)
            copy = self._copy(run, epoch)
            self.pool.put(copy)
            self.snapshots.give(copy)
            self._staged = epoch, run.step
            if run.step == self.change.version + _SETTLED:
                self._reserve(copy.bytes)
            self._agent.committed(run.step, self._pace.steps, self._pace.seconds)

    def _reserve(self, size: int) -> None:
        """Have memory for what this worker would own after the loss of one of those who own as it does."""
        table, left = self.change.view.stages[self.world.stage].owners, self.world.axis("dp") - 1
        if left and (mine := table.count(self.world.coordinate("dp"))):
            times = -(-len(table) // left) / mine + 1 / 64  # shards are not all of one size
            reductions = [one for one in self.made.reductions.values() if isinstance(one, Reduction)]
            links = self._links

            def reserve() -> None:
                self.pool.reserve(int(times * size))
                if links is not None:
                    links.touch()
                for reduction in reductions:
                    reduction.touch(times)

            threading.Thread(target=reserve, name="resilin-reserve", daemon=True).start()

    def asks(self, signal: int) -> int:
        """To come out, if a change was announced; else what the signal asks."""
        return _PAUSE if self._agent.pausing else signal

    def agreed(self, number: int) -> int:
        """The signal that all end for.

        Raises:
            HaltedError: everyone comes out here.
        """
        if number == _PAUSE:
            raise HaltedError("a change was announced")
        return number

    def ended(self, run: Run) -> None:
        """Wait until all others have ended too.

        Raises:
            HaltedError: something has changed before that.
        """
        trained = self.made.engine.trained
        firsts = {name for name in self.blueprint.firsts(self.world.stage) if trained[name].counted}
        shared = self.blueprint.shared(self.world.stage)
        digests = self._digest(run, firsts - shared), self._digest(run, firsts & shared)
        with activity.waiting((-1,), "waiting for the others to end"):
            self._agent.done(run.step, *digests)

    def leave(self) -> None:
        """End, once this worker's states are elsewhere."""
        self._agent.leaving()

    @property
    def made(self) -> Assembled:
        """Engine and optimizer of the view."""
        assert self._made is not None
        return self._made

    @property
    def lead(self) -> bool:
        """Whether this worker speaks for the run."""
        return self.world.rank == 0

    def _copy(self, run: Run, epoch: int) -> Copy:
        state = run.state_dict()
        apart = take_apart({key: state[key] for key in ("optimizer", *_REST)})
        tensors: list[tuple[str, str, Tensor]] = [
            (name, WEIGHTS, shard)
            for reduction in self.made.reductions.values()
            for name, shard in reduction.shards.items()
        ]
        for name, tensor in apart.tensors.items():
            assert isinstance(tensor, Tensor)
            tensors.append((*self._slot(name), tensor))
        tensors += [("", f"model/{name}", t) for name, t in state["model"].items() if name not in self._rows]
        assert isinstance(apart.json, dict)
        return copy_of(self.number, epoch, run.step, tensors, {key: apart.json[key] for key in _REST}, self.pool)

    @property
    def _rows(self) -> Mapping[str, int]:
        return self._placing.whole.rows

    def _slot(self, name: str) -> tuple[str, str]:
        """Parameter and path of a tensor of the state."""
        head, _, slot = name.rpartition("/")
        path, _, parameter = head.rpartition("/")
        owned = name.startswith("optimizer/") and parameter in self._rows
        return (parameter, f"{path}/{{}}/{slot}") if owned else ("", name)

    # -- changes ------------------------------------------------------------------------------------------------

    def _come_out(self) -> None:
        """Before gradients are exchanged: that is done in the next view, if there is to be one."""
        if self._agent.stopping:
            self._ahead.wait(self._agent.check)
        if (kept := self.made.engine.kept) is not None:
            with activity.waiting((-1,), "waiting until all have computed the step"):  # however long others take
                self._agent.computed(kept.step)

    def recover(self, run: Run, error: Exception) -> bool:
        """Go on after something failed since the view changed, or will; False: it is this worker's own failure."""
        if is_own(error):
            return False
        change = self._next(run, error)
        self._release(run, error)
        self._go_on(run, change)
        return True

    def _release(self, run: Run, error: Exception) -> None:
        """Let go of what this worker had in the last view: what comes now takes the same memory.

        All states are in copies, and micro-batches that are finished were kept. To write to pages for the first time
        would cost more than all that is computed here. Whoever drops a message that gloo has lost sight of waits until
        it has failed: that is done in a thread of its own, which is mostly over before it is missed.
        """
        if self._links is not None:
            self._links.give_up()  # there is a next view: everyone has come out
        for reduction in self._made.reductions.values() if self._made is not None else ():
            if isinstance(reduction, Reduction):
                reduction.give_up()
        held: list[object] = [self._made, run.workers, run.engine, run.optimizer, self.optimizer]
        self._made = None
        del run.workers, run.engine, run.optimizer, self.optimizer
        drops = threading.Thread(target=_drop, args=(held, error.__traceback__), name="resilin-release", daemon=True)
        drops.start()
        drops.join(_MISSED)

    def _go_on(self, run: Run, change: Adopt, placed: bool = False) -> None:
        while True:
            try:
                if not placed:
                    self._take_place(change)
                placed = False
                self._settle(run, change)
                return
            except (RuntimeError, OSError) as error:
                if is_own(error):
                    raise
                change = self._next(run, error)

    def _arrived(self, version: int) -> None:
        """Copies of a version are at their holders: the step before it is never redone."""
        made = self._made
        if made is not None and made.engine.kept is not None and made.engine.kept.step < version:
            made.engine.kept = None

    def _sever(self, why: str) -> None:
        self.snapshots.stop(why)
        if self._links is not None:
            self._links.cut()

    def _next(self, run: Run | None, error: BaseException) -> Adopt:
        """Say where this worker stands, and hear what becomes of it."""
        self._sever(str(error))
        if run is not None:
            run.saving.leave()  # others may want to save where this one does, and it may be given no place
        if self._made is not None:  # else it was let go of, but for what it had kept
            self._kept = self._made.engine.kept if run is not None else None
        kept = self._kept
        if kept is not None and kept.step == self._handed:
            kept = self._kept = None  # some of it is at other stages
        step = None if run is None else run.step if kept is None else kept.step
        version = None if self._fresh else -1 if self._weights.version is None else self._weights.version
        micros, cut = (kept.micros, (kept.of, kept.workers)) if kept is not None else ((), (0, 0))
        with activity.waiting((-1,), "waiting for its place in the next view"):
            return self._agent.halted(error, version, step, self.pool.versions(), micros, cut, self._ahead.newcomer)

    def _take_place(self, change: Adopt) -> None:
        """Groups, engine and optimizer of a view."""
        activity.doing("taking its place")
        self._parts = Parts()
        self._parts.begin("groups")
        view, kept = change.view, self._kept
        self._links = Links(
            self._stores, view.epoch, view.members.index(self.number), self._agent.timeout, self._agent.address
        )
        self._agent.check()  # it may have been called off before there was anything to cut
        self.world = ViewWorld(view, self.number, self._links)
        activity.now.place = self.world.where
        self._parts.begin("engine")
        dealing, stage = Dealing(change), self.world.stage
        if (part := self.world.coordinate("tp")) != self._weights.part:  # before anything fails that comes now
            self._weights.part, self._weights.names = part, frozenset()
        self.blueprint = self._blueprint(view)
        begins = change.before is None
        placed = self._placing.build(self.world, self.blueprint.stages[stage], dealing, begins=begins)
        names = frozenset(self.blueprint.names(stage))
        self._weights.names = names if begins else self._weights.names & names - placed.fresh
        self.model, made, self._pace = placed.model, placed.made, placed.pace
        engine = made.engine
        # Stages may have unlike numbers of members, and pass on the same micro-batches.
        engine.even = not engine.exact and len(view.stages) == 1
        mine = tuple(change.kept.get(self.number, ()))
        same = kept is not None and kept.step == change.version and set(mine) <= set(kept.micros)
        engine.kept = kept.only(mine) if same and kept is not None and mine else None
        if change.handed or (change.kept and self._placing.experts):
            assert change.before is not None
            self._handed = change.version
            hand_on(engine, change, self._blueprint(change.before), self.blueprint)
        if engine.kept is not None:
            engine.kept = engine.kept.for_names(engine.collected)
        engine.dealt = dealing.of_step
        engine.stage, engine.together = stage, len(view.stages) > 1 and bool(self._placing.experts)
        if engine.together:
            engine.dealt = dealing.together(stage)
        engine.keeps = True
        teams = [len(each.teams) for each in view.stages]  # nobody cuts anew what was computed
        engine.cut_for = lambda step: change.cut if change.cut and step == change.version else teams
        place = self.world.coordinate("dp")
        engine.evaluates = lambda batches: dealing.evaluated(batches)[stage][place]
        engine.computed = self._come_out
        engine.ready = lambda: self.snapshots.wait(self._staged[1] if self._staged is not None else 0)
        self._made, self.optimizer, self.change = made, _Marking(made.optimizer, self._weights), change
        self.layout = StateLayout(self.blueprint, self.world.everyone)

    def _blueprint(self, view: View) -> ViewBlueprint:
        return ViewBlueprint(self._placing.whole, view, self._placing.holders(view), self._placing.experts)

    def _settle(self, run: Run, change: Adopt) -> None:
        """Give the run its part in the view, and this worker's states; returns once all workers have theirs."""
        run.workers = run.engine = self.made.engine
        run.model, run.optimizer, run.layout = self.model, self.optimizer, self.layout
        self._new_store(run)
        with ExitStack() as stack:
            peers: dict[int, Peer] = {}

            def connect(member: int) -> Peer:
                if member not in peers:
                    peers[member] = self._connect(member)
                    stack.callback(peers[member].close)
                return peers[member]

            if (before := change.before) is None:
                self.load(run)
            else:
                ahead = self._ahead.take()
                restorer = Restorer(self.pool, before.epoch, change.version, change.where, connect, ahead)
                self._fill(run, change, restorer)
                if ahead is not None:
                    self._parts.bytes["ahead"] = ahead.bytes
        self._weights.version, self._weights.names = run.step, frozenset(self.blueprint.names(self.world.stage))
        self._fresh = False
        self.snapshots.begin(change.view.holders[self.number])
        self._parts.begin("verify")
        shared = self.blueprint.shared(self.world.stage)
        # All members of a stage have the first alike.
        digests = self._digest(run, self._rows.keys() - shared), self._digest(run, shared)
        self._parts.begin("")
        with activity.waiting((-1,), "waiting for the others to be ready"):
            self._agent.adopted(change, digests, self._parts)

    def _new_store(self, run: Run) -> None:
        if self._store is None:
            return
        run.saving.leave()
        run.checkpoints = self._store(self.world)
        if run.pace.asynchronous:
            run.saves = BackgroundSaves(run.checkpoints)

    @torch.no_grad()
    def _fill(self, run: Run, change: Adopt, restorer: Restorer) -> None:
        assert change.before is not None
        activity.doing("reading its states from copies")
        self._parts.begin("plan")
        before = self._blueprint(change.before).all_owners(self.world.coordinate("tp"))
        after = self.blueprint.owners_with(self.number)
        if self._weights.version != change.version:
            self._weights.version, self._weights.names = None, frozenset()
        lacking = [name for each in after for name in each.names if name not in self._weights.names]
        parameters, held = dict(run.model.named_parameters()), pieces_held(before, after, lacking, self.number)
        needs = [Need(name, WEIGHTS, parameters[name].data, held[name]) for name in lacking]
        state = self.optimizer.state_dict()
        apart = take_apart({"optimizer": state})
        mine = pieces_owned(before, after, self.number)
        for name, tensor in apart.tensors.items():
            assert isinstance(tensor, Tensor)
            parameter, path = self._slot(name)
            if parameter in mine:  # else it has no expert, and the states of none
                needs.append(Need(parameter, path, tensor, mine[parameter]))
        anyone = next(iter(change.where))
        shared = restorer.rest(self.number if self.number in change.where else anyone)
        needs += [Need("", name, t, [Piece(shared.owner, 0, 0, t.numel())]) for name, t in shared.tensors.items()]
        self._parts.begin("")
        restorer.fill(needs)
        self._parts.read(restorer.reads, change.view.members, self.number)
        self._parts.begin("load")
        self.optimizer.load_state_dict(state)
        run.engine.loaded()
        if run.step != change.version or self._fresh:
            self._take_rest(run, shared)

    def _take_rest(self, run: Run, shared: Shared) -> None:
        """What is no owner's alone: progress, the states of source and objective, what of the model is not trained."""
        tree = put_together(shared.rest, shared.tensors.__getitem__)
        run.source.load_state_dict(tree["source"])
        run.objective.load_state_dict(tree["objective"])
        progress = tree["run"]
        run.step, run.skipped, run.samples = progress["step"], progress["skipped"], progress["samples"]
        own = run.model.state_dict()
        for name, tensor in shared.tensors.items():
            if name.startswith("model/"):
                own[name.removeprefix("model/")].copy_(tensor)

    def _digest(self, run: Run, names: Collection[str]) -> str:
        """Of some of this worker's weights: the sum modulo 2**64 of each one's, whatever their order.

        Each expert counts by itself, wherever it is.
        """
        total, stage = 0, self.change.view.stages[self.world.stage]
        here = stage.experts_of(self.world.coordinate("ep"))
        part = f"#{self.world.coordinate('tp')}" if self.world.axis("tp") > 1 else ""
        for name, parameter in run.model.named_parameters():
            if name not in names:
                continue
            weights = parameter.detach().cpu()
            stacked = name in self._placing.experts
            each = {f"{name}/{n}": w for n, w in zip(here, weights, strict=True)} if stacked else {name: weights}
            for which, weight in each.items():
                mark = int.from_bytes(hashlib.blake2b(f"{which}{part}".encode(), digest_size=8).digest(), "little") | 1
                total += mark * checksum(weight)
        return f"{total % 2**64:016x}"

    def _at(self, member: int) -> tuple[str, int]:
        return parse(self._agent.store.get(f"peer/{member}").decode())

    def _connect(self, member: int) -> Peer:
        return Peer(Address(*self._at(member)), self._agent.secret, self._agent.timeout)

    def close(self) -> None:
        """End the threads and connections of this worker."""
        self._sever("this member ends")
        self.snapshots.close()
        self._server.close()
        self._stores.close()


def _drop(held: list[object], trace: TracebackType | None) -> None:
    held.clear()
    traceback.clear_frames(trace)  # gradients under way
