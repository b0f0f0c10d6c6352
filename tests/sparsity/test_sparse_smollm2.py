"""A real model made 2:4: SmolLM2-135M, where its package is installed."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from resilin.models.huggingface import load_pretrained
from resilin.models.original import make_original
from resilin.models.plain import make_plain
from resilin.models.pretrained import Pretrained
from resilin.models.settings import ModelContext
from resilin.nouns import Batch
from resilin.objective.distill import Distilled
from resilin.objective.settings import ObjectiveContext
from resilin.run.open_model import open_model
from resilin.run.run import Pace, Run
from resilin.sparsity.adamw import SparseAdamW
from resilin.sparsity.decay import Ramp
from resilin.sparsity.export import export_sparse, read_masks
from resilin.sparsity.kernels import fits
from resilin.sparsity.masks import sparse_layers
from resilin.sparsity.settings import Sparse

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TEXT = (
    "The library of a programming language holds what most programs need: files, numbers, dates, texts and the means "
    "to talk to other machines. Much of it is older than the people who use it, and some of it is better. "
)


class Repeated:
    """The same text at every step."""

    def __init__(self, ids: list[int], vocab_size: int) -> None:
        self.vocab_size, self.sequence_length = vocab_size, len(ids) - 1
        self.row_T = torch.tensor(ids)

    def slots(self, step: int) -> int:
        return 1

    def fetch(self, step: int, slots: Any) -> Batch:
        return Batch(torch.tensor([0]), {"tokens": self.row_T[None, :-1], "labels": self.row_T[None, 1:]})

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None: ...


def test_smollm2_becomes_two_of_four_and_gets_better_in_a_few_steps(smollm2_gguf: Path, tmp_path: Path) -> None:
    opened = open_model(smollm2_gguf, device="cpu")
    ids = opened.needed_tokenizer().encode(TEXT)
    source: Any = Repeated(list(ids), opened.model.settings.vocab_size)
    dense = Pretrained(path=smollm2_gguf)
    settings = Sparse(model=dense, update_every=2)
    model = settings.build(ModelContext(0, None))
    assert len(list(sparse_layers(model))) == 30 * 7
    context = ObjectiveContext(0, torch.device("cpu"), source, lambda: settings.build(ModelContext(0, None)))
    objective = Distilled().build(context)
    with torch.no_grad():
        batch = source.fetch(0, [0])
        # The teacher is the dense original, to the bit.
        expected = opened.model(batch["tokens"]).hidden_BTD
        assert torch.equal(
            make_original(settings.build(ModelContext(0, None))).eval()(batch["tokens"]).hidden_BTD, expected
        )
        before = objective(model.eval(), batch, None)
    run = Run(
        source=source,
        model=model,
        objective=objective,
        optimizer=SparseAdamW(lr=1e-4, ramp=Ramp(maximum=1e-2, steps=2)).build(model, 4),
        pace=Pace(steps=4, micro_batch_size=1, clip_norm=1.0),
        seed=0,
        device=torch.device("cpu"),
        autocast=nullcontext,
    )
    assert run.train().reason == "completed"
    with torch.no_grad():
        after = objective(model.eval(), batch, None)
    assert float(after.logs["nll"].value()) < float(before.logs["nll"].value())
    assert float(after.logs["kl"].value()) < float(before.logs["kl"].value())
    with torch.no_grad():
        trained = model(batch["tokens"]).hidden_BTD
    export_sparse(model, tmp_path / "out")
    again, masks = load_pretrained(tmp_path / "out"), read_masks(tmp_path / "out")
    assert len(masks) == 210
    blocks = {name: p for name, p in again.named_parameters() if name.startswith("blocks.") and p.dim() == 2}
    assert len(blocks) == 210
    for (name, weight), mask in zip(sorted(blocks.items()), in_name_order(model), strict=True):
        assert torch.equal(weight != 0, mask), name
        assert ((weight != 0).view(len(weight), -1, 4).sum(-1) == 2).all(), name
    assert all(fits(layer) is None for _, layer in sparse_layers(model))  # semi-structured kernels take every one
    with torch.no_grad():
        assert torch.equal(again.eval()(batch["tokens"]).hidden_BTD, trained)
        assert torch.equal(make_plain(model)(batch["tokens"]).hidden_BTD, trained)


def in_name_order(model: Any) -> list[torch.Tensor]:
    """The masks of a model by the names of its layers."""
    return [layer.mask for _, layer in sorted(sparse_layers(model))]
