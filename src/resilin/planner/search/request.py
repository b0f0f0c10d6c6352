"""From what a user asks of `resilin plan --cluster` to layouts, and to the settings that run the chosen one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resilin.config import UserError, parse_settings, settings_to_toml
from resilin.config.load import apply_override, read_toml
from resilin.models.decoder_settings import DecoderSettings
from resilin.planner.cost import Prediction, Workload
from resilin.planner.hardware import Cluster, load_cluster
from resilin.planner.search.find import Found, Objective, find
from resilin.planner.search.shapes import Shape, load_shape
from resilin.planner.search.space import Fixed
from resilin.planner.search.too_large import Missing, missing
from resilin.run.model_layout import vocabulary_of
from resilin.run.settings import RunSettings


@dataclass(frozen=True, slots=True)
class LayoutRequest:
    """The options of `resilin plan --cluster`.

    Attributes:
        cluster: a machine's name or file.
        workers: devices that may be used; 0: as the cluster's file says.
        tokens: of the run; None: what the settings' steps make.
        model: a model's name, or a settings file.
        overrides: of the settings; those of the division are fixed, not chosen.
        cluster_overrides: of the cluster's file.
        batch_tokens: of a step; None: the settings' or the model's.
        objective: what is ranked by.
        fewer: whether fewer workers than there are may be used.
    """

    cluster: str
    workers: int
    tokens: float | None
    model: str | None
    overrides: tuple[str, ...] = ()
    cluster_overrides: tuple[str, ...] = ()
    batch_tokens: int | None = None
    objective: Objective = "time"
    fewer: bool = False


@dataclass(frozen=True)
class LayoutAnswer:
    """What was found.

    Attributes:
        cluster: on what.
        work: model and steps.
        tokens: of the run.
        workers: that may be used.
        found: layouts; none where nothing fits.
        missing: then what is missing.
        tree: of the run's settings, without its division.
        objective: what is ranked by.
    """

    cluster: Cluster
    work: Workload
    tokens: float
    workers: int
    found: Found
    missing: Missing | None
    tree: dict[str, Any]
    objective: Objective


_DECODER = "resilin.models.decoder_settings:DecoderSettings"
_DIVISION = ("parallel.", "train.micro_batch_size", "model.recompute", "model.offload", "precision.compute")


def _parts(request: LayoutRequest) -> tuple[dict[str, Any], Shape | None, dict[str, Any]]:
    """The settings' tree without its division, the named model if it is one, and the fixed part of the division."""
    shape: Shape | None = None
    tree: dict[str, Any] = {}
    if request.model is not None and (request.model.endswith(".toml") or Path(request.model).is_file()):
        tree = read_toml(Path(request.model))
    elif request.model is not None:
        shape = load_shape(request.model)
        tree = {"model": shape.model.model_dump(mode="json", exclude_defaults=True)}
    fixed: dict[str, Any] = {}
    for override in request.overrides:
        key = override.partition("=")[0].strip()
        apply_override(fixed if key.startswith(_DIVISION) else tree, override)
    tree.pop("parallel", None)
    tree.get("train", {}).pop("micro_batch_size", None)
    for table, key in (("model", "recompute"), ("model", "offload"), ("precision", "compute")):
        tree.get(table, {}).pop(key, None)
    if not tree.get("model"):
        raise UserError("a layout needs a model: --model NAME or FILE, a settings file, or model.hidden_size=...")
    return tree, shape, fixed


def _work(tree: dict[str, Any], shape: Shape | None, request: LayoutRequest) -> Workload:
    use = tree["model"].get("use", _DECODER)
    if use != _DECODER:
        raise UserError(f"layouts are planned for decoders; model.use is {use!r}")
    model_tree = {name: value for name, value in tree["model"].items() if name != "use"}
    model = parse_settings(DecoderSettings, model_tree, "[model]")
    tokens = shape.tokens if shape else model.max_positions
    if "source" in tree:
        run = parse_settings(RunSettings, tree, request.model or "command line")
        if not shape or "sequence_length" in tree["source"]:
            tokens = getattr(run.source, "sequence_length", tokens)
        if not model.vocab_size:
            model = model.model_copy(update={"vocab_size": vocabulary_of(run, Path(request.model or "settings"))})
    if not model.vocab_size:
        raise UserError("how many tokens has the vocabulary? say model.vocab_size=...")
    rows = tree.get("train", {}).get("batch_size")
    wanted = request.batch_tokens or (shape.batch_tokens if shape and rows is None else None)
    if wanted is not None:
        rows = round(wanted / tokens)
    if not rows:
        raise UserError("how large is a step? say --batch-tokens, or train.batch_size=... rows")
    return Workload(model, int(tokens), max(int(rows), 1))


def _fixed(tree: dict[str, Any]) -> Fixed:
    return Fixed(
        parallel={name: value for name, value in tree.get("parallel", {}).items() if name != "workers"},
        micro=tree.get("train", {}).get("micro_batch_size"),
        recompute=tree.get("model", {}).get("recompute"),
        compute=tree.get("precision", {}).get("compute"),
        offload=tree.get("model", {}).get("offload"),
    )


@dataclass(frozen=True)
class Prepared:
    """What a request asks for, read and checked.

    Attributes:
        cluster: on what.
        work: model and steps.
        workers: that may be used.
        fixed: what is not to be chosen.
        tree: of the run's settings, without its division.
    """

    cluster: Cluster
    work: Workload
    workers: int
    fixed: Fixed
    tree: dict[str, Any]


def prepare(request: LayoutRequest) -> Prepared:
    """Reads the files that a request names, and refuses what contradicts itself.

    Raises:
        UserError: naming what is missing, unknown or contradicts itself.
    """
    cluster = load_cluster(request.cluster, request.cluster_overrides)
    workers = request.workers or cluster.workers
    if workers < 1:
        raise UserError(f"how many devices of {cluster.name} are there? say --workers, or `workers` in its file")
    if cluster.workers and workers > cluster.workers and device_type(cluster) != "cpu":
        raise UserError(f"--workers {workers} is more than the {cluster.workers} devices that {cluster.name} has")
    if cluster.reach and workers > cluster.reach:
        raise UserError(
            f"--workers {workers} is more than the {cluster.reach} devices that {cluster.name}'s outermost level joins"
        )
    tree, shape, fixed_tree = _parts(request)
    work, fixed = _work(tree, shape, request), _fixed(fixed_tree)
    fixed.check(workers, work, cluster)
    return Prepared(cluster, work, workers, fixed, tree)


def answer_layout(request: LayoutRequest) -> LayoutAnswer:
    """The layouts for what a user asked.

    Raises:
        UserError: naming what is missing, unknown or contradicts itself.
    """
    asked = prepare(request)
    cluster, work, workers, fixed = asked.cluster, asked.work, asked.workers, asked.fixed
    steps = asked.tree.get("train", {}).get("steps")
    tokens = request.tokens or (steps * work.step_tokens if steps else None)
    if not tokens or tokens < work.step_tokens:
        raise UserError(
            f"how long is the run? say --tokens, at least the {work.step_tokens:,} of a step, or train.steps=..."
        )
    found = search(work, cluster, workers, tokens, fixed, request.objective, fewer=request.fewer)
    gone = None
    if not found.best:
        if found.smallest is None:
            raise no_layout(work, workers)
        gone = missing(work, cluster, workers, found.smallest, fixed, device_type=device_type(cluster))
    return LayoutAnswer(cluster, work, float(tokens), workers, found, gone, asked.tree, request.objective)


def no_layout(work: Workload, workers: int) -> UserError:
    """That nothing can be divided so, whatever the memory."""
    return UserError(
        f"{workers} workers cannot divide the {work.batch} rows of a step, {work.model.heads} heads and "
        f"{work.model.layers} blocks of this model under what is fixed: use a batch that {workers} divides, "
        f"such as --batch-tokens {-(-work.batch // workers) * workers * work.tokens}, or fix less"
    )


def device_type(cluster: Cluster) -> str:
    """Of a machine's devices: "cpu" where each computes one tile at a time."""
    return "cpu" if cluster.device.units == 1 else "cuda"


def search(
    work: Workload,
    cluster: Cluster,
    workers: int,
    tokens: float,
    fixed: Fixed = Fixed(),
    objective: Objective = "time",
    *,
    fewer: bool = False,
) -> Found:
    """`find` for a number of workers, or for it and fewer: whole nodes, or divisors inside one."""
    counts = [workers]
    if fewer:
        node = min(cluster.node, workers)
        counts += list(range(node, workers, node))[-15:]
        counts += [n for n in range(1, node) if node % n == 0]
    shared = cluster.workers if device_type(cluster) == "cpu" and cluster.workers < workers else None
    return find(
        work,
        cluster,
        sorted(set(counts), reverse=True),
        tokens,
        fixed,
        objective,
        device_type=device_type(cluster),
        cores=shared or None,
    )


def settings_of(answer: LayoutAnswer | Prepared, step: Prediction, tokens: float | None = None) -> str:
    """The TOML of a run with this layout, which `resilin train` takes as it is.

    Args:
        answer: what was asked for.
        step: of the layout.
        tokens: of the run; None: the answer's.

    Raises:
        UserError: the settings have no source of data, or cannot be used.
    """
    tree = {name: dict(value) if isinstance(value, dict) else value for name, value in answer.tree.items()}
    if "source" not in tree:
        raise UserError("a run needs data: add source.paths='[\"data/*.jsonl\"]' (and what else its source needs)")
    plan, work = step.plan, step.work
    tree["source"].setdefault("sequence_length", work.tokens)
    tree["model"] = {**tree["model"], "vocab_size": work.model.vocab_size, "recompute": plan.recompute}
    if plan.offload != "none":
        tree["model"]["offload"] = plan.offload
    train = tree.setdefault("train", {})
    if tokens is not None:
        train["steps"] = -(-int(tokens) // work.step_tokens)
    elif isinstance(answer, LayoutAnswer):
        train.setdefault("steps", -(-int(answer.tokens) // work.step_tokens))
    train.update(batch_size=work.batch, micro_batch_size=plan.micro)
    tree["precision"] = {**tree.get("precision", {}), "compute": plan.compute}
    parallel = plan.parallel.model_dump(mode="json", exclude_defaults=True)
    d = plan.degrees
    for name in ("data", "tensor", "pipeline", "context", "expert", "replicate"):
        parallel[name] = getattr(d, name)
    if d.pipeline == 1:
        parallel = {name: value for name, value in parallel.items() if name not in ("schedule", "chunks", "layers")}
    if step.workers <= answer.cluster.node:  # one machine: the command starts them itself
        parallel["workers"] = step.workers
    tree["parallel"] = parallel
    return settings_to_toml(parse_settings(RunSettings, tree, "the planned settings"))


def launch_command(answer: LayoutAnswer, step: Prediction, path: str) -> str:
    """How to start it."""
    node = answer.cluster.node
    if step.workers <= node:
        return f"resilin train {path}"
    machines = -(-step.workers // node)
    return (
        f"torchrun --nnodes {machines} --nproc-per-node {node} --rdzv-backend c10d --rdzv-endpoint FIRST_MACHINE:29500 "
        f"-m resilin train {path}"
    )


def overrides_of(step: Prediction) -> Sequence[str]:
    """The layout as overrides of a settings file."""
    plan, d = step.plan, step.plan.degrees
    said = [f"parallel.{name}={getattr(d, name)}" for name in ("data", "tensor", "pipeline", "context", "expert")]
    said = [item for item in said if not item.endswith("=1")]
    if d.pipeline > 1:
        said += [f"parallel.schedule={plan.parallel.schedule}", f"parallel.chunks={plan.parallel.chunks}"]
    said += [f"parallel.sharding={plan.parallel.sharding}", f"train.micro_batch_size={plan.micro}"]
    said += [f"model.offload={plan.offload}"] * (plan.offload != "none")
    return [*said, f"model.recompute={plan.recompute}", f"precision.compute={plan.compute}"]
