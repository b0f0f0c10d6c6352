"""`resilin generate`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resilin.cli.model_options import ModelArgument, ModelOptions
from resilin.cli.option_groups import with_option_groups
from resilin.config.errors import UserError

if TYPE_CHECKING:
    from resilin.data.tokenizer import Tokenizer
    from resilin.inference.generate import Continuation, StopRule
    from resilin.inference.sampling import Sampling
    from resilin.inference.speculative import Speculation
    from resilin.models.decoder import Decoder
    from resilin.nested.budgets import Budget
    from resilin.run.open_model import OpenedModel

HOW, WHAT, SIZE = "How to choose", "What to write", "A part of a nested model"


def _prompts(prompt: list[str] | None, prompt_file: list[Path] | None) -> list[str]:
    """The prompts of the command line; piped text where it names none."""
    from resilin.evaluate.perplexity import read_text

    prompts = [*(prompt or ()), *(read_text(path) for path in prompt_file or ())]
    if prompts:
        return prompts
    if sys.stdin.isatty():
        raise UserError("nothing to continue: give --prompt TEXT, pipe a text in, or talk with --chat")
    return [sys.stdin.read()]


def _report(answers: list[Continuation], seconds: float) -> None:
    tokens = sum(len(answer.tokens) for answer in answers)
    ends = ", ".join(sorted({answer.reason.replace("_", " ") for answer in answers}))
    rate = f"{tokens / seconds:.1f} tokens/s" if seconds > 0 else ""
    typer.secho(f"[{tokens} tokens, {rate}; ended by: {ends}]", err=True, dim=True)


@dataclass(frozen=True)
class _Asked:
    """What is to be written.

    Attributes:
        model: that writes.
        tokenizer: its own.
        prompts: token ids of each.
        shown: the text of each that stands before its answer.
        stop: when an answer ends.
        sampling: how tokens are chosen.
    """

    model: Decoder
    tokenizer: Tokenizer
    prompts: list[list[int]]
    shown: list[str]
    stop: StopRule
    sampling: Sampling


def _write(asked: _Asked) -> list[Continuation]:
    """Generate, writing the first unfinished answer as it grows and the others as their turn comes."""
    from resilin.inference.generate import Continuation, stream

    prompts, headed = asked.prompts, len(asked.prompts) > 1
    answers = [Continuation() for _ in prompts]
    waiting = [""] * len(prompts)
    done = [False] * len(prompts)
    current = 0

    def begin(row: int) -> None:
        if headed:
            typer.secho(f"── {row + 1} of {len(prompts)} " + "─" * 40, dim=True)
        typer.secho(asked.shown[row], nl=False, dim=True)

    begin(0)
    for piece in stream(asked.model, prompts, asked.stop, sampling=asked.sampling, tokenizer=asked.tokenizer):
        answer = answers[piece.row]
        answer.tokens.append(piece.token)
        answer.logprobs.append(piece.logprob)
        answer.text += piece.text
        waiting[piece.row] += piece.text
        if piece.reason is not None:
            answer.reason, done[piece.row] = piece.reason, True
        while current < len(prompts) and (piece.row == current or done[current]):
            typer.echo(waiting[current], nl=False)
            waiting[current] = ""
            if not done[current]:
                break
            typer.echo("")
            current += 1
            if current < len(prompts):
                begin(current)
        sys.stdout.flush()
    return answers


def _chat(
    model: Decoder, tokenizer: Tokenizer, system: str | None, stop: StopRule, sampling: Sampling, first: list[str]
) -> None:
    """Talk until the input ends; Ctrl-C ends only the answer that is being written."""
    from resilin.inference.generate import stream

    messages = [{"role": "system", "content": system}] if system else []
    if not first and sys.stdin.isatty():
        typer.secho("Talk to the model; /new forgets the conversation, Ctrl-D leaves.", err=True, dim=True)
    pending = list(first)
    while pending or not first:
        try:
            said = pending.pop(0) if pending else input("> " if sys.stdin.isatty() else "")
        except EOFError:
            break
        if said.strip() == "/new":
            messages = messages[:1] if system else []
            continue
        if not said.strip():
            continue
        messages.append({"role": "user", "content": said})
        ids = list(tokenizer.chat(messages, add_generation_prompt=True).ids)
        answer = ""
        try:
            for piece in stream(model, [ids], stop, sampling=sampling, tokenizer=tokenizer):
                answer += piece.text
                typer.echo(piece.text, nl=False)
                sys.stdout.flush()
        except KeyboardInterrupt:
            if first:
                raise
        typer.echo("")
        messages.append({"role": "assistant", "content": answer})


def _as_json(prompt: str, sample: int, answer: Continuation) -> str:
    line = {
        "prompt": prompt,
        "sample": sample,
        "text": answer.text,
        "ended_by": answer.reason,
        "tokens": answer.tokens,
        "logprobs": answer.logprobs,
    }
    return json.dumps(line, ensure_ascii=False)


MTP = "mtp"
Drafted = Callable[["Sampling", list[int]], "Speculation"]
"""(how tokens are chosen, prompt) -> its answer, drafted and verified."""


def _drafted(asked: _Asked, opened: OpenedModel, verifier: Budget | None, draft: Budget | None, ahead: int) -> Drafted:
    """How answers are drafted: by a part of the model; None: by its modules for tokens further on.

    Raises:
        UserError: there are no such modules.
    """
    from resilin.inference.speculative import Speculation
    from resilin.nested.speculative import speculate

    stop = asked.stop
    if draft is not None:
        return lambda how, prompt: speculate(
            asked.model, prompt, draft, stop.max_new_tokens, verifier, ahead, how, stop.ids
        )
    from resilin.modalities.model import GroupDecoder
    from resilin.modalities.mtp_draft import MtpDraft
    from resilin.run.open_model import open_trained

    if verifier is not None:
        raise UserError(f"--draft {MTP} verifies with the whole model: leave out --budget")
    if opened.run is None:
        raise UserError(
            f"--draft {MTP} needs the modules for tokens further on, which exports leave out: name the folder of a run"
        )
    trained = open_trained(opened.run.path, opened.step)
    if not isinstance(trained, GroupDecoder):
        raise UserError(
            f"{opened.description} has no modules for tokens further on (model.mtp): --draft {MTP} needs them"
        )
    weight = asked.model.embed.weight
    proposing = MtpDraft(trained.to(weight.device, weight.dtype))
    return lambda how, prompt: Speculation(trained.inner, prompt, proposing, stop.max_new_tokens, ahead, how, stop.ids)


def _speculate(asked: _Asked, drafted: Drafted) -> None:
    """Write one answer after the other, drafted and verified; tell how many drafts were kept."""
    stop = asked.stop
    began, written, proposed, accepted = time.perf_counter(), 0, 0, 0
    for row, (prompt, text) in enumerate(zip(asked.prompts, asked.shown, strict=True)):
        typer.secho(text, nl=False, dim=True)
        own = asked.sampling.model_copy(update={"seed": asked.sampling.seed + row})
        answer = drafted(own, prompt)
        words = asked.tokenizer.stream_decoder()
        for token in answer:
            written += 1
            if token not in stop.ids:
                typer.echo(words.step(token), nl=False)
                sys.stdout.flush()
        typer.echo(words.finish())
        proposed, accepted = proposed + answer.drafts.proposed, accepted + answer.drafts.accepted
    seconds = time.perf_counter() - began
    kept = f"{accepted} of {proposed} drafted tokens kept"
    typer.secho(f"[{written} tokens, {written / seconds:.1f} tokens/s; {kept}]", err=True, dim=True)


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How tokens are chosen."""

    temperature: Annotated[
        float, typer.Option(min=0.0, help="0: always the most probable token.", rich_help_panel=HOW)
    ] = 0.8
    top_k: Annotated[int, typer.Option(min=0, help="Only the k most probable tokens; 0: all.", rich_help_panel=HOW)] = 0
    top_p: Annotated[
        float, typer.Option(help="Only the most probable tokens that reach this probability.", rich_help_panel=HOW)
    ] = 0.95
    min_p: Annotated[
        float, typer.Option(help="Only tokens this fraction as probable as the best one.", rich_help_panel=HOW)
    ] = 0.0
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: tokens used before become less probable.", rich_help_panel=HOW)
    ] = 1.0
    seed: Annotated[int, typer.Option(min=0, help="The same seed writes the same text.", rich_help_panel=HOW)] = 0

    def settings(self) -> Sampling:
        """As the generator takes them.

        Raises:
            SettingsError: naming what is out of range.
        """
        from resilin.config import parse_settings
        from resilin.inference.sampling import Sampling

        return parse_settings(Sampling, asdict(self), "generate")


def _parts(model: Decoder, budget: str | None, draft: str | None) -> tuple[Budget | None, Budget | None]:
    """The part of the model that writes, and the one that proposes.

    Raises:
        BudgetError: one does not fit the model.
    """
    from resilin.nested.budgets import Budget
    from resilin.nested.sub_model import sub_model

    part, proposing = (None if text in (None, MTP) else Budget.parse(text) for text in (budget, draft))
    for one in (part, proposing):
        if one is not None:
            sub_model(model.settings, one)
    return part, proposing


def _ids_of(words: Tokenizer, text: str, chat: bool, system: str | None) -> list[int]:
    from resilin.inference.prompts import prompt_tokens

    if not chat:
        return prompt_tokens(words, text)
    before = [{"role": "system", "content": system}] if system else []
    return list(words.chat([*before, {"role": "user", "content": text}], add_generation_prompt=True).ids)


@with_option_groups
def generate(
    model: ModelArgument,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="Text to continue; may be given several times.", rich_help_panel=WHAT),
    ] = None,
    prompt_file: Annotated[
        list[Path] | None, typer.Option(help="A text file to continue.", rich_help_panel=WHAT)
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat", help="Talk: prompts are messages, put into the model's chat form.", rich_help_panel=WHAT
        ),
    ] = False,
    system: Annotated[str | None, typer.Option(help="With --chat: the system message.", rich_help_panel=WHAT)] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="At most so many tokens.", rich_help_panel=WHAT)
    ] = 256,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="End before this text; may be given several times.", rich_help_panel=WHAT),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Answers to each prompt.", rich_help_panel=WHAT)] = 1,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line for each answer.", rich_help_panel=WHAT)
    ] = False,
    budget: Annotated[
        str | None,
        typer.Option(help="Write with this part of the model: a JSON file, or ffn=512,skip=3+4.", rich_help_panel=SIZE),
    ] = None,
    draft: Annotated[
        str | None,
        typer.Option(
            help="Let this smaller part, or mtp: modules for tokens further on, propose tokens that the model, or "
            "--budget, verifies: the same text, sooner.",
            rich_help_panel=SIZE,
        ),
    ] = None,
    ahead: Annotated[
        int, typer.Option(min=1, help="With --draft: tokens proposed at a time.", rich_help_panel=SIZE)
    ] = 4,
    *,
    choosing: SamplingOptions,
    opening: ModelOptions,
) -> None:
    """Write text with a trained model: continue prompts, or talk.

    MODEL is the folder of a run, one of its checkpoints, a Hugging Face folder, or a .gguf file.

    \b
    resilin generate runs/shakespeare -p "To be, or not to be"
    resilin generate runs/shakespeare -p "ROMEO." --temperature 0  most probable
    resilin generate runs/shakespeare -p "ROMEO." --samples 4      four answers
    resilin generate SmolLM2.gguf --chat                           talk
    resilin generate SmolLM2.gguf --chat -p "What is rust?" -n 80  one answer
    cat a.txt | resilin generate my-model --stop "\\n\\n" --json    for scripts
    resilin generate runs/nested -p "ROMEO." --budget ffn=128      a part of it
    resilin generate runs/nested -p "ROMEO." --draft ffn=128       draft and verify
    resilin generate runs/groups -p "ROMEO." --draft mtp           with model.mtp
    """
    from resilin.inference.generate import StopRule
    from resilin.inference.generate import generate as answers_to
    from resilin.nested.in_place import budget as run_part

    sampling = choosing.settings()
    if system is not None and not chat:
        raise UserError("--system is part of a conversation: add --chat")
    talking = chat and not as_json and samples == 1
    texts = (prompt or []) if talking and not prompt_file else _prompts(prompt, prompt_file)
    opened = opening.open(model)
    words = opened.needed_tokenizer()
    strings = tuple(text.replace("\\n", "\n").replace("\\t", "\t") for text in stop or ())
    if chat and words.chat_template is None:
        strings = (*strings, "<|im_end|>")  # of ChatML, the form used where the tokenizer brings none
    rule = StopRule(max_new_tokens, opened.end_ids, strings)
    part, proposing = _parts(opened.model, budget, draft)
    if draft is not None and (chat or stop or as_json):
        raise UserError("--draft writes plain answers: leave out --chat, --stop and --json")
    running = nullcontext() if part is None else run_part(opened.model, part)
    if talking:
        with running:
            _chat(opened.model, words, system, rule, sampling, texts)
        return
    ids = [_ids_of(words, text, chat, system) for text in texts for _ in range(samples)]
    if as_json:
        with running:
            answers = answers_to(opened.model, ids, rule, sampling=sampling, tokenizer=words)
        for row, answer in enumerate(answers):
            typer.echo(_as_json(texts[row // samples], row % samples, answer))
        return
    began = time.perf_counter()
    shown = ["" if chat else text for text in texts for _ in range(samples)]
    asked = _Asked(opened.model, words, ids, shown, rule, sampling)
    if draft is not None:
        _speculate(asked, _drafted(asked, opened, part, proposing, ahead))
        return
    with running:
        answers = _write(asked)
    _report(answers, time.perf_counter() - began)
