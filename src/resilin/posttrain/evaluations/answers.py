"""A model's answers to many prompts, kept on disk as they are written: a killed evaluation goes on where it was.

An answer depends on its prompt, the settings of writing and its own number, and not on the answers it was written
beside; so what was kept and what is written later are the same as all of it written at once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from resilin.inference.generate import StopRule, generate
from resilin.inference.sampling import Sampling
from resilin.posttrain.evaluations.evaluation import Progress, Subject


@dataclass(frozen=True, slots=True)
class Written:
    """One answer.

    Attributes:
        text: without special tokens and stop string.
        tokens: its ids.
        reason: why it ended, as `resilin.inference.generate.Reason` says.
    """

    text: str
    tokens: tuple[int, ...]
    reason: str

    @property
    def cut(self) -> bool:
        """Whether it ended for want of room."""
        return self.reason in ("max_new_tokens", "max_positions")


class AnswerFile:
    """Answers by (prompt, sample), one JSON line each.

    Args:
        path: made with the first answer. Lines that cannot be read (the last one of a killed process) are passed over.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kept: dict[tuple[int, int], Written] = {}
        self._whole = True
        if path.is_file():
            raw = path.read_bytes()
            self._whole = raw.endswith(b"\n") or not raw
            for line in raw.split(b"\n"):
                self._read(line)

    def _read(self, line: bytes) -> None:
        try:
            value = json.loads(line)
            written = Written(str(value["text"]), tuple(map(int, value["tokens"])), str(value["ended_by"]))
            self.kept[int(value["prompt"]), int(value["sample"])] = written
        except (ValueError, KeyError, TypeError):
            return

    def add(self, answers: Sequence[tuple[tuple[int, int], Written]]) -> None:
        """Keep some answers; on disk when this returns."""
        lines = [] if self._whole else [""]
        for (prompt, sample), one in answers:
            value = {"prompt": prompt, "sample": sample, "text": one.text, "tokens": one.tokens, "ended_by": one.reason}
            lines.append(json.dumps(value, ensure_ascii=True))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as stream:
            stream.write(("\n".join(lines) + "\n").encode())
            stream.flush()
            os.fsync(stream.fileno())
        self._whole = True
        self.kept.update(answers)


def answers_digest(
    subject: Subject, prompts: Sequence[Sequence[int]], stop: StopRule, sampling: Sampling, samples: int
) -> str:
    """A hash of everything that decides the answers."""
    how = [subject.weights, subject.tokenizer.digest, stop.max_new_tokens, sorted(stop.ids), stop.strings, samples]
    digest = hashlib.sha256(json.dumps([*how, sampling.model_dump(mode="json")]).encode())
    for prompt in prompts:
        digest.update(json.dumps(list(prompt)).encode())
    return digest.hexdigest()


def write_answers(
    subject: Subject,
    prompts: Sequence[Sequence[int]],
    stop: StopRule,
    sampling: Sampling,
    samples: int,
    file: AnswerFile,
    progress: Progress,
) -> list[list[Written]]:
    """`samples` answers to each prompt, in order; those that the file holds are not written again.

    Args:
        subject: who writes.
        prompts: token ids.
        stop: when an answer ends.
        sampling: how tokens are chosen; draws are keyed by prompt and sample.
        samples: answers to each prompt.
        file: holds answers of the same `answers_digest`.
        progress: told after each batch.
    """
    wanted = [(number, sample) for number in range(len(prompts)) for sample in range(samples)]
    missing = [key for key in wanted if key not in file.kept]
    missing.sort(key=lambda key: (-len(prompts[key[0]]), key))  # rows of similar length go together
    for start in range(0, len(missing), subject.batch_rows):
        progress(1 - (len(missing) - start) / max(1, len(wanted)))
        batch = missing[start : start + subject.batch_rows]
        answers = generate(
            subject.model,
            [prompts[number] for number, _ in batch],
            stop,
            sampling=sampling,
            tokenizer=subject.tokenizer,
            rows=[number * samples + sample for number, sample in batch],
            batch_rows=subject.batch_rows,
        )
        file.add([(key, Written(a.text, tuple(a.tokens), a.reason)) for key, a in zip(batch, answers, strict=True)])
    progress(1.0)
    return [[file.kept[number, sample] for sample in range(samples)] for number in range(len(prompts))]
