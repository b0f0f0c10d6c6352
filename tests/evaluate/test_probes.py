"""B batch, T tokens, H query heads, K key heads, D head size."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch

from resilin.evaluate.gradient_probes import Probed as ProbedGradients
from resilin.evaluate.gradient_probes import before_clipping
from resilin.evaluate.probes import Probed
from resilin.evaluate.scaled_loss import Scaled
from resilin.keys import Keys
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.rope import rotate, rotation
from resilin.models.settings import ModelContext
from resilin.nouns import Batch
from resilin.objective.next_token import NextToken
from resilin.optim.adamw import AdamW
from resilin.parallel.report import merge_logs
from resilin.parallel.step import gradient_of_step

SMALL = {"vocab_size": 23, "hidden_size": 16, "layers": 2, "heads": 4, "kv_heads": 2, "init": "fan_in"}


def decoder(**changes):
    return DecoderSettings(**{**SMALL, **changes}).build(ModelContext(seed=0))


def batch(documents: bool = False, rows: int = 4, tokens: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 23, (rows, tokens + 1), generator=generator)
    fields = {"tokens": ids[:, :-1].contiguous(), "labels": ids[:, 1:].clone()}
    fields["labels"][0, :2] = -100
    if documents:
        fields["documents"] = torch.tensor([[0, 0, 0, 1, 1, 1]] * rows, dtype=torch.int32)
        fields["positions"] = torch.tensor([[0, 1, 2, 0, 1, 2]] * rows)
    return Batch(torch.arange(rows), fields)


def brute_force(model, data):
    """Largest scaled product and mean entropy of each block, head by head, query by query."""
    settings = model.settings
    T = data["tokens"].shape[1]
    positions = data.get("positions")
    turn = rotation(settings, torch.arange(T) if positions is None else positions, T)
    documents = data.get("documents")
    x = model.embed(data["tokens"])
    found = []
    for block in model.blocks:
        attention, normed = block.attention, block.attention_norm(x)
        B = len(x)
        q = attention.q(normed).view(B, T, 4, 4)
        k = attention.k(normed).view(B, T, 2, 4)
        if attention.q_norm is not None:
            q, k = attention.q_norm(q), attention.k_norm(k)
        q, k = rotate(q, turn), rotate(k, turn)
        largest, entropies = 0.0, []
        for b in range(B):
            for h in range(4):
                for t in range(T):
                    products = [float(q[b, t, h] @ k[b, s, h // 2]) for s in range(T)]
                    largest = max(largest, max(abs(p) / math.sqrt(4) for p in products))
                    window = settings.sliding_window or T
                    seen = [
                        p * (settings.attention_scale or 4**-0.5)
                        for s, p in enumerate(products)
                        if s <= t and t - s < window and (documents is None or documents[b, s] == documents[b, t])
                    ]
                    cap = settings.attention_softcap
                    seen = seen if cap is None else [cap * math.tanh(p / cap) for p in seen]
                    weights = torch.tensor(seen, dtype=torch.float64).softmax(0)
                    entropies.append(float(-(weights * weights.log()).sum()))
        x = x + attention(normed, turn, *_mask_of(model, data, T))
        x = x + block.mlp(block.mlp_norm(x))
        found.append((largest, sum(entropies) / len(entropies), float(x.square().mean())))
    return found, model.norm(x)


def _mask_of(model, data, T):
    from resilin.models.mask import training_mask

    return (training_mask(data.get("documents"), T, model.settings.sliding_window, torch.device("cpu")),)


@pytest.mark.parametrize(
    ("changes", "documents"),
    [
        ({}, False),
        ({"qk_norm": "layer"}, False),
        ({"sliding_window": 3}, False),
        ({"attention_scale": 0.25}, False),
        ({"norm": "layer", "gated": False}, True),
        ({"attention_backend": "eager", "attention_softcap": 0.5}, False),
        ({"attention_backend": "flex", "sliding_window": 3}, True),
    ],
)
def test_probes_see_what_brute_force_computes(changes, documents):
    model, data = decoder(**changes), batch(documents)
    loss = Probed(objective=NextToken()).build()(model, data, Keys(0, 0, data.slots_B))
    with torch.no_grad():
        blocks, hidden = brute_force(model, data)
        logits = model.logits(hidden)[data["labels"] != -100]
    for layer, (largest, entropy, square) in enumerate(blocks):
        assert loss.logs[f"probe/attention_logit_max/{layer}"].value() == pytest.approx(largest, rel=1e-5)
        assert loss.logs[f"probe/attention_entropy/{layer}"].value() == pytest.approx(entropy, rel=1e-5)
        assert loss.logs[f"probe/output_mean_square/{layer}"].value() == pytest.approx(square, rel=1e-5)
    log_z = logits.logsumexp(-1)
    assert loss.logs["probe/log_z"].value() == pytest.approx(float(log_z.mean()), rel=1e-5)
    assert loss.logs["probe/log_z_max"].value() == pytest.approx(float(log_z.max()), rel=1e-5)
    assert loss.logs["probe/logit_min_negated"].value() == pytest.approx(-float(logits.min()), rel=1e-5)


def test_probes_merge_to_the_same_over_any_micro_batches():
    model, data = decoder(), batch()
    objective, keys = Probed(objective=NextToken()).build(), Keys(0, 0, data.slots_B)
    whole = merge_logs([objective(model, data, keys)])
    for size in (1, 2, 3):
        parts = [
            objective(model, data.rows(start, min(start + size, 4)), keys.rows(start, min(start + size, 4)))
            for start in range(0, 4, size)
        ]
        assert merge_logs(parts) == pytest.approx(whole, rel=1e-5)


def train(objective, optimizer, steps=4, clip_norm=1.0):
    model, data = decoder(qk_norm="layer"), batch()
    fitted, loss_of = optimizer.build(model, steps), objective.build()
    logs = []
    for step in range(steps):
        fitted.zero_grad()
        made = gradient_of_step(
            model, loss_of, data, Keys(0, step, data.slots_B), micro_batch_size=2, clip_norm=clip_norm,
            device=torch.device("cpu"), autocast=nullcontext,
        )  # fmt: skip
        logs.append({"grad_norm": made.norm, **made.logs, **fitted.step(step)})
    return model, logs


def test_probes_change_no_number():
    plain, _ = train(NextToken(z_loss=1e-4), AdamW(lr=1e-2))
    inner = NextToken(z_loss=1e-4)
    probed, logs = train(Probed(every=1, objective=inner), ProbedGradients(every=1, optimizer=AdamW(lr=1e-2)))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), probed.parameters(), strict=True))
    assert "probe/attention_logit_max/0" in logs[0]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in probed.modules())


def test_probes_look_at_every_nth_step_and_never_at_evaluation():
    _, logs = train(Probed(every=2, objective=NextToken()), ProbedGradients(every=2, optimizer=AdamW(lr=1e-2)))
    seen = [any(name.startswith("probe/") for name in entry) for entry in logs]
    assert seen == [True, False, True, False]
    model, data = decoder(), batch()
    evaluated = Probed(every=1, objective=NextToken()).build()(model, data, None)
    assert not any(name.startswith("probe/") for name in evaluated.logs)


def test_gradient_rms_before_clipping_is_that_of_the_unclipped_gradient():
    watch = {"every": 1, "tensors": ("blocks.0.mlp.up.weight",)}
    name = "probe/gradient_rms/blocks.0.mlp.up.weight"
    _, clipped = train(NextToken(), ProbedGradients(optimizer=AdamW(lr=1e-2), **watch), steps=1, clip_norm=1e-2)
    _, free = train(NextToken(), ProbedGradients(optimizer=AdamW(lr=1e-2), **watch), steps=1, clip_norm=0.0)
    assert clipped[0][name] < free[0][name] / 2
    restored = before_clipping(clipped[0][name], clipped[0]["grad_norm"], 1e-2)
    assert restored == pytest.approx(free[0][name], rel=1e-5)
    assert before_clipping(free[0][name], free[0]["grad_norm"], 0.0) == free[0][name]


def test_gradient_rms_is_that_of_the_gradient_handed_on():
    model, name = decoder(), "blocks.1.mlp.down.weight"
    optimizer = ProbedGradients(every=1, tensors=(name,), optimizer=AdamW(lr=1e-2)).build(model, 10)
    weight = dict(model.named_parameters())[name]
    for step in range(3):
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step)) * 1e-2
        expected = float(weight.grad.square().mean().sqrt())
        assert optimizer.step(step)[f"probe/gradient_rms/{name}"] == pytest.approx(expected, rel=1e-5)


def test_update_and_parameter_rms_of_the_inner_optimizer_come_through():
    """The update is what moves the weights, before the learning rate and without decay."""
    model, name = decoder(), "blocks.1.mlp.down.weight"
    inner = AdamW(
        lr=1e-2, weight_decay=0.0, eps=1e-3, schedule={"warmup": 0, "min_lr": 1e-2},
        record=("update_rms", "parameter_rms"),
    )  # fmt: skip
    optimizer = ProbedGradients(every=1, tensors=(name,), optimizer=inner).build(model, 10)
    weight = dict(model.named_parameters())[name]
    for step in range(3):
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step)) * 1e-2
        before = weight.detach().clone()
        logs = optimizer.step(step)
        moved = (before - weight.detach()) / 1e-2
        assert logs[f"update_rms/{name}"] == pytest.approx(float(moved.square().mean().sqrt()), rel=1e-4)
        rms = float(weight.detach().square().mean().sqrt())
        assert logs[f"parameter_rms/{name}"] == pytest.approx(rms, rel=1e-5)


def test_patterns_that_watch_nothing_are_refused():
    with pytest.raises(ValueError, match="matches no trainable parameter"):
        ProbedGradients(tensors=("blocks.9.*",)).build(decoder(), 10)


def test_scaled_loss_scales_the_gradient_and_leaves_the_logs():
    data, gradients, logs = batch(), [], []
    for objective in (NextToken(), Scaled(factor=1e-6, objective=NextToken())):
        model = decoder()
        loss = objective.build()(model, data, Keys(0, 0, data.slots_B))
        loss.sum.backward()
        gradients.append(model.embed.weight.grad.clone())
        logs.append(loss.logs["nll"].value())
    torch.testing.assert_close(gradients[1] * 1e6, gradients[0], rtol=1e-4, atol=1e-6)
    assert logs[0] == logs[1]


def test_qk_norm_bounds_the_probe_by_cauchy_schwarz_for_any_weights():
    model, data = decoder(qk_norm="layer"), batch()
    with torch.no_grad():
        for block in model.blocks:
            block.attention.q.weight.mul_(1e3)
            block.attention.q_norm.weight.copy_(torch.tensor([0.5, 2.0, 1.0, 1.5]))
            block.attention.k_norm.weight.copy_(torch.tensor([3.0, 0.1, 1.0, 1.0]))
    loss = Probed(objective=NextToken()).build()(model, data, Keys(0, 0, data.slots_B))
    for layer in range(2):
        assert loss.logs[f"probe/attention_logit_max/{layer}"].value() <= math.sqrt(4) * 2.0 * 3.0 * (1 + 1e-5)
