"""Several answers to each prompt from a pool of models, one of them always the one that is to be trained.

As UltraFeedback (Cui et al. 2024) and Tülu 3 (Lambert et al. 2024, section 5.2) draw them: preferences then compare
what the model does itself with what others do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field, model_validator

from resilin.config import Settings, component
from resilin.data.row_files import Row
from resilin.keys import hash64
from resilin.posttrain.completions import prompt_messages
from resilin.teacher.chat import ChatTeacher
from resilin.teacher.endpoint import TeacherSettings
from resilin.teacher.request import Plan, Request

_Teacher = Annotated[TeacherSettings, component("resilin.teacher.endpoint:EndpointTeacher")]
TeacherOf = Callable[[str], tuple[ChatTeacher, str]]
"""By a model's name in the pool: its teacher, and what requests call the model."""


class ModelPool(Settings):
    """The models that answer."""

    own: str
    """The name of the one that is to be trained: it answers every prompt."""
    models: Annotated[dict[str, _Teacher], Field(min_length=1)]
    """By name: endpoints, or models in this process (`use = "resilin.posttrain.local_teacher:LocalTeacher"`)."""
    count: Annotated[int, Field(ge=2)] = 4
    """Answers to each prompt. A pool of fewer models gives several of one, the own one first."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Of sampling."""
    max_tokens: Annotated[int, Field(ge=1)] = 2048
    """Of an answer."""
    system: str | None = None
    """A system message for prompts that have none."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the draws: which models answer which prompt."""

    @model_validator(mode="after")
    def _own_is_there(self) -> ModelPool:
        if self.own not in self.models:
            raise ValueError(f"own = {self.own!r} is none of the models: {', '.join(self.models)}")
        if self.temperature == 0 and len(self.models) < self.count:
            raise ValueError(
                f"count = {self.count} of {len(self.models)} models at temperature 0: a model would give one answer "
                "several times; raise temperature or add models"
            )
        return self

    def teacher_of(self, name: str) -> tuple[ChatTeacher, str]:
        """A model's teacher, built anew: models in this process need not be in memory together."""
        settings = self.models[name]
        return settings.build(), settings.model_name()


@dataclass(slots=True)
class Responses:
    """Rows with answers, and what is missing.

    Attributes:
        rows: with `responses`, objects of model and text.
        failures: (place, reason) of answers that could not be had; asking again asks only for these.
        dropped: prompts without two answers, or without one of the own model, by reason.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)


def draw_models(prompt: str, pool: Sequence[str], own: str, count: int, seed: int = 0) -> list[str]:
    """Which models answer a prompt: the one to be trained, and others of the pool drawn without replacement.

    Where the pool has fewer than `count`, they go round again in the same order.
    """
    others = sorted({name for name in pool if name != own}, key=lambda name: hash64(seed, "pool", prompt, name))
    names = [own, *others]
    return [names[number % len(names)] for number in range(count)]


def response_requests(rows: Sequence[Row], pool: ModelPool) -> dict[str, list[tuple[int, Request]]]:
    """What each model is asked: (number of the row, request); the request's model name is left open.

    Raises:
        DataError: with file and line, for a row without a prompt.
    """
    asked: dict[str, list[tuple[int, Request]]] = {name: [] for name in pool.models}
    for number, row in enumerate(rows):
        messages = tuple(prompt_messages(row, pool.system))
        drawn = draw_models(messages[-1]["content"], list(pool.models), pool.own, pool.count, pool.seed)
        for name in dict.fromkeys(drawn):
            how: dict[str, Any] = {"temperature": pool.temperature, "max_tokens": pool.max_tokens, "seed": pool.seed}
            asked[name].append((number, Request(messages, n=drawn.count(name), tag=row.where, **how)))
    return asked


def plan_responses(rows: Sequence[Row], pool: ModelPool, teacher_of: TeacherOf | None = None) -> dict[str, Plan]:
    """What `respond` would cost, by model."""
    plans = {}
    for name, asked in response_requests(rows, pool).items():
        teacher, model = (teacher_of or pool.teacher_of)(name)
        plans[name] = teacher.plan([_named(request, model) for _, request in asked])
    return plans


def respond(rows: Sequence[Row], pool: ModelPool, teacher_of: TeacherOf | None = None) -> Responses:
    """Answers to every prompt, each model in turn: rows for `resilin.posttrain.judge.read_candidates`.

    Args:
        rows: prompts, in any form `resilin.data.prompt_rows` reads.
        pool: who answers.
        teacher_of: gives a model's teacher; None builds those of the pool.

    Raises:
        DataError: with file and line, for a row without a prompt.
    """
    found = Responses()
    given: dict[tuple[int, str], list[str]] = {}
    for name, asked in response_requests(rows, pool).items():
        if not asked:
            continue
        teacher, model = (teacher_of or pool.teacher_of)(name)
        replies = teacher.ask([_named(request, model) for _, request in asked])
        for (number, request), reply in zip(asked, replies, strict=True):
            if reply.error is not None:
                found.failures.append((request.tag, f"{name}: {reply.error}"))
            given[number, name] = [text.strip() for text in reply.texts if text.strip()]
    for number, row in enumerate(rows):
        answers = [{"model": m, "text": text} for m in pool.models for text in given.get((number, m), ())]
        if not given.get((number, pool.own)):
            found.dropped["without an answer of the own model"] += 1
        elif len(answers) < 2:
            found.dropped["with a single answer"] += 1
        else:
            found.rows.append({**row.value, "responses": answers})
    return found


def _named(request: Request, model: str) -> Request:
    kept: Mapping[str, Any] = {name: getattr(request, name) for name in Request.__dataclass_fields__}
    return Request(**{**kept, "model": model})
