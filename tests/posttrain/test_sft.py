"""Fine-tuning on answers: every token of the global batch counts the same, however the batch is divided."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resilin.config import parse_settings
from resilin.data.chat_source import ChatSource
from resilin.data.settings import SourceContext
from resilin.data.train_tokenizer import byte_tokenizer
from resilin.keys import Keys
from resilin.nouns import Batch, Source
from resilin.objective.next_token import NextToken
from resilin.parallel.step import StepGradient, gradient_of_step
from resilin.recipes.tulu3.mean_of_means import MeanOfMeans


@pytest.fixture
def source(tmp_path: Path) -> Source:
    byte_tokenizer().save(tmp_path / "tokenizer")
    rows = []
    for n in range(16):
        turns = [("user", "q" * (n % 5 + 1)), ("assistant", "a" * (1 + 3 * (n % 4)))]
        turns += [("user", "more"), ("assistant", "b" * (n % 3 + 1))] if n % 2 else []
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    tree = {
        "paths": [str(tmp_path / "chats.jsonl")], "tokenizer": {"path": str(tmp_path / "tokenizer")},
        "packing": "pad", "sequence_length": 96, "workers": 1, "cache": str(tmp_path / "cache"),
        "held_out": {"fraction": 0.0},
    }  # fmt: skip
    torch.set_num_threads(1)
    return parse_settings(ChatSource, tree, "test").build(SourceContext(0, "train", 8))


def step(model: nn.Module, batch: Batch, micro: int, objective: Any) -> tuple[StepGradient, list[Tensor]]:
    model.zero_grad(set_to_none=True)
    keys, device = Keys(0, 0, batch.slots_B), torch.device("cpu")
    found = gradient_of_step(
        model, objective, batch, keys, micro_batch_size=micro, clip_norm=0, device=device, autocast=nullcontext
    )
    return found, [p.grad.clone() for p in model.parameters() if p.grad is not None]


def model_of(tiny: Any, source: Any) -> nn.Module:
    return tiny(0, vocab_size=source.vocab_size, max_positions=128)


@pytest.mark.parametrize("documents", [True, False])
def test_only_positions_that_decide_something_are_computed(tiny: Any, source: Any, documents: bool) -> None:
    batch = source.fetch(0, range(8))
    if not documents:
        batch = Batch(batch.slots_B, {name: batch[name] for name in ("tokens", "labels")})
    lean, whole = (tiny(0, vocab_size=source.vocab_size, attention_backend=way) for way in ("sdpa", "eager"))
    sizes: list[int] = []
    lean.embed.register_forward_hook(lambda module, args, output: sizes.append(output.shape[:2].numel()))
    mine, expected = (step(model, batch, 8, NextToken().build()) for model in (lean, whole))
    has_label = batch["labels"] != -100
    assert sizes == [int(sum(int(row.nonzero().max()) + 1 for row in has_label))]
    assert sizes[0] < 0.7 * has_label.numel()
    assert mine[0].loss == pytest.approx(expected[0].loss, rel=1e-12)
    for a, b in zip(mine[1], expected[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_loss_and_gradient_do_not_depend_on_the_split(tiny: Any, source: Any) -> None:
    model, batch = model_of(tiny, source), source.fetch(0, range(8))
    whole = step(model, batch, 8, NextToken().build())
    assert whole[0].units == int((batch["labels"] != -100).sum())
    for micro in (1, 2, 3, 5):
        part = step(model, batch, micro, NextToken().build())
        assert part[0].loss == pytest.approx(whole[0].loss, rel=1e-6)
        for a, b in zip(part[1], whole[1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_two_workers_that_add_their_sums_have_the_gradient_of_one(tiny: Any, source: Any) -> None:
    model, batch = model_of(tiny, source), source.fetch(0, range(8))
    whole = step(model, batch, 8, NextToken().build())
    halves = [step(model, batch.rows(a, b), 4, NextToken().build()) for a, b in ((0, 4), (4, 8))]
    units = sum(found.units for found, _ in halves)
    loss = sum(found.loss * found.units for found, _ in halves) / units
    assert loss == pytest.approx(whole[0].loss, rel=1e-6)
    for index, expected in enumerate(whole[1]):
        total = sum(found.units * grads[index] for found, grads in halves) / units
        torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-9)


def test_a_mean_of_means_is_another_gradient(tiny: Any, source: Any) -> None:
    model, batch = model_of(tiny, source), source.fetch(0, range(8))
    wrong = MeanOfMeans.model_validate({"objective": {}}).build()
    one, many = step(model, batch, 8, wrong), step(model, batch, 1, wrong)
    right = step(model, batch, 1, NextToken().build())
    torch.testing.assert_close(one[1][0], right[1][0], rtol=1e-6, atol=1e-9)
    assert float((many[1][0] - right[1][0]).abs().max()) > 1e-3 * float(right[1][0].abs().max())


def test_only_what_the_assistant_wrote_and_its_end_gets_a_gradient(source: Any) -> None:
    batch = source.fetch(0, range(8))
    logits = torch.zeros(*batch["tokens"].shape, source.vocab_size, dtype=torch.float64, requires_grad=True)

    class Fixed(nn.Module):
        def forward(self, *_: Any, **__: Any) -> Tensor:
            return logits

    NextToken().build()(Fixed(), batch, None).sum.backward()
    touched = logits.grad.abs().sum(-1) > 0
    assert torch.equal(touched, batch["labels"] != -100)
    for row in range(8):
        labels = batch["labels"][row]
        said = source.tokenizer.decode(labels[labels != -100].tolist(), skip_special=False)
        assert set(said.replace("<|im_end|>", "")) <= {"a", "b"}
        assert said.endswith("<|im_end|>")
