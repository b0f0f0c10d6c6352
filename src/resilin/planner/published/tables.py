"""Tables of published runs, as TOML files beside this one hold them."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from resilin.config import Settings, parse_settings
from resilin.config.load import read_toml
from resilin.models.decoder_settings import DecoderSettings
from resilin.parallel.settings import ParallelSettings
from resilin.planner.cost import Arrangement, Workload
from resilin.planner.cost.arrangement import Recompute
from resilin.planner.search.shapes import load_shape

FOLDER = Path(__file__).parent


@lru_cache(maxsize=64)
def _of_model(model: DecoderSettings, tokens: int) -> Workload:
    """Rows of one model share what is found out of it."""
    return Workload(model, tokens, 1)


class PublishedRow(Settings):
    """One run and what was measured of it."""

    name: str
    value: float
    gib: float = 0.0
    """Peak memory of a device; 0: not given."""
    stages_gib: tuple[float, ...] = ()
    """Peak memory of a device of each pipeline stage; (): not given."""
    shape: str = ""
    """A model by name, in place of the sizes."""
    hidden: int = 0
    layers: int = 0
    heads: int = 0
    kv_heads: int = 0
    mlp: int = 0
    """0: four times hidden."""
    gated: bool = False
    vocabulary: int = 0
    tokens: int
    batch: int
    workers: int = 0
    """Where the layout is chosen."""
    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    chunks: int = 1
    micro: int = 1
    sharding: Literal["zero1", "fsdp"] = "zero1"
    recompute: Recompute = "none"
    compute: str = "bf16"

    @property
    def model(self) -> DecoderSettings:
        """The model."""
        if self.shape:
            return load_shape(self.shape).model
        return DecoderSettings(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads,
            mlp_size=self.mlp or 4 * self.hidden,
            gated=self.gated,
            qkv_bias=not self.gated,
            out_bias=not self.gated,
            mlp_bias=not self.gated,
            norm="rms" if self.gated else "layer",
            tie_embeddings=True,
        )

    @property
    def work(self) -> Workload:
        """Model and steps."""
        return _of_model(self.model, self.tokens).with_batch(self.batch)

    def arrangement(self, *, sequence: bool, states_divided: bool) -> Arrangement:
        """The layout; stages have equally many blocks where that is possible, as the papers' have.

        Args:
            sequence: whether tensor parallelism divides sequences too.
            states_divided: whether the optimizer's states are divided.
        """
        stages, blocks = self.pipeline * self.chunks, self.model.layers
        even = (blocks // stages,) * stages if self.pipeline > 1 and blocks % stages == 0 else ()
        parallel = ParallelSettings(
            data=self.data,
            tensor=self.tensor,
            pipeline=self.pipeline,
            context=self.context,
            chunks=self.chunks,
            schedule="interleaved" if self.chunks > 1 else "1f1b",
            layers=even,
            sharding=self.sharding,
            sequence=sequence,
            context_kind="ring",
        )
        return Arrangement(parallel, self.micro, self.recompute, self.compute, states_divided=states_divided)


class Table(Settings):
    """Runs of one machine and one system, with what was measured."""

    name: str
    machine: str
    stack: str
    measure: Literal["TFLOP/s", "tokens/s", "seconds", "sequences/s"]
    """TFLOP/s of a device as Megatron counts them; tokens/s of a device; seconds of a step; sequences/s of all."""
    calibrates: str = ""
    """The row by which the machine's share of peak is set; it is not counted."""
    best: str = ""
    """The row whose value should be the best of its batch."""
    read_off: bool = False
    """The values are of plots, to about 3."""
    chosen: tuple[str, ...] = ()
    """What of the layout was not published, and is chosen as best."""
    common: dict[str, Any] = Field(default_factory=dict)
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]

    def runs(self) -> list[PublishedRow]:
        """The rows as runs."""
        return [
            parse_settings(PublishedRow, {**self.common, **dict(zip(self.columns, row, strict=True))}, self.name)
            for row in self.rows
        ]


class _File(Settings):
    tables: tuple[Table, ...]


def load_tables() -> list[Table]:
    """Of all papers."""
    files = sorted(FOLDER.glob("*.toml"))
    return [table for path in files for table in parse_settings(_File, read_toml(path), path.name).tables]
