"""Classification: the sum over valid samples, its logs, mixup by key, models of other libraries."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resilin.keys import Keys
from resilin.nouns import Batch
from resilin.vision.classification import Classification, ClassificationLoss


def batch_of(count: int = 6, classes: int = 7) -> Batch:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, classes, generator=generator)
    labels = torch.randint(0, classes, (count,), generator=generator)
    return Batch(torch.arange(count), {"inputs": inputs, "labels": labels})


def test_it_is_the_summed_cross_entropy() -> None:
    batch = batch_of()
    loss = Classification(label_smoothing=0.1).build()(nn.Identity(), batch, None)
    wanted = F.cross_entropy(batch["inputs"], batch["labels"], reduction="sum", label_smoothing=0.1)
    assert torch.equal(loss.sum, wanted)
    assert loss.units.item() == 6
    assert loss.logs["nll"].value() == pytest.approx(F.cross_entropy(batch["inputs"], batch["labels"]).item(), rel=1e-6)


def test_top_1_and_top_5_count_hits() -> None:
    logits = torch.arange(7.0).expand(4, 7).clone()
    batch = Batch(torch.arange(4), {"inputs": logits, "labels": torch.tensor([6, 2, 1, 0])})
    logs = Classification().build()(nn.Identity(), batch, None).logs
    assert (logs["top1"].value(), logs["top5"].value()) == (0.25, 0.5)
    few = Batch(torch.arange(1), {"inputs": torch.zeros(1, 3), "labels": torch.tensor([1])})
    assert "top5" not in Classification().build()(nn.Identity(), few, None).logs


def test_several_views_are_judged_by_their_mean_prediction() -> None:
    views_BVK = torch.randn(5, 3, 7, generator=torch.Generator().manual_seed(1))
    labels_B, seen = torch.tensor([0, 3, 6, 2, -100]), []

    class Watching(nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            seen.append(inputs)
            return inputs

    loss = Classification().build()(Watching(), Batch(torch.arange(5), {"views": views_BVK, "labels": labels_B}), None)
    assert [tuple(x.shape) for x in seen] == [(5, 7)] * 3, "as much memory as single views"
    p_BK = views_BVK.softmax(-1).mean(1)
    assert loss.sum.item() == pytest.approx(-p_BK[torch.arange(4), labels_B[:4]].log().sum().item(), rel=1e-5)
    assert loss.logs["top1"].value() == (p_BK.argmax(-1)[:4] == labels_B[:4]).float().mean().item()
    one = Batch(torch.arange(5), {"views": views_BVK[:, :1], "labels": labels_B})
    plain = Batch(torch.arange(5), {"inputs": views_BVK[:, 0], "labels": labels_B})
    both = [Classification(label_smoothing=0.1).build()(nn.Identity(), batch, None) for batch in (one, plain)]
    assert both[0].sum.item() == pytest.approx(both[1].sum.item(), rel=1e-6)


def test_samples_without_a_label_are_no_units() -> None:
    batch = batch_of()
    labels = batch["labels"].clone()
    labels[2:] = -100
    masked = Batch(batch.slots_B, {"inputs": batch["inputs"], "labels": labels})
    loss, part = (Classification().build()(nn.Identity(), b, None) for b in (masked, batch.rows(0, 2)))
    assert loss.units.item() == 2
    assert loss.sum.item() == pytest.approx(part.sum.item(), rel=1e-6)


def test_mixup_mixes_inputs_and_losses_by_key() -> None:
    batch, seen = batch_of(), []

    class Watching(nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            seen.append(inputs)
            return inputs

    keys = Keys(0, 4, batch.slots_B)
    loss = Classification(mixup=0.4).build()(Watching(), batch, keys)
    again = Classification(mixup=0.4).build()(Watching(), batch, keys)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(loss.sum, again.sum)
    partner = batch["inputs"].roll(1, 0)
    share_B = ((seen[0] - partner) / (batch["inputs"] - partner)).mean(1)
    assert ((share_B >= 0.5 - 1e-4) & (share_B <= 1 + 1e-4)).all()
    own, other = (
        F.cross_entropy(seen[0], labels, reduction="none") for labels in (batch["labels"], batch["labels"].roll(1))
    )
    assert loss.sum.item() == pytest.approx((share_B * own + (1 - share_B) * other).sum().item(), rel=1e-4)
    plain = Classification(mixup=0.4).build()(Watching(), batch, None)
    assert torch.equal(seen[-1], batch["inputs"]), "evaluation mixes nothing"
    assert plain.sum.item() != pytest.approx(loss.sum.item())


def test_a_model_with_too_few_outputs_is_refused() -> None:
    objective = ClassificationLoss(Classification(), classes=9)
    with pytest.raises(ValueError, match=r"set model\.classes = 9"):
        objective(nn.Identity(), batch_of(), None)
