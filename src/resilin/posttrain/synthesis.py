"""Training rows for a skill that has no data: a teacher invents tasks for many personas, and solves them.

Asked for a hundred tasks, a model writes variations of a few; asked for one task that a given persona would bring, it
writes as many as there are personas (Ge et al. 2024, "Scaling synthetic data creation with 1,000,000,000 personas";
Tülu 3, Lambert et al. 2024, section 4.2). Two rounds: the task, then its answer. What can be checked is: several
answers vote for the truth of a mathematical task, and a constraint on the form is checked by its program.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from resilin.data.row_template import fill
from resilin.keys import hash64
from resilin.posttrain.constraints import Constraint
from resilin.posttrain.filters import AnswerFilters, plain_key
from resilin.posttrain.synthesis_settings import Synthesis, SynthesisTask
from resilin.posttrain.verifiers import find_verifier
from resilin.posttrain.verifiers.ifeval_checks import check_constraint
from resilin.posttrain.verifiers.verifier import Answer, Verifier
from resilin.teacher.chat import ChatTeacher
from resilin.teacher.request import Message, Plan, Reply, Request, message


@dataclass(frozen=True, slots=True)
class Asking:
    """A task that is asked for.

    Attributes:
        task: its kind.
        persona: for whom.
        sample: which of several for this persona.
        constraint: on the form of the answer.
    """

    task: SynthesisTask
    persona: str
    sample: int
    constraint: Constraint | None


@dataclass(slots=True)
class Synthesised:
    """Rows, and what gave none.

    Attributes:
        rows: `messages`, `source`, `persona`; with truth and constraint where there are some.
        dropped: by reason.
        failures: (place, reason) of requests without an answer; asking again asks only for these.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Teachers:
    """Who invents tasks and who solves them, each with the name its endpoint has for the model."""

    asks: ChatTeacher
    asks_model: str
    solves: ChatTeacher
    solves_model: str


def askings(settings: Synthesis, personas: Sequence[str]) -> list[Asking]:
    """Every task that is asked for: kind by kind, persona by persona.

    What a persona is asked does not depend on the others: more personas leave what was asked before as it was.
    """
    made = []
    for task in settings.tasks:
        for persona in personas:
            for sample in range(task.per_persona):
                constraint = None
                if task.constrained:
                    drawn = hash64(settings.seed, "constraint", task.name, persona, sample)
                    constraint = task.constraints[drawn % len(task.constraints)]
                made.append(Asking(task, persona, sample, constraint))
    return made


def task_requests(asked: Sequence[Asking], model: str) -> list[Request]:
    """The first round. A persona's further tasks differ in their seed alone."""
    made = []
    for one in asked:
        columns = {"persona": one.persona, "constraint": "" if one.constraint is None else one.constraint.text}
        made.append(
            Request(
                _messages(one.task, fill(one.task.prompt, columns)),
                model,
                temperature=one.task.temperature,
                max_tokens=one.task.max_task_tokens,
                seed=one.sample if one.task.per_persona > 1 else None,
                tag=f"{one.task.name}: {one.persona[:60]}",
            )
        )
    return made


def _messages(task: SynthesisTask, text: str) -> tuple[Message, ...]:
    asked = message("user", text)
    return (asked,) if task.system is None else (message("system", task.system), asked)


def written_task(one: Asking, reply: Reply) -> tuple[str, str | None]:
    """The task a reply holds, and why it is left out (None where it is kept)."""
    text = reply.text.strip()
    if reply.finish_reasons[0] == "length":
        return text, "task: cut"
    start = one.task.starts_with
    if start:
        at = text.lower().find(start.lower())
        if at < 0:
            return text, f"task: without {start!r}"
        text = text[at + len(start) :].strip(" \n*")
    reason = AnswerFilters(min_words=one.task.min_task_words).reason(text)
    if reason is not None:
        return text, f"task: {reason}"
    if one.constraint is not None and one.constraint.text not in text:
        text = f"{text} {one.constraint.text}"
    return text, None


def answer_request(one: Asking, text: str, model: str) -> Request:
    """The second round: the answer, or several that vote."""
    return Request(
        _messages(one.task, fill(one.task.answer, {"task": text})),
        model,
        temperature=one.task.answer_temperature,
        max_tokens=one.task.max_tokens,
        n=one.task.votes,
        tag=f"{one.task.name}: {one.persona[:60]}: answer",
    )


def vote(verifier: Verifier, texts: Sequence[str]) -> tuple[str, list[int]] | None:
    """The label that most texts claim, and which of them are right by it; None where none claims anything.

    Labels that the verifier takes for equal count together; of equal numbers of votes the label that came first wins.
    """
    labels = list(dict.fromkeys(label for text in texts if (label := verifier.claimed(text)) is not None))
    voters = {}
    for label in labels:
        scores = verifier.scores([Answer((), text, label) for text in texts])
        voters[label] = [number for number, score in enumerate(scores) if score >= 1.0]
    best = max(labels, key=lambda label: len(voters[label]), default=None)
    return None if best is None or not voters[best] else (best, voters[best])


def made_row(one: Asking, text: str, reply: Reply) -> tuple[dict[str, Any], str | None]:
    """The row of a task and its answers, and why it is left out (None where it is kept)."""
    task, chosen = one.task, 0
    row: dict[str, Any] = {"source": task.name, "persona": one.persona}
    if task.verifier is not None:
        found = vote(find_verifier(task.verifier), reply.texts)
        if found is None:
            return row, "answer: names no result"
        truth, right = found
        share = len(right) / len(reply.texts)
        if share < task.agreement:
            return row, "answer: the votes do not agree"
        kept = [n for n in right if task.filters.reason(reply.texts[n], reply.finish_reasons[n]) is None]
        chosen = (kept or right)[0]
        row |= {"ground_truth": truth, "dataset": task.verifier, "agreement": share}
    said = reply.texts[chosen].strip()
    reason = task.filters.reason(said, reply.finish_reasons[chosen])
    if reason is not None:
        return row, f"answer: {reason}"
    if one.constraint is not None:
        check, arguments = check_constraint(one.constraint.check)
        if not check(said, **arguments):
            return row, "answer: does not follow the constraint"
        row |= {
            "ground_truth": json.dumps(one.constraint.check, ensure_ascii=False),
            "dataset": "ifeval",
            "constraint_type": one.constraint.check["func_name"],
            "constraint": one.constraint.text,
        }
    return {"messages": [message("user", text), message("assistant", said)], **row}, None


def plan_synthesis(settings: Synthesis, personas: Sequence[str], teachers: Teachers) -> tuple[Plan, Plan]:
    """What both rounds would cost; tasks that are not known yet are taken to be as long as they may be."""
    asked = askings(settings, personas)
    requests = task_requests(asked, teachers.asks_model)
    first = teachers.asks.plan(requests)
    known: list[Request] = []
    unknown = tokens = completion = 0
    for one, request in zip(asked, requests, strict=True):
        reply = teachers.asks.known(request)
        if reply is None:
            unknown += 1
            tokens += answer_request(one, "", "").prompt_tokens + one.task.max_task_tokens
            completion += one.task.max_tokens * one.task.votes
            continue
        text, reason = written_task(one, reply)
        if reason is None:
            known.append(answer_request(one, text, teachers.solves_model))
    second = teachers.solves.plan(known)
    return first, Plan(
        second.requests + unknown,
        second.calls + unknown,
        second.cached,
        second.prompt_tokens + tokens,
        second.completion_tokens + completion,
        (teachers.solves_model,),
    )


def synthesise(settings: Synthesis, personas: Sequence[str], teachers: Teachers) -> Synthesised:
    """Rows for every kind of task and persona, in that order; equal tasks are kept once.

    Args:
        settings: the kinds of task.
        personas: for whom.
        teachers: who invents and who solves.
    """
    found = Synthesised()
    asked = askings(settings, personas)
    tasks: list[tuple[Asking, str]] = []
    seen: set[str] = set()
    replies = teachers.asks.ask(task_requests(asked, teachers.asks_model))
    for one, reply in zip(asked, replies, strict=True):
        if reply.error is not None:
            found.failures.append((reply.tag, reply.error))
            continue
        text, reason = written_task(one, reply)
        key = plain_key([text])
        if reason is None and key in seen:
            reason = "task: a duplicate"
        if reason is not None:
            found.dropped[reason] += 1
            continue
        seen.add(key)
        tasks.append((one, text))
    requests = [answer_request(one, text, teachers.solves_model) for one, text in tasks]
    for (one, text), reply in zip(tasks, teachers.solves.ask(requests), strict=True):
        if reply.error is not None:
            found.failures.append((reply.tag, reply.error))
            continue
        row, reason = made_row(one, text, reply)
        if reason is not None:
            found.dropped[reason] += 1
        else:
            found.rows.append(row)
    return found
