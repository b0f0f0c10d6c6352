"""A teacher that is a model in this process: the same requests, answered by Resilin's own generation."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from resilin.config.errors import UserError
from resilin.data.prompt_source import end_of_turn
from resilin.data.stored_tokenizer import stored_tokenizer
from resilin.data.tokenizer import Tokenizer
from resilin.inference.generate import StopRule, check_prompts, generate
from resilin.inference.sampling import Sampling
from resilin.models.decoder import Decoder
from resilin.models.digest import weights_digest
from resilin.models.pretrained import Pretrained
from resilin.models.settings import ModelContext
from resilin.models.weight_files import ModelFolderError
from resilin.teacher.backend import BackendError
from resilin.teacher.chat import ChatTeacher
from resilin.teacher.endpoint import TeacherSettings
from resilin.teacher.request import Request, Sample

_Waiting = tuple[Request, int, asyncio.Future[Sample]]


class LocalBackend:
    """Requests that arrive together are generated together.

    Draws are keyed by the request and the sample's number, so an answer does not depend on what it was batched with.

    Args:
        model: the decoder.
        tokenizer: its tokenizer, whose chat template is used.
        end_ids: tokens that end an answer; None: the end of the text and of the chat template's turn.
        batch_rows: rows at a time.
    """

    def __init__(
        self, model: Decoder, tokenizer: Tokenizer, end_ids: frozenset[int] | None = None, *, batch_rows: int = 32
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        if end_ids is None:
            end_ids = end_of_turn(tokenizer) | (frozenset() if tokenizer.eos_id is None else {tokenizer.eos_id})
        self.end_ids = end_ids
        self.batch_rows = batch_rows
        self._waiting: list[_Waiting] = []

    async def send(self, request: Request, samples: Sequence[int]) -> list[Sample]:
        """The answers, after those who ask at the same time have asked."""
        loop = asyncio.get_running_loop()
        mine: list[asyncio.Future[Sample]] = [loop.create_future() for _ in samples]
        if not self._waiting:
            loop.call_soon(self._flush)
        self._waiting += [(request, sample, future) for sample, future in zip(samples, mine, strict=True)]
        return list(await asyncio.gather(*mine))

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        groups: dict[tuple[object, ...], list[_Waiting]] = {}
        for item in waiting:
            request = item[0]
            try:
                check_prompts(self.model, [self._prompt(request)])
            except UserError as error:  # a prompt that is too long, or messages the template refuses
                item[2].set_exception(BackendError(str(error), again=False))
                continue
            how = (request.temperature, request.top_p, request.max_tokens, request.seed, request.stop)
            groups.setdefault(how, []).append(item)
        for group in groups.values():
            try:
                answers = self._generate(group)
            except Exception as error:  # every request of the group hears of it
                for _, _, future in group:
                    future.set_exception(error)
                continue
            for (_, _, future), answer in zip(group, answers, strict=True):
                future.set_result(answer)

    def _prompt(self, request: Request) -> list[int]:
        return self.tokenizer.chat(list(request.messages), add_generation_prompt=True).ids

    def _generate(self, group: Sequence[_Waiting]) -> list[Sample]:
        first = group[0][0]
        prompts = [self._prompt(request) for request, _, _ in group]
        written = generate(
            self.model,
            prompts,
            StopRule(first.max_tokens, self.end_ids, first.stop),
            sampling=Sampling(temperature=first.temperature, top_p=first.top_p, seed=first.seed or 0),
            tokenizer=self.tokenizer,
            rows=[int(request.key(sample)[:7], 16) for request, sample, _ in group],
            batch_rows=self.batch_rows,
        )
        return [
            Sample(
                answer.text,
                "stop" if answer.reason in ("stop_token", "stop_string") else "length",
                tuple(answer.logprobs) if request.logprobs else None,
                len(prompt),
                len(answer.tokens),
            )
            for (request, _, _), prompt, answer in zip(group, prompts, written, strict=True)
        ]


class LocalTeacher(TeacherSettings):
    """A model from a Hugging Face folder or a .gguf file."""

    path: Path
    """The folder or file."""
    tokenizer: Path | None = None
    """A tokenizer in place of the model's own."""
    cache: Path | None = Path(".cache/resilin/local.jsonl")
    """Where answers are kept, in a file named by the weights: a model that is trained further answers anew. `null` in
    a JSON file keeps them nowhere."""
    batch_rows: Annotated[int, Field(ge=1)] = 32
    """Answers that are generated together."""

    def build(self) -> ChatTeacher:
        """The teacher.

        Raises:
            ModelFolderError: there is no such model.
            DataError: it has no tokenizer.
        """
        model = Pretrained(path=self.path).build(ModelContext(0, None))
        if not isinstance(model, Decoder):
            raise ModelFolderError(f"{self.path}: is no decoder, which alone can write text")
        tokenizer = stored_tokenizer(self.path) if self.tokenizer is None else Tokenizer.load(self.tokenizer)
        cache = self.cache
        if cache is not None:
            cache = cache.with_stem(f"{cache.stem}-{weights_digest(model)[:8]}{tokenizer.digest[:8]}")
        backend = LocalBackend(model.eval(), tokenizer, batch_rows=self.batch_rows)
        return ChatTeacher(backend, cache=cache, max_concurrency=4 * self.batch_rows, tries=1)

    def model_name(self) -> str:
        """The path."""
        return str(self.path)
