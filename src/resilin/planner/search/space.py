"""Every way to divide a run's work that the runtime takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from resilin.config import UserError, parse_settings
from resilin.layout.dealing import VIRTUAL_SHARDS
from resilin.models.decoder_settings import DecoderSettings
from resilin.parallel.errors import ParallelError
from resilin.parallel.settings import ParallelSettings
from resilin.planner.cost.arrangement import Arrangement, OffloadTo, Workload
from resilin.planner.hardware import Cluster

LONG = 16_384
"""Tokens of a row from which dividing rows is tried."""
MOST_CHUNKS = 8


@dataclass(frozen=True)
class Fixed:
    """What is not to be chosen.

    Attributes:
        parallel: settings of `[parallel]` by name.
        micro: rows of a micro-batch.
        recompute: what is computed again.
        compute: the format of products.
        offload: where the inputs of recomputed blocks wait.
    """

    parallel: dict[str, Any] = field(default_factory=dict)
    micro: int | None = None
    recompute: str | None = None
    compute: str | None = None
    offload: str | None = None

    def check(self, workers: int, work: Workload, cluster: Cluster) -> None:
        """Refuse what contradicts itself, the model or the cluster.

        Raises:
            UserError: which values, and what would do.
        """
        settings = parse_settings(ParallelSettings, self.parallel, "the fixed settings [parallel]")
        degrees = {
            name: self.parallel[name] for name in ("data", "tensor", "pipeline", "context") if name in self.parallel
        }
        product = 1
        for value in degrees.values():
            product *= value if isinstance(value, int) else 1
        if workers % product or (len(degrees) == 4 and product != workers):
            try:
                settings.degrees(workers)
            except ParallelError as error:
                raise UserError(f"the fixed degrees contradict --workers {workers}: {error}") from None
            raise UserError(
                f"the fixed degrees {degrees} make {product}, which does not divide --workers {workers}: leave one "
                f"out, or use {workers // product * product or product} workers"
            )
        model = work.model
        tensor = degrees.get("tensor", 1)
        if isinstance(tensor, int) and tensor > model.heads:
            raise UserError(
                f"parallel.tensor={tensor} is more than the model's {model.heads} heads: use at most as many"
            )
        stages = degrees.get("pipeline", 1)
        if isinstance(stages, int) and stages * settings.chunks > model.layers:
            raise UserError(
                f"parallel.pipeline={stages} with parallel.chunks={settings.chunks} has more stages than the model's "
                f"{model.layers} blocks"
            )
        if settings.expert > 1 and model.moe is None:
            raise UserError(
                f"parallel.expert={settings.expert}, but the model has no experts: set model.moe, or leave it"
            )
        if self.micro is not None and (self.micro > work.batch or work.batch % self.micro):
            raise UserError(f"train.micro_batch_size={self.micro} does not divide the {work.batch} rows of a step")
        if self.compute is not None:
            cluster.peak(self.compute)
        self._check_offload(cluster)

    def _check_offload(self, cluster: Cluster) -> None:
        if self.offload in (None, "none"):
            return
        if self.recompute not in (None, "block"):
            raise UserError(
                f"model.offload={self.offload} says where inputs of recomputed blocks wait, which contradicts "
                f"model.recompute={self.recompute}: use model.recompute=block, or leave one out"
            )
        if self.offload == "host" and cluster.device.units == 1:
            raise UserError(
                f"model.offload=host: the memory of {cluster.device.name} is that of the host; use disk, or leave it "
                "out"
            )
        if (cluster.host if self.offload == "host" else cluster.disk) is None:
            raise UserError(
                f"model.offload={self.offload}, but the file of {cluster.name} has no table [{self.offload}]: add it"
            )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _choices(fixed: Fixed, name: str, values: Sequence[Any]) -> Sequence[Any]:
    given = fixed.parallel.get(name)
    return values if given is None or given == "auto" else [given]


def arrangements(work: Workload, cluster: Cluster, workers: int, fixed: Fixed = Fixed()) -> Iterator[Arrangement]:
    """All that so many workers can do; what does not fit into memory is among them.

    Tensor parallelism stays inside a node unless it is fixed; micro-batches have 1, 2, 4, ... rows and divide a step
    evenly; rows are divided from 16,384 tokens on.
    """
    for tensor, pipeline, context in _degrees(work, cluster, workers, fixed):
        copies = workers // (tensor * pipeline * context)
        for expert in _choices(fixed, "expert", _experts(work.model, copies * context)):
            for sharding, replicate in _shardings(cluster, copies, tensor, pipeline, context, fixed):
                degrees = {
                    "tensor": tensor,
                    "pipeline": pipeline,
                    "context": context,
                    "expert": expert,
                    "replicate": replicate,
                    "data": copies // replicate,
                    "sharding": sharding,
                }
                yield from _of_degrees(work, cluster, {**fixed.parallel, **degrees}, copies, fixed)


def _degrees(work: Workload, cluster: Cluster, workers: int, fixed: Fixed) -> Iterator[tuple[int, int, int]]:
    model = work.model
    tensors = [t for t in _divisors(workers) if t <= cluster.node and model.heads % t == 0]
    if model.sizes_differ or model.chains is not None:
        tensors = [1]
    contexts = [1]
    if work.tokens >= LONG:
        contexts += [c for c in _divisors(workers)[1:] if c & (c - 1) == 0 and work.tokens % (2 * c) == 0 and c <= 64]
    data = fixed.parallel.get("data")
    for tensor in _choices(fixed, "tensor", tensors):
        for context in _choices(fixed, "context", contexts):
            kind = fixed.parallel.get("context_kind", "ulysses")
            if workers % (tensor * context) or (kind == "ulysses" and model.heads % (tensor * context)):
                continue
            stages = [p for p in _divisors(workers // (tensor * context)) if p <= model.layers]
            for pipeline in _choices(fixed, "pipeline", stages):
                used = tensor * context * pipeline
                if workers % used == 0 and (not isinstance(data, int) or used * data == workers):
                    yield tensor, pipeline, context


def _experts(model: DecoderSettings, spread: int) -> list[int]:
    if model.moe is None:
        return [1]
    return [n for n in _divisors(spread) if model.moe.experts % n == 0]


def _shardings(
    cluster: Cluster, copies: int, tensor: int, pipeline: int, context: int, fixed: Fixed
) -> Iterator[tuple[str, int]]:
    wanted = _choices(fixed, "sharding", ("zero1", "fsdp"))
    if "zero1" in wanted and copies * context <= VIRTUAL_SHARDS:
        yield "zero1", 1
    if "fsdp" in wanted and copies * context > 1:
        # Shards over all copies, or over those of one node, with the nodes as replicas.
        inside = max(cluster.node // (tensor * context), 1)
        options = {1}
        if pipeline == 1 and copies % inside == 0 and 1 < inside < copies:
            options.add(copies // inside)
        for replicate in _choices(fixed, "replicate", sorted(options)):
            if copies % replicate == 0 and copies // replicate * context > 1:
                yield "fsdp", replicate


def _schedules(work: Workload, pipeline: int, fixed: Fixed) -> Iterator[tuple[str, int]]:
    if pipeline == 1:
        yield "1f1b", 1
        return
    offered = [("1f1b", 1)]
    chunks = [v for v in _divisors(MOST_CHUNKS)[1:] if pipeline * v <= work.model.layers]
    offered += [("interleaved", v) for v in chunks]
    offered.append(("zb-h1", 1))
    name, count = fixed.parallel.get("schedule"), fixed.parallel.get("chunks")
    if name is not None and name not in [one for one, _ in offered]:
        offered = [(name, count or (2 if name in ("zb-v", "zb-interleaved") else 1))]
    for schedule, chunk in offered:
        if name in (None, schedule) and count in (None, chunk):
            yield schedule, chunk


def _of_degrees(
    work: Workload, cluster: Cluster, parallel: dict[str, Any], copies: int, fixed: Fixed
) -> Iterator[Arrangement]:
    rows = work.batch // copies
    if work.batch % copies or not rows:
        return
    micros = [n for n in _divisors(min(rows, 64)) if rows % n == 0 and n & (n - 1) == 0]
    recomputes = ("none", "selective", "block") if fixed.recompute is None else (fixed.recompute,)
    computes = [fixed.compute] if fixed.compute else [_quickest(cluster)]
    for schedule, chunks in _schedules(work, parallel["pipeline"], fixed):
        settings = ParallelSettings(**{**parallel, "schedule": schedule, "chunks": chunks})
        for micro in micros if fixed.micro is None else [fixed.micro]:
            if rows % micro:
                continue
            for recompute in recomputes:
                for compute in computes:
                    for offload in _offloads(cluster, recompute, fixed):
                        yield Arrangement(settings, micro, recompute, compute, offload)  # type: ignore[arg-type]


def _offloads(cluster: Cluster, recompute: str, fixed: Fixed) -> Sequence[OffloadTo]:
    """Where the inputs of recomputed blocks may wait; a file only where that is fixed."""
    if fixed.offload is not None:
        wanted: OffloadTo = fixed.offload  # type: ignore[assignment]
        return (wanted,) if recompute == "block" or wanted == "none" else ()
    if recompute != "block" or cluster.host is None or cluster.device.units == 1:
        return ("none",)
    return ("none", "host")


def _quickest(cluster: Cluster) -> str:
    """The format that Resilin computes in on such devices: bf16 where they are quicker at it, else fp32."""
    peak = cluster.device.peak
    return "bf16" if peak.get("bf16", 0.0) > peak.get("fp32", 0.0) else "fp32"
