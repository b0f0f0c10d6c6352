"""A teacher that is a model in this process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from resilin.data.train_tokenizer import byte_tokenizer
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.huggingface import save_pretrained
from resilin.models.settings import ModelContext
from resilin.posttrain.local_teacher import LocalBackend, LocalTeacher
from resilin.teacher import ChatTeacher, Request, message


def build() -> Decoder:
    torch.set_num_threads(1)
    settings = DecoderSettings(
        vocab_size=260, hidden_size=16, layers=1, heads=2, mlp_size=24, max_positions=96, init_std=0.4
    )
    return settings.build(ModelContext(0, None)).eval()


def ask(text: str, **kw: object) -> Request:
    return Request((message("user", text),), max_tokens=6, **kw)  # type: ignore[arg-type]


def test_answers_do_not_depend_on_what_they_are_asked_with(tmp_path: Path) -> None:
    backend = LocalBackend(build(), byte_tokenizer())
    batch = [ask(f"q{n}", n=2, logprobs=True) for n in range(5)] + [ask("cold", temperature=0.0)]
    together = ChatTeacher(backend, max_concurrency=16).ask(batch)
    for request, reply in zip(batch, together, strict=True):
        (alone,) = ChatTeacher(LocalBackend(build(), byte_tokenizer()), max_concurrency=1).ask([request])
        assert alone.texts == reply.texts
        assert len(reply.texts) == request.n
        assert set(reply.finish_reasons) <= {"stop", "length"}
    assert together[0].texts[0] != together[0].texts[1]
    assert together[0].logprobs is not None
    assert all(0 < len(values or ()) <= 6 and max(values or ()) <= 0 for values in together[0].logprobs)
    assert together[0].completion_tokens > 0
    other_seed = ChatTeacher(backend).ask([ask("q0", n=2, seed=5)])[0]
    assert other_seed.texts != together[0].texts


def test_a_prompt_that_is_too_long_fails_alone() -> None:
    teacher = ChatTeacher(LocalBackend(build(), byte_tokenizer()), max_concurrency=8, tries=1)
    replies = teacher.ask([ask("a"), ask("x" * 200), ask("b")])
    assert [reply.error is None for reply in replies] == [True, False, True]
    assert "tokens; the model takes 96 positions" in str(replies[1].error)


def test_a_folder_makes_a_teacher_whose_answers_are_kept(tmp_path: Path) -> None:
    model, tokenizer = build(), byte_tokenizer()
    save_pretrained(model, tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    settings = LocalTeacher(path=tmp_path / "model", cache=tmp_path / "c.jsonl")
    (first,) = settings.build().ask([ask("hello", temperature=0.0)])
    (again,) = settings.build().ask([ask("hello", temperature=0.0)])
    assert again.cached
    assert not first.cached
    assert again.texts == first.texts
    assert ChatTeacher(LocalBackend(model, tokenizer)).ask([ask("hello", temperature=0.0)])[0].texts == first.texts


def test_a_folder_that_holds_no_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=str(tmp_path)):
        LocalTeacher(path=tmp_path).build()
