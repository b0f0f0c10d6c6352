"""Learning from a teacher: exact cases, gradients, splits, memory, the cache, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resilin.config import SettingsError, parse_settings
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.settings import ModelContext
from resilin.nouns import Batch
from resilin.objective.cross_entropy import CrossEntropyTerms
from resilin.objective.distill import Distilled, TeacherError
from resilin.objective.distillation import (
    DistillationTerms,
    TeacherLogits,
    TeacherStates,
    TopLogprobs,
    chunked_distillation,
    top_logprobs,
    whole_distillation,
)
from resilin.objective.next_token import NextToken
from resilin.objective.settings import ObjectiveContext
from resilin.objective.teacher_cache import TeacherCache, TeacherCacheError

N, D, V = 11, 6, 13


def decoder(seed: int, **changes: Any) -> Decoder:
    tree = {"vocab_size": V, "hidden_size": 8, "layers": 2, "heads": 2, "mlp_size": 16, "init_std": 0.4, **changes}
    return DecoderSettings(**tree).build(ModelContext(seed, None)).double()


def batch(rows: int = 4, length: int = 6, masked: bool = True) -> Batch:
    generator = torch.Generator().manual_seed(1)
    tokens_BT = torch.randint(V, (rows, length), generator=generator)
    labels_BT = tokens_BT.roll(-1, 1)
    if masked:
        labels_BT[0, :3] = -100
        labels_BT[2, 4] = -100
    return Batch(torch.arange(rows), {"tokens": tokens_BT, "labels": labels_BT})


def context(teacher: Decoder, folder: Path | None = None) -> ObjectiveContext:
    class Words:
        vocab_size = V

    return ObjectiveContext(0, torch.device("cpu"), Words(), lambda: teacher, folder)  # type: ignore[arg-type]


def tensors(seed: int) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    hidden, head = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((N, D), (V, D)))
    states, teacher_head = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((N, D + 2), (V, D + 2)))
    labels = torch.randint(V, (N,), generator=g)
    weights = torch.rand(N, generator=g, dtype=torch.float64)
    return hidden.requires_grad_(), head.requires_grad_(), states, teacher_head, labels, weights


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 20),
    rows=st.integers(1, 12),
    temperature=st.sampled_from([1.0, 2.0, 0.7]),
    direction=st.sampled_from(["forward", "reverse", "top"]),
    softcap=st.sampled_from([None, 1.5]),
    weighted=st.booleans(),
    regular=st.booleans(),
)
def test_chunks_give_the_loss_and_gradients_of_whole_logits(
    seed: int, rows: int, temperature: float, direction: Any, softcap: float | None, weighted: bool, regular: bool
) -> None:
    hidden, head, states, teacher_head, labels, weights = tensors(seed)
    weights_N = weights if weighted else None
    top, way = direction == "top", "forward" if direction == "top" else direction
    terms = DistillationTerms(0.4, 0.7, temperature, way)
    smooth, z = (0.1, 1e-2) if regular else (0.0, 0.0)
    teacher: Any = TeacherStates(states, teacher_head, softcap)
    if top:
        teacher = top_logprobs(teacher, 4, temperature, 3)
        teacher = TopLogprobs(teacher.index_NK, teacher.logprobs_NK.double())
    sums, kl = chunked_distillation(
        hidden, head, labels, weights_N, teacher, CrossEntropyTerms(smooth, z, softcap), terms, rows
    )
    sums.loss.backward()
    found = hidden.grad.clone(), head.grad.clone()
    hidden.grad = head.grad = None
    logits = hidden @ head.t()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    whole, whole_kl = whole_distillation(logits, labels, weights_N, teacher, CrossEntropyTerms(smooth, z), terms)
    whole.loss.backward()
    torch.testing.assert_close(sums.loss, whole.loss)
    torch.testing.assert_close(kl, whole_kl)
    torch.testing.assert_close(sums.nll, whole.nll)
    torch.testing.assert_close(found[0], hidden.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found[1], head.grad, rtol=1e-9, atol=1e-12)


def test_the_loss_is_that_of_torch_s_kl_div() -> None:
    hidden, head, states, teacher_head, labels, _ = tensors(0)
    teacher = TeacherStates(states, teacher_head)
    terms = DistillationTerms(0.33, 0.67, 2.0)
    sums, kl = chunked_distillation(hidden, head, labels, None, teacher, CrossEntropyTerms(), terms)
    q, p = hidden @ head.t(), states @ teacher_head.t()
    expected_kl = torch.nn.functional.kl_div(
        (q / 2).log_softmax(-1), (p / 2).log_softmax(-1), log_target=True, reduction="sum"
    )
    expected = 0.33 * torch.nn.functional.cross_entropy(q, labels, reduction="sum") + 0.67 * 4 * expected_kl
    torch.testing.assert_close(kl, expected_kl.detach())
    torch.testing.assert_close(sums.loss, expected)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_equal_logits_give_no_divergence_and_no_gradient(direction: Any, temperature: float) -> None:
    hidden, head, _, _, labels, _ = tensors(1)
    teacher = TeacherStates(hidden.detach(), head.detach())
    terms = DistillationTerms(0.0, 1.0, temperature, direction)
    sums, kl = chunked_distillation(hidden, head, labels, None, teacher, CrossEntropyTerms(), terms, 4)
    sums.loss.backward()
    assert float(kl) == float(sums.loss) == 0
    assert not hidden.grad.any()
    assert not head.grad.any()


def test_a_weight_of_zero_is_the_plain_loss_to_the_bit() -> None:
    student, teacher = decoder(0), decoder(1)
    ours = Distilled(kl_weight=0).build(context(teacher))(student, batch(), None)
    plain = NextToken().build()(student, batch(), None)
    assert torch.equal(ours.sum, plain.sum)
    hidden, head, states, teacher_head, labels, _ = tensors(2)
    terms, ce = DistillationTerms(1.0, 0.0), CrossEntropyTerms()
    sums, _ = chunked_distillation(hidden, head, labels, None, TeacherStates(states, teacher_head), ce, terms, 4)
    sums.loss.backward()
    expected = torch.nn.functional.cross_entropy(hidden.detach() @ head.detach().t(), labels, reduction="sum")
    torch.testing.assert_close(sums.loss.detach(), expected)


@given(seed=st.integers(0, 50), k=st.integers(1, V - 1))
def test_k_tokens_and_the_rest_diverge_no_more_than_all_tokens_and_all_k_exactly(seed: int, k: int) -> None:
    hidden, head, states, teacher_head, labels, _ = tensors(seed)
    terms, ce = DistillationTerms(0.0, 1.0, 2.0), CrossEntropyTerms()

    def kl(teacher: Any) -> float:
        return float(chunked_distillation(hidden, head, labels, None, teacher, ce, terms)[1])

    whole = TeacherStates(states, teacher_head)
    less, more, all_of_them = (top_logprobs(whole, count, 2.0, 5) for count in (k, k + 1, V))
    assert kl(less) <= kl(more) + 1e-6
    assert kl(more) <= kl(whole) + 1e-6
    assert kl(all_of_them) == pytest.approx(kl(whole), rel=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"ce_weight": 1.0, "kl_weight": 0.5},
        {"chunk": 0},
        {"layer_weight": 0.3},
        {"top_k": 4},
        {"kl_weight": 0, "layer_weight": 1},
    ],
)
def test_any_split_of_the_batch_gives_the_same_gradient(fields: dict[str, Any]) -> None:
    found = []
    for pieces in ([(0, 4)], [(0, 1), (1, 4)]):
        student = decoder(0)
        objective = Distilled(**fields).build(context(decoder(1)))
        losses = [objective(student, batch().rows(*piece), None) for piece in pieces]
        for loss in losses:
            loss.sum.backward()
        found.append((sum(float(x.sum) for x in losses), sum(float(x.units) for x in losses),
                      [p.grad for p in student.parameters()]))  # fmt: skip
    (loss, units, grads), (other, other_units, others) = found
    assert loss == pytest.approx(other, rel=1e-12)
    assert units == other_units == 20
    for a, b in zip(grads, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_teacher_gets_no_gradient_and_the_hidden_states_are_compared_block_by_block() -> None:
    student, teacher = decoder(0), decoder(1)
    objective = Distilled(kl_weight=0, layer_weight=0.5).build(context(teacher))
    loss = objective(student, batch(), None)
    loss.sum.backward()
    assert all(p.grad is None for p in teacher.parameters())
    valid = batch()["labels"] != -100
    total = 0.0
    x, y = student.embed(batch()["tokens"]), teacher.embed(batch()["tokens"])
    from resilin.models.mask import training_mask
    from resilin.models.rope import rotation

    turn = rotation(student.settings, torch.arange(6), 6)
    mask = training_mask(None, 6, None, torch.device("cpu"))
    for ours, theirs in zip(student.blocks, teacher.blocks, strict=True):
        x, y = ours(x, turn, mask)[0], theirs(y, turn, mask)[0]
        total += float((((x - y).square().sum(-1) / y.square().sum(-1)) * valid).sum())
    plain = NextToken().build()(student, batch(), None)
    assert float(loss.sum) == pytest.approx(float(plain.sum) + 0.5 * total / 2)
    same = Distilled(layer_weight=2.0, kl_weight=1.0).build(context(decoder(0)))(decoder(0), batch(), None)
    assert float(same.sum) == 0


def test_the_teacher_runs_once_a_batch_also_with_layers() -> None:
    teacher, calls = decoder(1), []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    Distilled(layer_weight=1.0).build(context(teacher))(decoder(0), batch(), None)
    assert len(calls) == 1


def test_rows_are_computed_once_and_found_again_by_another_run(tmp_path: Path) -> None:
    teacher, calls = decoder(1), []
    teacher.register_forward_hook(lambda _, x, __: calls.append(len(x[0])))
    first = Distilled(top_k=4).build(context(teacher, tmp_path))
    alone = [float(first(decoder(0), batch().rows(*r), None).sum) for r in ((0, 3), (1, 4))]
    assert calls == [3, 1]
    second = Distilled(top_k=4).build(context(teacher, tmp_path))
    assert [float(second(decoder(0), batch().rows(*r), None).sum) for r in ((0, 3), (1, 4))] == alone
    assert calls == [3, 1]
    for other in (Distilled(top_k=5), Distilled(top_k=4, temperature=1.0)):
        other.build(context(teacher, tmp_path))(decoder(0), batch(), None)
    assert calls == [3, 1, 4, 4]
    another = decoder(2)
    another.register_forward_hook(lambda *_: calls.append(0))
    Distilled(top_k=4).build(context(another, tmp_path))(decoder(0), batch(), None)
    assert calls[-1] == 0
    for file in tmp_path.rglob("*.safetensors"):
        file.write_bytes(b"broken")
    with pytest.raises(TeacherCacheError, match="remove the file"):
        second(decoder(0), batch(), None)


def test_in_memory_rows_are_computed_once_too() -> None:
    calls = []

    def compute(rows: torch.Tensor) -> TopLogprobs:
        calls.append(rows.tolist())
        return TopLogprobs(torch.zeros(len(rows) * 6, 2, dtype=torch.int32), torch.zeros(len(rows) * 6, 2))

    cache = TeacherCache(None, "t", 2, 1.0)
    twice = Batch(torch.arange(2), {"tokens": batch()["tokens"][[1, 1]]})
    assert cache.rows(twice, compute).index_NK.shape == (12, 2)
    cache.rows(batch(), compute)
    assert calls == [[0], [0, 2, 3]]


def test_never_all_logits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    inner = TeacherStates.logits

    def watch(self: Any, part: slice, dtype: Any) -> torch.Tensor:
        nonlocal largest
        found = inner(self, part, dtype)
        largest = max(largest, len(found))
        return found

    monkeypatch.setattr(TeacherStates, "logits", watch)
    Distilled(chunk=5).build(context(decoder(1)))(decoder(0), batch(), None).sum.backward()
    assert 0 < largest <= 5


def test_a_model_that_gives_logits_can_teach_and_learn() -> None:
    class Logits(torch.nn.Module):
        def __init__(self, inner: Decoder) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any, **more: Any) -> torch.Tensor:
            return self.inner.logits(self.inner(*args, **more).hidden_BTD)

    expected = float(Distilled().build(context(decoder(1)))(decoder(0), batch(), None).sum)
    wrapped = Distilled().build(context(Logits(decoder(1))))  # type: ignore[arg-type]
    assert float(wrapped(Logits(decoder(0)), batch(), None).sum) == pytest.approx(expected)
    assert float(wrapped(decoder(0), batch(), None).sum) == pytest.approx(expected)
    assert TeacherLogits(torch.zeros(2, 3)).logits(slice(0, 1), torch.float32).shape == (1, 3)


def test_a_teacher_of_another_vocabulary_or_shape_is_refused() -> None:
    objective = Distilled().build(context(decoder(1, vocab_size=V + 3)))
    with pytest.raises(TeacherError, match=f"the teacher knows {V + 3} tokens and the student {V}"):
        objective(decoder(0), batch(), None)
    with pytest.raises(TeacherError, match=r"the student has 2 of width 8, the teacher 3 of width 8"):
        Distilled(layer_weight=1.0).build(context(decoder(1, layers=3)))(decoder(0), batch(), None)
    with pytest.raises(TeacherError, match=r"top_k \(99\) exceeds the vocabulary"):
        Distilled(top_k=99).build(context(decoder(1)))(decoder(0), batch(), None)
    with pytest.raises(ValueError, match="needs the run"):
        Distilled().build(None)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kl_weight": 1.5}, "use at most 1, or give ce_weight"),
        ({"top_k": 4, "direction": "reverse"}, "set top_k = 0"),
        ({"top_k": 4, "layer_weight": 1}, "set one to 0"),
        ({"temperature": 0}, "temperature"),
        ({"teacher": {"use": "resilin.models.pretrained:Pretrained"}}, "path"),
    ],
)
def test_settings_that_make_no_sense_are_refused_when_they_load(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        parse_settings(Distilled, fields, "x.toml")


def test_a_teacher_s_settings_are_written_and_read() -> None:
    tree = {"teacher": {"path": "somewhere"}}
    read = parse_settings(Distilled, tree, "x.toml")
    dumped = read.model_dump(mode="json")
    assert dumped["teacher"]["use"] == "resilin.models.pretrained:Pretrained"
    assert parse_settings(Distilled, dumped, "x.toml") == read
    assert parse_settings(Distilled, {}, "x.toml").teacher is None
    small = {"vocab_size": V, "hidden_size": 8, "layers": 1, "heads": 2}
    own = {"teacher": {"use": "resilin.models.decoder_settings:DecoderSettings", **small}}
    loss = parse_settings(Distilled, own, "x.toml").build(context(decoder(1)))
    assert float(loss(decoder(0).float(), batch(), None).logs["kl"].value()) > 0
