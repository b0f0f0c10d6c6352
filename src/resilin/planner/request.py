"""From what a user asks of `resilin plan` to a plan."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from resilin.config import Settings, UserError, load_settings
from resilin.data.shards import TokenShards
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.hybrid_settings import HybridSettings
from resilin.planner.advice import short_number
from resilin.planner.budget import Budget, FlopBudget, TimeBudget, TokenBudget
from resilin.planner.family import Architecture, Family
from resilin.planner.measure import measure_step_times
from resilin.planner.one_epoch import Plan, adjust_plan, make_plan
from resilin.planner.pilots import run_pilots
from resilin.planner.power_law import PowerLaw
from resilin.planner.regularisers import without_regularisers
from resilin.planner.rho import Mode, Rho, choose_rho
from resilin.planner.rows import Data
from resilin.planner.run_laws import run_law
from resilin.run.settings import RunSettings

Tell = Callable[[str], None]

DEFAULT_BATCH_TOKENS = 2**19  # half a million, usual at 100M parameters and beyond


class Bare(Settings):
    """What can be planned without a run's settings: the shape of the model alone."""

    model: DecoderSettings = Field(
        default=DecoderSettings(vocab_size=32768, hidden_size=768, layers=12, heads=12), validate_default=True
    )


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """The options of `resilin plan`; None and empty where the user said nothing."""

    file: Path | None = None
    overrides: tuple[str, ...] = ()
    flops: float | None = None
    hours: float | None = None
    tokens: float | None = None
    available_tokens: float | None = None
    duplicate_rate: float | None = None
    rho: str = "auto"
    mode: Mode = "practical"
    pilots: bool = False
    fits: tuple[Path, ...] = ()
    floor: bool = False
    batch_tokens: int | None = None
    keep_dropout: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """A plan and what belongs to it.

    Attributes:
        plan: the plan.
        overrides: further settings of it.
        notes: sentences for the user.
    """

    plan: Plan
    overrides: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Basis:
    """What the settings say: the base model, and the source where there is one."""

    run: RunSettings | None
    model: DecoderSettings
    sequence_length: int | None = None
    available: float | None = None
    duplicate_rate: float = 0.0


def _basis(request: PlanRequest) -> _Basis:
    if request.file is None:
        return _Basis(None, load_settings(Bare, None, request.overrides).model)
    from resilin.data.duplicates import duplicate_rate
    from resilin.data.settings import SourceContext

    run = load_settings(RunSettings, request.file, request.overrides)
    if not isinstance(run.model, DecoderSettings) or isinstance(run.model, HybridSettings):
        raise UserError(
            f"{request.file}: plans are made for decoders of alike blocks; model is a {type(run.model).__name__}"
        )
    source: Any = run.source.build(SourceContext(run.seed, "train", run.train.batch_size))
    model = run.model
    if not model.vocab_size and getattr(source, "vocab_size", None):
        model = model.model_copy(update={"vocab_size": source.vocab_size})
    length, order = getattr(source, "sequence_length", None), getattr(source, "order", None)
    rows = getattr(order, "epoch_length", None)
    available = None if rows is None or length is None else float(rows * length)
    shards = getattr(getattr(source, "stream", None), "shards", None)
    repeated = 0.0
    if shards is not None and request.duplicate_rate is None:
        repeated = duplicate_rate(shards, passage=_passage(shards)).rate
    return _Basis(run, model, length, available, repeated)


def _passage(shards: TokenShards) -> int:
    """Tokens of about 200 bytes, a power of two: shorter passages recur because they are common, not copied."""
    bytes_per_token = max(1.0, sum(shard.text_bytes for shard in shards.shards) / max(1, shards.token_count))
    return int(2 ** math.ceil(math.log2(max(1.0, 200 / bytes_per_token))))


def _rho_number(text: str) -> float | Literal["auto"]:
    if text == "auto":
        return "auto"
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise UserError(f"--rho {text}: should be auto or a positive number of tokens per parameter, such as 5 or 20")
    return value


def _batch_tokens(request: PlanRequest, basis: _Basis) -> int:
    if request.batch_tokens is not None:
        if request.batch_tokens < 1:
            raise UserError(f"--batch-tokens {request.batch_tokens}: should be at least 1")
        return request.batch_tokens
    if basis.run is not None and basis.sequence_length is not None:
        return basis.run.train.batch_size * basis.sequence_length
    return DEFAULT_BATCH_TOKENS


def _data(request: PlanRequest, basis: _Basis) -> Data:
    available, repeated = request.available_tokens, request.duplicate_rate
    if available is not None and not available > 0:
        raise UserError(f"--available-tokens {available:g}: should be positive")
    if repeated is not None and not 0 <= repeated < 1:
        raise UserError(f"--duplicate-rate {repeated:g}: is a share of the corpus, at least 0 and below 1")
    return Data(
        basis.available if available is None else available, basis.duplicate_rate if repeated is None else repeated
    )


def _with_settings(basis: _Basis, option: str) -> tuple[RunSettings, int]:
    if basis.run is None or basis.sequence_length is None:
        raise UserError(f"{option} needs a settings file: resilin plan run.toml {option}")
    return basis.run, basis.sequence_length


def _budget(request: PlanRequest, basis: _Basis, family: Family, batch_tokens: int, tell: Tell) -> Budget:
    for option, value in (("--flops", request.flops), ("--hours", request.hours), ("--tokens", request.tokens)):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UserError(f"{option} {value:g}: a budget should be positive")
    if request.flops is not None:
        return FlopBudget(request.flops)
    if request.tokens is not None:
        return TokenBudget(request.tokens)
    assert request.hours is not None
    run, length = _with_settings(basis, "--hours")
    if batch_tokens != run.train.batch_size * length:
        raise UserError("--batch-tokens cannot go with --hours: steps are timed with the settings' batch")
    times = measure_step_times(run, family, length, Architecture.of(basis.model).parameters, tell)
    return TimeBudget(request.hours * 3600, times, batch_tokens)


def _rho(request: PlanRequest, basis: _Basis, family: Family, budget: Budget, tell: Tell) -> Rho:
    rule = _rho_number(request.rho)
    if rule != "auto" or not request.pilots:
        return choose_rho(rule, request.mode)
    run, length = _with_settings(basis, "--pilots")
    pilots = run_pilots(run, family, budget, run.train.batch_size * length, tell)
    return choose_rho("auto", request.mode, pilots)


def _crossings(laws: dict[float, PowerLaw]) -> list[str]:
    """Where the fitted runs' losses meet, each size with the next larger one."""
    found = []
    for small, large in itertools.pairwise(sorted(laws)):
        tokens = laws[small].crossing(laws[large], 1e3, 1e16)
        pair = f"the laws of P = {short_number(small)} and {short_number(large)}"
        if tokens is None:
            found.append(f"{pair} do not cross: one is better all along")
        else:
            found.append(f"{pair} cross at {short_number(tokens)} tokens, loss {laws[small].loss(tokens):.4g}")
    return found


def answer_request(request: PlanRequest, adjust: bool, tell: Tell) -> Answer:
    """The plan that a user asked for.

    Args:
        request: the options; one budget is given, or `adjust`.
        adjust: spend what the settings' own run costs.
        tell: receives a line for each measurement.

    Raises:
        UserError: naming the option that cannot be used.
    """
    basis = _basis(request)
    family = Family(basis.model)
    batch_tokens = _batch_tokens(request, basis)
    data = _data(request, basis)
    overrides, notes = ((), ()) if basis.run is None else without_regularisers(basis.run, request.keep_dropout)
    dropout = basis.model.dropout if request.keep_dropout else None
    laws = dict(run_law(path, request.floor) for path in request.fits)
    if adjust:
        run, _ = _with_settings(basis, "--adjust")
        current = Architecture.of(basis.model)
        rho = choose_rho(_rho_number(request.rho), request.mode)
        before = current.parameters, run.train.steps * batch_tokens
        tell(f"now: {current.shape()}, P = {before[0]:,}, T = {before[1]:,}, T/P = {before[1] / before[0]:.3g}")
        plan = adjust_plan(current, run.train.steps, family, rho, batch_tokens, data, laws=laws, dropout=dropout)
    else:
        budget = _budget(request, basis, family, batch_tokens, tell)
        rho = _rho(request, basis, family, budget, tell)
        plan = make_plan(budget, family, rho, batch_tokens, data, laws=laws, dropout=dropout)
    notes = (*notes, *_crossings(laws))
    others = tuple(item for item in overrides if not item.startswith("model.dropout"))
    return Answer(plan, others, notes)
