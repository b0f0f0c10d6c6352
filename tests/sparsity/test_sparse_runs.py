"""Masks in a run: when they move, what is logged, the end, resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from resilin.checkpoint.folder import CheckpointFolder
from resilin.models.plain import make_plain
from resilin.models.settings import ModelContext
from resilin.optim.adamw import AdamW
from resilin.run.events import StepDone
from resilin.run.start import resume_from_latest
from resilin.sparsity.adamw import SparseAdamW
from resilin.sparsity.masks import sparse_layers
from resilin.transforms import OptimizerTransform


def masks(model: Any) -> dict[str, torch.Tensor]:
    return {name: layer.mask.clone() for name, layer in sparse_layers(model)}


class Watch:
    """The masks after every step, and the logs."""

    def __init__(self, run: Any) -> None:
        self.model, self.seen, self.logs = run.model, [masks(run.model)], []
        run.listeners = (self,)

    def __call__(self, event: Any) -> None:
        if isinstance(event, StepDone):
            self.seen.append(masks(self.model))
            self.logs.append(event.logs)

    def changes(self) -> list[bool]:
        pairs = zip(self.seen, self.seen[1:], strict=False)
        return [any(not torch.equal(a[name], b[name]) for name in a) for a, b in pairs]


@pytest.mark.parametrize("micro", [8, 2])
def test_masks_move_every_third_step_and_after_the_last_whatever_the_micro_batch(sparse_run: Any, micro: int) -> None:
    run = sparse_run(steps=8, micro=micro, sparse={"update_every": 3, "dense": {"recompute": "block"}})
    watch = Watch(run)
    run.train()
    # Before step 3 (the fourth) and step 6, and after step 7, the last.
    assert watch.changes() == [False, False, False, True, False, False, True, True]
    for _, layer in sparse_layers(run.model):
        assert torch.equal(layer.mask, layer.wanted_mask())


def test_fixed_masks_stay_and_updates_can_end_early(sparse_run: Any) -> None:
    fixed = sparse_run(steps=5, sparse={"update_every": 0})
    watch = Watch(fixed)
    fixed.train()
    assert not any(watch.changes())
    assert "flip_rate" not in watch.logs[-1]
    early = sparse_run(steps=8, sparse={"update_every": 1, "update_until": 0.5}, optimizer=AdamW(lr=0.1))
    watch = Watch(early)
    early.train()
    assert watch.changes() == [False, True, True, True, True, False, False, False]


def test_flip_rates_are_shares_of_changed_bits(sparse_run: Any) -> None:
    run = sparse_run(steps=6, sparse={"update_every": 2})
    watch = Watch(run)
    run.train()
    first, total = watch.seen[0], sum(m.numel() for m in watch.seen[0].values())

    def share(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
        return sum(int((a[name] != b[name]).sum()) for name in a) / total

    assert "flip_rate" not in watch.logs[0]
    for at, before, after in ((2, 0, 3), (4, 3, 5), (5, 5, 6)):
        assert watch.logs[at]["flip_rate"] == pytest.approx(share(watch.seen[before], watch.seen[after]))
        assert watch.logs[at]["initial_flip_rate"] == pytest.approx(share(first, watch.seen[after]))
    assert watch.logs[5]["flip_rate"] > 0
    assert watch.logs[3]["flip_rate"] == watch.logs[2]["flip_rate"]  # until the next update


@pytest.mark.parametrize(
    "sparse",
    [
        {"update_every": 2},
        {"update_every": 2, "metric": "wanda"},
        {"update_every": 3, "slorb": {"k": 8, "train_pooling": True}},
    ],
)
def test_resuming_gives_the_same_bits(sparse_run: Any, tmp_path: Path, sparse: dict[str, Any]) -> None:
    whole = sparse_run(steps=7, sparse=sparse)
    whole.train()
    first = sparse_run(tmp_path / "c", steps=7, sparse=sparse)
    while first.step < 3:
        first._take_step()
    first.save()
    first.checkpoints.close()
    second = sparse_run(steps=7, sparse={**sparse, "seed": 5})
    store = CheckpointFolder(tmp_path / "c")
    assert resume_from_latest(second, store)
    store.close()
    second.train()
    expected = whole.model.state_dict()
    assert list(expected) == list(second.model.state_dict())
    for name, tensor in second.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_wanda_s_first_masks_come_from_the_first_batches(sparse_run: Any) -> None:
    by_size = sparse_run(steps=1, sparse={"update_every": 0})
    run = sparse_run(steps=1, sparse={"update_every": 0, "metric": "wanda", "slorb": {"k": 8}},
                     optimizer=AdamW(lr=1e-9))  # fmt: skip
    weights = {name: layer.weight.detach().clone() for name, layer in sparse_layers(run.model)}
    inputs: dict[str, list[torch.Tensor]] = {}
    hooks = [
        layer.register_forward_hook(
            lambda _, x, __, name=name: inputs.setdefault(name, []).append(x[0].detach().flatten(0, -2))
        )
        for name, layer in sparse_layers(run.model)
    ]
    run.train()
    for hook in hooks:
        hook.remove()
    differs = False
    for (name, layer), (_, other) in zip(sparse_layers(run.model), sparse_layers(by_size.model), strict=True):
        norm_C = inputs[name][0].norm(dim=0)  # the first call is the calibration
        best = (weights[name].abs() * norm_C).view(layer.out_features, -1, 4).topk(2).indices
        expected = torch.zeros(layer.out_features, layer.in_features // 4, 4, dtype=torch.bool).scatter_(-1, best, True)
        assert torch.equal(layer.mask, expected.view_as(layer.mask))
        pruned = weights[name].masked_fill(layer.mask, 0).unflatten(1, (-1, 8)).mean(-1)
        torch.testing.assert_close(layer.correction, pruned, rtol=1e-3, atol=1e-4)
        differs |= not torch.equal(layer.mask, other.mask)
    assert differs


def test_what_is_evaluated_at_the_end_is_what_is_exported(sparse_run: Any) -> None:
    run = sparse_run(steps=4, sparse={"update_every": 3})
    run.train()
    tokens = run.source.fetch(9, range(4))["tokens"]
    with torch.no_grad():
        trained = run.model(tokens).hidden_BTD
        assert torch.equal(make_plain(run.model)(tokens).hidden_BTD, trained)


class ZeroedAfterwards(OptimizerTransform):
    """Masked AdamW as it is usually done: an ordinary step, then zeros where the masks are False."""

    def __init__(self, inner: Any, masks: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        super().__init__(inner)
        self.masks = masks
        self._zero()

    @torch.no_grad()
    def _zero(self) -> None:
        for weight, mask in self.masks:
            weight.mul_(mask)

    def step(self, step: int) -> Any:
        logs = self.inner.step(step)
        self._zero()
        return logs


def test_with_fixed_masks_and_no_decay_kept_weights_are_those_of_masked_adamw_to_the_bit(sparse_run: Any) -> None:
    same: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
    ours = sparse_run(steps=6, sparse={"update_every": 0}, optimizer=SparseAdamW(**same, ramp={"maximum": 0}))
    theirs = sparse_run(steps=6, model=dense_like(ours.model), optimizer=AdamW(**same))
    kept = {f"{name}.weight": layer.mask for name, layer in sparse_layers(ours.model)}
    pairs = [(theirs.model.get_parameter(name), mask) for name, mask in kept.items()]
    theirs.optimizer = ZeroedAfterwards(theirs.optimizer, pairs)
    ours.train()
    theirs.train()
    for name, parameter in theirs.model.named_parameters():
        found = ours.model.get_parameter(name).detach()
        mask = kept.get(name, torch.ones_like(found, dtype=torch.bool))
        assert torch.equal(found[mask], parameter.detach()[mask]), name


def test_masks_that_keep_all_and_no_decay_are_the_dense_run_to_the_bit(sparse_run: Any) -> None:
    same: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
    ours = sparse_run(steps=6, sparse={"n": 4, "update_every": 2}, optimizer=SparseAdamW(**same, ramp={"maximum": 0}))
    theirs = sparse_run(steps=6, model=dense_like(ours.model), optimizer=AdamW(**same))
    before = [p.detach().clone() for p in theirs.model.parameters()]
    ours.train()
    theirs.train()
    for name, parameter in theirs.model.named_parameters():
        assert torch.equal(ours.model.get_parameter(name), parameter), name
    assert all(not torch.equal(p, b) for p, b in zip(theirs.model.parameters(), before, strict=True))


def dense_like(model: Any) -> Any:
    """A decoder without masks that holds the same weights."""
    dense = model.settings.build(ModelContext(9, None))
    dense.load_state_dict({name: p.detach() for name, p in model.named_parameters()})
    return dense
