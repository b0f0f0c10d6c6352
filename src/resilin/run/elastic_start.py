"""A run whose workers come and go, from the launcher's side and from a worker's."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from torch._C._distributed_c10d import TCPStore

from resilin.checkpoint.folder import CheckpointFolder
from resilin.checkpoint.lock import lock_folder, unlock_folder
from resilin.cluster.addresses import LOOPBACK, parse
from resilin.cluster.agent import Agent, EndedError
from resilin.cluster.axes import Clocks, clocks_hook
from resilin.cluster.elastic_job import ElasticJob, JobEnded
from resilin.cluster.faults import Fault, await_faults, to_environment
from resilin.cluster.handshake import SECRET, read_secret
from resilin.cluster.hosts import Hosts
from resilin.cluster.join import let_go
from resilin.cluster.keeper import NOTICES, end_with_keeper
from resilin.cluster.local_starter import LocalStarter
from resilin.cluster.notice import await_notice, notice_of
from resilin.cluster.place import Place
from resilin.cluster.position import MEMBER
from resilin.cluster.protocol.rules import Rules
from resilin.cluster.scheduling import compute_on
from resilin.cluster.settings import ClusterSettings
from resilin.cluster.starter import ADDRESS, COORDINATOR, HOST, STORE, Door, Starter
from resilin.cluster.tunnel import Relay
from resilin.config import parse_settings
from resilin.run.build import build_run
from resilin.run.device import choose_device
from resilin.run.elastic import Elastic
from resilin.run.elastic_place import check_elastic, elastic_degrees
from resilin.run.events import Cluster, Event, Listener, from_json, to_json
from resilin.run.folder import RunFolder
from resilin.run.run import Outcome, Run
from resilin.run.settings import RunSettings
from resilin.run.start import listeners_of, make_it_a_run, resume_from_latest, settle

_PATIENCE = 60.0  # seconds that a worker waits for its job
_ONCE = ("step", "eval", "save", "start", "end")


def launch(
    settings: RunSettings,
    path: Path,
    command: Sequence[str],
    *,
    starter: Callable[[Path], Starter] | None = None,
    place: Place | None = None,
    resume: bool = False,
    accept_changes: bool = False,
    faults: Sequence[Fault] = (),
    watch: Callable[[ElasticJob, Event], None] = lambda job, event: None,
) -> JobEnded:
    """Start the workers of a run, and see it through.

    Args:
        settings: of the run; `parallel.workers` begin.
        path: the run's folder.
        command: what every worker runs.
        starter: of workers, given the folder for their output; None: processes of this machine.
        place: where workers find the job; None: at the loopback.
        resume: go on from the last checkpoint.
        accept_changes: although settings that decide what is learned have changed.
        faults: failures on purpose.
        watch: told of the job's events, once each; it may ask the job for something.
    """
    folder = RunFolder(path)
    notice_of(settings.cluster.notice)  # a function that is not there is told now
    hook = clocks_hook(settings.cluster.clocks_hook) if settings.cluster.clocks_hook else None
    degrees = elastic_degrees(settings.parallel)
    check_elastic(settings, degrees, choose_device(settings.train.device))
    divided = settings.parallel.model_copy(update={"pipeline": degrees.pipeline, "tensor": degrees.tensor})
    settings = settings.model_copy(update={"parallel": divided})
    settings = settle(settings, folder, resume=resume)
    folder.prepare(settings, resume=resume, accept_changes=accept_changes)
    begun = CheckpointFolder(folder.checkpoints_of()).latest() if resume else None
    workers = folder.path / "workers"
    workers.mkdir(parents=True, exist_ok=True)
    cluster = settings.cluster
    if starter is None and cluster.launcher == "ray":
        starter, place = _on_ray(settings, command)
    if starter is not None:
        starts = starter(workers)
    else:
        starts = LocalStarter(command, workers, {ADDRESS: LOOPBACK}, sharing=settings.parallel.workers)
    fast = settings.parallel.reduction == "fast"
    rules = Rules(
        members=settings.parallel.workers,
        stages=degrees.pipeline,
        tensor=degrees.tensor,
        expert=settings.parallel.expert,
        layers=settings.parallel.layers,
        micros=-(-settings.train.batch_size // settings.train.micro_batch_size),
        least=cluster.least,
        copies=cluster.copies,
        silence=cluster.silence,
        hang=cluster.hang,
        patient=not starts.steady,
        clocks=_clocks(cluster),
        micro=settings.train.micro_batch_size,
        slots=settings.train.batch_size,
        # A sum of what passes through other stages, or of others' tokens, cannot be taken apart.
        keeps_parts=settings.parallel.expert == 1 and (not fast or degrees.pipeline == 1),
        even=fast or settings.parallel.expert > 1,
    )
    facts = {
        "settings": json.dumps(settings.model_dump(mode="json")),
        "folder": str(folder.path.resolve()),
        "resume": json.dumps(str(folder.checkpoints_of()) if resume else None),
    }
    with ExitStack() as stack:
        lock_folder(workers)
        stack.callback(unlock_folder, workers)
        log = EventLog(listeners_of(settings, folder, begun or 0))
        stack.callback(log.close)
        job = ElasticJob(
            starts,
            rules,
            workers,
            facts=facts,
            hear=log.hear,
            note=log.note,
            begin=0 if isinstance(starts, Hosts) else settings.parallel.workers,
            most=cluster.most,
            replace=cluster.replace,
            environment=to_environment(faults),
            place=place,
            clocks=hook,
        )
        log.also(partial(watch, job))
        return job.run()


def _clocks(cluster: ClusterSettings) -> Clocks | None:
    given = cluster.clocks
    return Clocks(tuple(sorted(given)), given[0], cluster.clocks_fixed) if given else None


def _on_ray(settings: RunSettings, command: Sequence[str]) -> tuple[Callable[[Path], Starter], Place]:
    """Who starts workers on Ray's nodes, and where the coordinator listens: where those nodes reach this machine."""
    from resilin.cluster.ray_starter import RayStarter, own_ray_address

    cluster, workers = settings.cluster, settings.parallel.workers
    place = Place(cluster.host or own_ray_address(), cluster.port, read_secret() or "")
    return lambda folder: RayStarter(command, folder.resolve(), workers, cluster.placement, cluster.cpus), place


class EventLog:
    """Passes the events of whoever speaks for the run on to listeners, each once: a step that is redone is the same.

    Args:
        listeners: of the launcher.
    """

    def __init__(self, listeners: Sequence[Any]) -> None:
        self._listeners = [*listeners]
        self._also: list[Listener] = []
        self._seen: set[tuple[Any, ...]] = set()
        self._lock = threading.Lock()  # workers are heard in a thread each

    def hear(self, told: Mapping[str, Any]) -> None:
        """An event, as JSON values."""
        event = from_json(told)
        key = event.event, told.get("step"), told.get("name")
        with self._lock:
            if event.event in _ONCE and key in self._seen:
                return
            self._seen.add(key)
            self._pass_on(event)

    def note(self, what: str, facts: Mapping[str, Any]) -> None:
        """A decision of the coordinator."""
        with self._lock:
            self._pass_on(Cluster(what=what, facts=facts))

    def _pass_on(self, event: Event) -> None:
        for listener in (*self._listeners, *self._also):
            listener(event)

    def also(self, listener: Listener) -> None:
        """One more listener, which need not be closed."""
        self._also.append(listener)

    def close(self) -> None:
        """Close the listeners."""
        for listener in self._listeners:
            listener.close()


class _Speaker:
    """Tells the launcher of the run's events, if this worker speaks for the run."""

    def __init__(self, agent: Agent, elastic: Elastic) -> None:
        self._agent, self._elastic = agent, elastic

    def __call__(self, event: Event) -> None:
        if self._elastic.lead:
            self._agent.tell(to_json(event))


def _load(run: Run, before: CheckpointFolder) -> None:
    assert run.checkpoints is not None
    resume_from_latest(run, run.checkpoints) or resume_from_latest(run, before)


def work() -> Outcome:
    """Be one of the workers of a run, as the environment says, until it is over for this one.

    Raises:
        EndedError: it is over for this worker, with its exit code.
    """
    end_with_keeper()
    compute_on()
    number, door = int(os.environ[MEMBER]), _door()
    with ExitStack() as stack:
        port = door.store
        if port is None:
            relay = Relay(door, _PATIENCE)
            stack.callback(relay.close)
            port = relay.port
        store = TCPStore("127.0.0.1", port, None, False, timedelta(seconds=_PATIENCE))
        settings = parse_settings(RunSettings, json.loads(store.get("settings")), "the launcher's settings")
        folder, resume = RunFolder(Path(store.get("folder").decode())), json.loads(store.get("resume"))
        await_faults(number)
        agent = Agent(
            door,
            number,
            store,
            os.environ.get(HOST) or socket.gethostname(),
            settings.parallel.timeout,
            settings.cluster.silence,
            os.environ.get(ADDRESS, ""),
        )
        for number in NOTICES:  # from now on, though the run has not begun here
            signal.signal(number, lambda *_: agent.leaving())
        elastic = Elastic(agent)
        stack.callback(let_go)
        stack.callback(agent.close)
        stack.callback(elastic.close)
        if (asked := notice_of(settings.cluster.notice)) is not None:
            await_notice(asked, settings.cluster.notice_every, agent.leaving)
        try:
            run = build_run(settings, folder, elastic=elastic)
            if elastic.lead:
                make_it_a_run(folder, settings, run)
            if resume is not None:
                # Settings may name another place than before: then the first checkpoint is still where it was.
                elastic.load = partial(_load, before=CheckpointFolder(Path(resume)))
            elastic.attach(run)
            run.listeners = (_Speaker(agent, elastic),)
            return run.train()
        except EndedError:
            raise
        except Exception as error:
            agent.failed(error)
            raise


def _door() -> Door:
    host, port = parse(os.environ[COORDINATOR])
    store = parse(os.environ[STORE])[1] if STORE in os.environ else None
    return Door(host, port, os.environ[SECRET], store)
