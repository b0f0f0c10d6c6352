"""What answers a request: an endpoint, a script, a recording, or a model in this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from resilin.teacher.request import Request, Sample, TeacherError


class BackendError(Exception):
    """A call that gave no answer.

    Attributes:
        again: whether the same call may succeed later.
        after: seconds to wait first, where the endpoint said so.
        everything: no other call will succeed either (a wrong key, a wrong address).
    """

    def __init__(self, what: str, *, again: bool, after: float | None = None, everything: bool = False) -> None:
        super().__init__(what)
        self.again = again
        self.after = after
        self.everything = everything


class UnknownRequestError(TeacherError):
    """A strict recording has no answer to a request."""


class Backend(Protocol):
    """Answers one request."""

    async def send(self, request: Request, samples: Sequence[int]) -> list[Sample]:
        """Answers for these sample numbers of a request: at least one, at most as many as asked for.

        Raises:
            BackendError: there is none.
        """


Script = Callable[[Request, int], str | Sample] | Mapping[str, str | Sequence[str]]
"""A function of (request, sample number), or a table from the last message's text to the answer or answers."""


class Scripted:
    """Answers that are written down: for tests, and for judges that are rules."""

    def __init__(self, script: Script) -> None:
        self.script = script

    async def send(self, request: Request, samples: Sequence[int]) -> list[Sample]:
        """What the script says."""
        return [self._one(request, sample) for sample in samples]

    def _one(self, request: Request, sample: int) -> Sample:
        if isinstance(self.script, Mapping):
            asked = request.messages[-1]["content"]
            if asked not in self.script:
                raise BackendError(f"the script has no answer to {asked[:60]!r}", again=False)
            answers = self.script[asked]
            said: str | Sample = answers if isinstance(answers, str) else answers[sample % len(answers)]
        else:
            said = self.script(request, sample)
        return said if isinstance(said, Sample) else Sample(said)


class Silent:
    """Answers nothing: behind a cache, only what was recorded is known."""

    def __init__(self, path: str, strict: bool) -> None:
        self.path = path
        self.strict = strict

    async def send(self, request: Request, samples: Sequence[int]) -> list[Sample]:
        """Always an error."""
        asked = request.messages[-1]["content"][:60]
        what = f"{self.path}: no recorded answer {samples[0]} to the request {request.tag!r} that ends with {asked!r}"
        if self.strict:
            raise UnknownRequestError(f"{what}; record it again, or set strict=False")
        raise BackendError(what, again=False)
