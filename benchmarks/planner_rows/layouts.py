"""Layouts that are run for real, and what the planner says of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from planner_rows.runs import text_files
from resilin.models.decoder_settings import DecoderSettings
from resilin.parallel.settings import ParallelSettings
from resilin.planner.cost import RESILIN, Arrangement, Prediction, Workload, predict
from resilin.planner.cost.memory import memory_of_ranks
from resilin.planner.hardware import Cluster
from resilin.planner.search.find import Found
from resilin.planner.search.request import LayoutAnswer, settings_of

QUICK = DecoderSettings(vocab_size=1024, hidden_size=256, layers=8, heads=4, mlp_size=688)
LARGE = DecoderSettings(vocab_size=8192, hidden_size=640, layers=6, heads=10, mlp_size=1728)


@dataclass(frozen=True)
class Case:
    """One layout of one model.

    Attributes:
        work: model and steps.
        plan: the layout.
    """

    work: Workload
    plan: Arrangement

    @property
    def name(self) -> str:
        """Of the layout, with what its own words leave out."""
        said = str(self.plan)
        if not self.plan.parallel.sequence:
            said += ", whole sequences"
        if self.work.tokens > 128 and self.work.model is QUICK:
            said += f", rows of {self.work.tokens}"
        return said

    def predicted(self, cluster: Cluster) -> Prediction:
        """On a machine whose devices are cores."""
        cores = cluster.workers if 0 < cluster.workers < self.plan.degrees.workers else None
        return predict(self.work, self.plan, wide(cluster), device_type="cpu", cores=cores)

    def memory(self) -> list[float]:
        """Bytes of each worker's peak, by its pipeline stage."""
        found = memory_of_ranks(self.work, self.plan, RESILIN, "cpu")
        each = self.plan.degrees.workers // self.plan.degrees.pipeline
        return [one.total for one in found for _ in range(each)]

    def settings(self, cluster: Cluster, steps: int) -> str:
        """TOML of a run of it."""
        tree: dict[str, Any] = {
            "name": "planned",
            "model": self.work.model.model_dump(mode="json", exclude_defaults=True),
            "source": {"paths": text_files(), "tokenizer": {"kind": "bytes"}},
            "train": {"device": "cpu", "threads": 1},
            "evaluation": {"every": 0},
            "checkpoint": {"every": 0, "asynchronous": False},
            "log": {"tensorboard": False, "live": False},
        }
        answer = LayoutAnswer(
            cluster=wide(cluster),
            work=self.work,
            tokens=float(steps * self.work.step_tokens),
            workers=self.plan.degrees.workers,
            found=Found((), (), 0, 0, None),
            missing=None,
            tree=tree,
            objective="time",
        )
        return settings_of(answer, self.predicted(cluster))


def wide(cluster: Cluster) -> Cluster:
    """The machine with as many workers on it as are asked for: they share its cores."""
    return cluster.model_copy(update={"levels": (cluster.levels[0].model_copy(update={"devices": 64}),)})


def _cases(model: DecoderSettings, tokens: int, batch: int, layouts: tuple[dict[str, Any], ...]) -> list[Case]:
    work = Workload(model, tokens, batch)
    found = []
    for layout in layouts:
        given = {"data": 1, **layout}
        micro, recompute = given.pop("micro"), given.pop("recompute", "none")
        found.append(Case(work, Arrangement(ParallelSettings.model_validate(given), micro, recompute, "fp32")))
    return found


def timed() -> list[Case]:
    """Layouts whose steps are timed, of 2 to 8 workers; the first calibrates and is not counted.

    All have as many tokens in a step. They differ by more than this machine's noise: by what is computed again, by
    bubbles of one to sixteen micro-batches, by how often workers exchange, and by rows that are eight times as long.
    """
    short = _cases(
        QUICK,
        128,
        16,
        (
            {"micro": 8, "data": 2},
            {"micro": 8, "data": 2, "recompute": "block"},
            {"micro": 8, "tensor": 2},
            {"micro": 1, "tensor": 2},
            {"micro": 1, "tensor": 4},
            {"micro": 1, "tensor": 4, "recompute": "block"},
            {"micro": 8, "pipeline": 2},
            {"micro": 16, "pipeline": 2, "recompute": "block"},
            {"micro": 16, "pipeline": 4},
            {"micro": 2, "data": 8, "sharding": "fsdp"},
            {"micro": 1, "data": 2, "tensor": 4},
        ),
    )
    long = _cases(
        QUICK,
        1024,
        2,
        (
            {"micro": 1, "data": 2},
            {"micro": 1, "data": 2, "recompute": "block"},
            {"micro": 2, "pipeline": 2},
        ),
    )
    return short + long


def weighed() -> list[Case]:
    """Layouts whose memory is measured."""
    return _cases(
        LARGE,
        256,
        8,
        (
            {"micro": 8},
            {"micro": 4},
            {"micro": 8, "recompute": "block"},
            {"micro": 8, "recompute": "selective"},
            {"micro": 2, "data": 2},
            {"micro": 4, "data": 2, "sharding": "fsdp"},
            {"micro": 4, "tensor": 2},
            {"micro": 4, "tensor": 2, "sequence": False},
            {"micro": 2, "pipeline": 2},
            {"micro": 2, "pipeline": 2, "schedule": "interleaved", "chunks": 2},
            {"micro": 1, "pipeline": 2, "schedule": "gpipe"},
            {"micro": 8, "context": 2},
            {"micro": 2, "data": 2, "pipeline": 2},
        ),
    )
