"""Taking a step's micro-batches through the stages of a pipeline, in the order of any valid schedule.

A rank does its list of actions in turn. What it needs from another rank was asked for some actions before, and what it
gives is sent without waiting, so that messages travel while it computes. The gradient of a stage's input goes back the
way the input came. Only the order of actions on a rank is the schedule's: the sums of gradients are those of one
process that takes the same micro-batches one after the other, to the bit.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from resilin.keys import Keys
from resilin.models.linear import WeightGradients, weight_gradients_later
from resilin.models.stage_span import Hidden, StageShape
from resilin.nouns import Batch, Loss, Objective
from resilin.parallel.activity import doing, waiting
from resilin.parallel.exchange import Wait, ask, post
from resilin.parallel.group import Group
from resilin.parallel.pipeline.messages import Carried, Message, Op, Part, Receive, Send
from resilin.parallel.pipeline.pace import Pace
from resilin.parallel.pipeline.schedule import Action, B, F, I, W
from resilin.parallel.pipeline.stage import Stage
from resilin.parallel.pipeline.tied import TiedSum
from resilin.parallel.pipeline.timeline import Record
from resilin.parallel.step import Autocast
from resilin.parallel.whole_model import Collect

if TYPE_CHECKING:
    from resilin.parallel.gathered import Gathered

_AHEAD = 4  # operations, beyond the next one, whose messages are asked for
_SAID = {F: "forward", B: "backward", I: "backward to the input", W: "backward to the weights"}
_STAGES = 4096  # more than any pipeline has: tags are numbers

Micro = tuple[Batch, Keys | None]


Way = tuple[int, int, Carried]
"""Where a payload goes: the stage, its micro-batch there, and what it is."""


@dataclass
class _Flight:
    """What is kept of a micro-batch at one stage between its passes."""

    later: WeightGradients = field(default_factory=WeightGradients)
    early: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)  # gradients made by the input's half
    incoming: Tensor | None = None
    embedded: Tensor | None = None  # the embedding's output, where its gradient goes to the last stage
    tokens: Tensor | None = None  # ids that it was given
    edge: GradientEdge | None = None
    loss: Loss | None = None


@dataclass
class _Post:
    """A payload that was asked for: its rows come in one message or in several."""

    buffer: Tensor
    coming: list[tuple[Wait, int]] = field(default_factory=list)  # and from whom


@dataclass
class _Walk:
    """One pass over a list of operations."""

    micros: Sequence[Micro]
    shapes: Sequence[StageShape]
    training: bool
    splits: bool
    collect: Collect
    losses: dict[int, Loss]
    left: dict[int, int]  # micro-batches that each stage has to take backward yet
    unsent: dict[Way, int]
    unasked: dict[Way, int]  # of what is for the sum of a tied weight
    idle: Collection[int] = ()  # micro-batches that stand in for none: nothing comes for them, and nothing goes
    tied: TiedSum | None = None
    due: set[int] = field(default_factory=set)  # micro-batches whose part of that sum has been sent here
    flights: dict[tuple[int, int], _Flight] = field(default_factory=dict)
    made: dict[Way, Tensor] = field(default_factory=dict)
    posts: dict[Way, _Post] = field(default_factory=dict)
    sends: list[tuple[Any, Tensor, int]] = field(default_factory=list)  # under way, what is sent, and to whom


def _nothing(chunk: int, micro: int) -> None:
    """No gradients are collected."""


def _from(message: Message | Part) -> Way:
    """Which payload of the sender's a message is of."""
    micro = message.micro if isinstance(message, Message) else message.rows.sender_micro
    return message.source, micro, message.carries


def _to(message: Message | Part) -> Way:
    """Which payload of the receiver's a message is of."""
    micro = message.arrives_as if isinstance(message, Message) else message.rows.receiver_micro
    return message.target, micro, message.carries


class Orders(Protocol):
    """What a rank of a pipeline does, operation by operation.

    Attributes:
        in_order: whether a stage's backward passes end in the order of micro-batches.
        stages: of the whole model.
    """

    in_order: bool
    stages: int

    def training(self, step: int, micros: int) -> Sequence[Op]:
        """In a step in which this rank has so many micro-batches."""

    def evaluating(self, batches: int, total: int) -> Sequence[Op]:
        """Forward over so many batches of this rank, of those that all evaluate together."""


class PipelinePasses:
    """The `Passes` of a rank of a pipeline.

    Args:
        stages: of this rank.
        orders: this rank's operations.
        objective: of the run.
        peers: the number in the whole job of every rank that operations name.
        number: which of them this is.
        group: that all of them are in.
        device: where batches go.
        autocast: the format of the step.
        speaks: whether the losses that this rank computes are counted.
        prepare: takes this rank's part of a batch, where rows are divided.
        tied: the weight that is both embedding and head, at a rank with either, if its gradients are summed at the last
            stage: then `orders` send there what that needs.
        gathered: of weights that are gathered once a step; None: each rank has them, or they come and go.
        between: parameters whose gradients are also of tokens that other ranks of the stage send: experts.

    Attributes:
        collected: for each number that `train` gives `collect`, the parameters whose gradients are complete: a stage's,
            but for the tied weight, which comes last, at the last stage.
        pace: how long this rank takes for a micro-batch; on CPUs, as GPUs compute later than they are told.
        measure: whether to keep when each action runs.
        records: of the last step; seconds since the epoch.
        core_seconds: for how long this process's thread had a core while the actions of `records` ran. With one thread
            to a process, what they took longer is time that other programs took.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        orders: Orders,
        objective: Objective,
        *,
        peers: Sequence[int],
        number: int,
        group: Group,
        device: torch.device,
        autocast: Autocast,
        speaks: bool = True,
        prepare: Callable[[Batch], Batch] = lambda batch: batch,
        tied: nn.Parameter | None = None,
        gathered: Gathered | None = None,
        between: Collection[nn.Parameter] = (),
    ) -> None:
        self._gathered, self._between = gathered, {id(parameter) for parameter in between}
        self._stages = {stage.number: stage for stage in stages}
        self._chunk = {stage.number: place for place, stage in enumerate(stages)}
        self.chunks: Sequence[nn.Module] = [stage.module for stage in stages]
        self._orders, self._objective = orders, objective
        self.in_order = orders.in_order
        self._peers, self._number, self._group = peers, number, group
        self._device, self._autocast, self._prepare = device, autocast, prepare
        self._last = any(stage.span.last for stage in stages)
        self._tied = tied
        self.collected: Sequence[Sequence[nn.Parameter]] = [
            [p for p in module.parameters() if p is not tied] for module in self.chunks
        ]
        if tied is not None:
            for stage in stages:
                stage.span.apart = stage.span.first
            if self._last:
                self.collected = [*self.collected, [tied]]
        self.speaks = speaks and self._last
        self._tagged = group.backend == "gloo"
        self.measure = False
        self._began = 0.0
        self.records: list[Record] = []
        self.core_seconds = 0.0
        self._took: dict[int, float] = {}  # by micro-batch of the step under way
        self.pace = Pace()

    # -- whole passes -------------------------------------------------------------------------------------------

    def train(
        self,
        micros: Sequence[tuple[Batch, Keys]],
        collect: Collect,
        losses: dict[int, Loss],
        idle: Collection[int] = (),
    ) -> None:
        """Forward and backward over micro-batches, as the list of operations says."""
        if micros:
            ops = self._orders.training(micros[0][1].step, len(micros))
            self.records, self.core_seconds = [], 0.0
            self._took.clear()
            self._go(ops, micros, collect, losses, idle, training=True)
            self.pace.step(self._took.values())

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], total: int) -> list[Loss]:
        """Forward only, one batch after another."""
        losses: dict[int, Loss] = {}
        ops = self._orders.evaluating(len(batches), total)
        known = {_to(op.message)[1] for op in ops if isinstance(op, Receive)}
        known |= {_from(op.message)[1] for op in ops if isinstance(op, Send)}
        alone = len(self._stages) == self._orders.stages
        idle = [micro for micro in range(len(batches)) if micro not in known and not alone]
        self._go(ops, [(batch, None) for batch in batches], _nothing, losses, idle, training=False)
        if self._gathered is not None:
            self._gathered.give_up()
        return [losses[micro] for micro in range(len(batches)) if micro not in idle] if self._last else []

    def _go(
        self,
        ops: Sequence[Op],
        micros: Sequence[Micro],
        collect: Collect,
        losses: dict[int, Loss],
        idle: Collection[int],
        *,
        training: bool,
    ) -> None:
        on_device = [(self._prepare(batch.to(self._device)), keys) for batch, keys in micros]
        stage = next(iter(self._stages.values()))
        with self._autocast():
            shapes = [stage.shape(partial(self._call, stage, micro)) for micro in on_device]
        splits = any(isinstance(op, Action) and op.kind is I for op in ops)
        unsent = Counter(_from(op.message) for op in ops if isinstance(op, Send))
        unasked = Counter(_to(op.message) for op in ops if isinstance(op, Receive) and op.message.embedded)
        left = Counter(op.stage for op in ops if isinstance(op, Action) and op.kind in (B, W))
        walk = _Walk(on_device, shapes, training, splits, collect, losses, left, unsent, unasked, idle)
        if self._tied is not None and self._last and training:
            walk.tied = TiedSum(self._tied, partial(collect, len(self.chunks)))
        asked = 0
        for place, op in enumerate(ops):
            # Messages without tags come in the order in which they are asked for: then nothing is asked for early.
            end = min(place + 1 + (_AHEAD if self._tagged else 0), len(ops))
            for coming in ops[asked:end]:
                if isinstance(coming, Receive):
                    self._ask(walk, coming)
            asked = max(asked, end)
            if isinstance(op, Action):
                due = tuple(walk.due)  # what comes now travels while this rank computes
                self._act(walk, op)
                self._add_tied(walk, due)
            elif isinstance(op, Send):
                self._send(walk, op)
            elif op.message.embedded:
                self._expect_tied(walk, _to(op.message))
        self._add_tied(walk, walk.due)
        doing("sending to other stages")
        for work, _, rank in walk.sends:
            with waiting((rank,)):
                self._group.wait_message(work)

    def _call(self, stage: Stage, micro: Micro) -> Any:
        batch, keys = micro
        return self._objective(stage.module, batch, keys)

    # -- actions ------------------------------------------------------------------------------------------------

    def _act(self, walk: _Walk, action: Action) -> None:
        self._began, core_began = time.time(), time.thread_time()
        doing(_SAID[action.kind], "of stage", action.stage, "micro-batch", action.micro)
        if action.kind is F:
            self._forward(walk, action.stage, action.micro)
        else:
            self._backward(walk, action)
        if not walk.training:
            return
        if self.measure and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        ended = time.time()
        self._took[action.micro] = self._took.get(action.micro, 0.0) + ended - self._began
        if self.measure:
            self.records.append(Record(action, self._number, self._began, ended))
            self.core_seconds += time.thread_time() - core_began  # none while it waits for a message

    def _forward(self, walk: _Walk, number: int, micro: int) -> None:
        stage = self._stages[number]
        flight = walk.flights[number, micro] = _Flight()
        shape = walk.shapes[micro]
        incoming: Hidden | None = None
        if not stage.span.first:
            width = stage.width(shape, before=True)
            if micro in walk.idle:
                flight.incoming = torch.zeros(shape.rows, width.values, dtype=width.dtype, device=self._device)
            else:
                flight.incoming = self._arrived(walk, (number, micro, Carried.FORWARD))
            incoming = width.unpack(flight.incoming.requires_grad_(walk.training))
        with self._autocast(), weight_gradients_later(flight.later, walk.splits):
            result = stage.forward(incoming, partial(self._call, stage, walk.micros[micro]))
        flight.embedded, flight.tokens = stage.span.embedded, stage.span.tokens
        stage.span.embedded = stage.span.tokens = None
        if isinstance(result, Loss):
            if micro not in walk.idle:
                walk.losses[micro] = Loss(result.sum.detach(), result.units.detach(), result.logs)
            flight.loss = result if walk.training else None
            return
        payload = stage.width(shape, before=False).pack(result)
        # Of what goes out only its place in the graph is needed once it was sent.
        flight.edge = get_gradient_edge(payload) if payload.requires_grad else None
        if micro not in walk.idle:
            self._hand_on(walk, (number, micro, Carried.FORWARD), number + 1, payload.detach())

    def _backward(self, walk: _Walk, action: Action) -> None:
        number, micro = action.stage, action.micro
        flight = walk.flights[number, micro]
        if action.kind is I:
            if self._gathered is not None:
                self._gathered.before_backward(self._chunk[number], last=False)
            self._set_aside(number, flight, lambda: self._to_the_input(walk, number, micro))
            return
        walk.left[number] -= 1
        ends = self._gathered is not None and not walk.left[number]
        if self._gathered is not None and action.kind is B:
            self._gathered.before_backward(self._chunk[number], last=ends)
        apart: AbstractContextManager[None] = nullcontext()
        if walk.tied is not None and self._stages[number].span.last:
            assert flight.tokens is not None
            apart = walk.tied.head(micro, flight.tokens)
        with apart:
            if micro in walk.idle:
                self._take_others(walk, number, micro)
            elif action.kind is B:
                self._to_the_input(walk, number, micro)
            for parameter, grad in flight.early:
                parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
            flight.later.compute()
        if self._gathered is not None and ends and action.kind is W:
            self._gathered.sum_up(self._chunk[number])
        walk.collect(self._chunk[number], micro)
        del walk.flights[number, micro]

    def _to_the_input(self, walk: _Walk, number: int, micro: int) -> None:
        flight = walk.flights[number, micro]
        if flight.loss is not None:
            flight.loss.sum.backward()
        else:
            gradient = self._arrived(walk, (number, micro, Carried.BACK))
            if flight.edge is not None:
                torch.autograd.backward([flight.edge], [gradient])
        if flight.incoming is not None:
            back = flight.incoming.grad
            back = torch.zeros_like(flight.incoming) if back is None else back
            self._hand_on(walk, (number, micro, Carried.BACK), number - 1, back)
        if flight.embedded is not None:
            back = flight.embedded.grad
            back = torch.zeros_like(flight.embedded) if back is None else back
            last = self._orders.stages - 1
            self._hand_on(walk, (number, micro, Carried.EMBEDDED), last, back.flatten(1))
            if last in self._stages:
                walk.due.add(micro)
        flight.loss = flight.edge = flight.incoming = flight.embedded = None

    def _take_others(self, walk: _Walk, number: int, micro: int) -> None:
        """A backward pass of which nothing counts but what others' tokens give the experts here."""
        flight = walk.flights[number, micro]
        parameters = [p for p in self._stages[number].module.parameters() if p.requires_grad]
        # Of all, not of the experts alone: then tokens' gradients go back to the others in every layer.
        wanted = [*parameters, *([] if flight.incoming is None else [flight.incoming])]
        if flight.loss is not None:
            found = torch.autograd.grad(flight.loss.sum * 0, wanted, allow_unused=True)
        elif flight.edge is not None:
            shape = walk.shapes[micro]
            width = self._stages[number].width(shape, before=False)
            nothing = torch.zeros(shape.rows, width.values, dtype=width.dtype, device=self._device)
            found = torch.autograd.grad([flight.edge], wanted, [nothing], allow_unused=True)
        else:
            return
        for parameter, grad in zip(parameters, found, strict=False):
            if id(parameter) in self._between and grad is not None:
                parameter.grad = grad if parameter.grad is None else parameter.grad + grad
        flight.loss = flight.edge = flight.incoming = None

    def _set_aside(self, number: int, flight: _Flight, half: Callable[[], None]) -> None:
        """Half of a backward pass, whose gradients wait for the other half: leaves are added one after the other.

        Norms and embeddings have theirs at once, when other micro-batches of the sum are not finished yet.
        """
        parameters = [p for p in self._stages[number].module.parameters() if p.requires_grad]
        before = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        half()
        flight.early = [(p, p.grad) for p in parameters if p.grad is not None]
        for parameter, grad in zip(parameters, before, strict=True):
            parameter.grad = grad

    # -- the sum of a tied weight -------------------------------------------------------------------------------

    def _expect_tied(self, walk: _Walk, way: Way) -> None:
        walk.unasked[way] -= 1
        if not walk.unasked[way]:
            walk.due.add(way[1])

    def _add_tied(self, walk: _Walk, due: Collection[int]) -> None:
        """Add the embedding's part of micro-batches whose messages are under way, in order."""
        tied = walk.tied
        while tied is not None and tied.next in due and tied.has_head:
            doing("adding gradients of the embedding", "micro-batch", tied.next)
            tied.embedding(self._arrived(walk, (self._orders.stages - 1, tied.next, Carried.EMBEDDED)))

    # -- messages -----------------------------------------------------------------------------------------------

    def _tag(self, message: Message | Part) -> int:
        if not self._tagged:
            return 0
        which = message.micro if isinstance(message, Message) else message.rows.start
        return (which * len(Carried) + message.carries) * _STAGES + message.target

    def _ask(self, walk: _Walk, op: Receive) -> None:
        message, way = op.message, _to(op.message)
        shape = walk.shapes[way[1]]
        if way not in walk.posts:
            stage = self._stages[way[0]]
            width = stage.embedding(shape.tokens) if message.embedded else stage.width(shape, before=message.forward)
            walk.posts[way] = _Post(torch.empty(shape.rows, width.values, dtype=width.dtype, device=self._device))
        buffer = walk.posts[way].buffer
        if isinstance(message, Part):
            buffer = buffer[message.rows.receiver_row :][: message.rows.rows]
        coming = ask(buffer, op.peer, self._tag(message), self._group)
        walk.posts[way].coming.append((coming, self._peers[op.peer]))

    def _arrived(self, walk: _Walk, way: Way) -> Tensor:
        asked = walk.posts.pop(way)
        for wait, rank in asked.coming:
            with waiting((rank,)):
                wait()
        self._began = time.time()  # waiting for it was no computing
        return asked.buffer

    def _hand_on(self, walk: _Walk, way: Way, target: int, payload: Tensor) -> None:
        """To a stage of this rank at once; to those of others when it is their turn."""
        if target in self._stages:
            walk.posts[target, way[1], way[2]] = _Post(payload)
        else:
            walk.made[way] = payload.contiguous()

    def _send(self, walk: _Walk, op: Send) -> None:
        message, way = op.message, _from(op.message)
        payload = walk.made[way]
        walk.unsent[way] -= 1
        if not walk.unsent[way]:
            del walk.made[way]
        if isinstance(message, Part):
            payload = payload[message.rows.sender_row :][: message.rows.rows]
        with waiting((self._peers[op.peer],)):  # that is, where it takes nothing any more
            work = post(payload, op.peer, self._tag(message), self._group)
        walk.sends = [sent for sent in walk.sends if not sent[0].is_completed()]
        if work is not None:
            walk.sends.append((work, payload, self._peers[op.peer]))
