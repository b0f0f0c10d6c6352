"""The chunked scan is the recurrence, token by token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resilin.models.mamba import causal_convolution
from resilin.models.ssd import scan, step


def one_by_one(x, dt, A, B, C, runs=None, state=None):
    """h_t = exp(dt_t A) h_(t-1) + dt_t x_t B_t^T, y_t = h_t C_t, head by head."""
    rows, T, H, P = x.shape
    G, N = B.shape[2:]
    y, ends = torch.zeros_like(x), torch.zeros(rows, H, P, N, dtype=x.dtype)
    for b in range(rows):
        for h in range(H):
            g = h // (H // G)
            state_PN = torch.zeros(P, N, dtype=x.dtype) if state is None else state[b, h].clone()
            for t in range(T):
                if runs is not None and t and runs[b, t] != runs[b, t - 1]:
                    state_PN = torch.zeros_like(state_PN)
                state_PN = torch.exp(dt[b, t, h] * A[h]) * state_PN + dt[b, t, h] * torch.outer(x[b, t, h], B[b, t, g])
                y[b, t, h] = state_PN @ C[b, t, g]
            ends[b, h] = state_PN
    return y, ends


def drawn(seed, tokens, groups, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype)

    H, P, N = 4, 3, 5
    return (
        normal(2, tokens, H, P),
        normal(2, tokens, H).exp(),
        -normal(H).exp(),
        normal(2, tokens, groups, N),
        normal(2, tokens, groups, N),
    ), normal(2, H, P, N)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    tokens=st.integers(1, 13),
    chunk=st.integers(1, 16),
    groups=st.sampled_from([1, 2, 4]),
    starts=st.one_of(st.none(), st.lists(st.booleans(), min_size=26, max_size=26)),
    goes_on=st.booleans(),
)
def test_any_chunk_gives_the_recurrence(seed, tokens, chunk, groups, starts, goes_on):
    inputs, before = drawn(seed, tokens, groups)
    runs = None if starts is None else torch.tensor(starts).view(2, 13)[:, :tokens].cumsum(1)
    state = before if goes_on and runs is None else None
    want, end = one_by_one(*inputs, runs, state)
    y, after = scan(*inputs, chunk, runs, state)
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(after, end, rtol=1e-10, atol=1e-10)


def test_a_token_at_a_time_is_the_same():
    (x, dt, A, B, C), state = drawn(0, 6, 2)
    want, end = one_by_one(x, dt, A, B, C, None, state)
    for t in range(6):
        y, state = step(x[:, t], dt[:, t], A, B[:, t], C[:, t], state)
        torch.testing.assert_close(y, want[:, t], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, end, rtol=1e-10, atol=1e-10)


def test_gradients_are_those_of_the_recurrence_also_where_decays_are_steep():
    inputs, _ = drawn(1, 9, 2)
    inputs = (*inputs[:2], inputs[2] * 300, *inputs[3:])  # exp of a gap above the diagonal would overflow
    runs = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 2, 2]] * 2)
    for one in inputs:
        one.requires_grad_()
    weights = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None, None]
    (scan(*inputs, 4, runs)[0] * weights).sum().backward()
    mine = [one.grad.clone() for one in inputs]
    for one in inputs:
        one.grad = None
    B, C = inputs[3].repeat_interleave(2, 2), inputs[4].repeat_interleave(2, 2)
    state, total = torch.zeros(2, 4, 3, 5, dtype=torch.float64), 0.0
    for t in range(9):
        if t and runs[0, t] != runs[0, t - 1]:
            state = torch.zeros_like(state)
        decay = torch.exp(inputs[1][:, t] * inputs[2])[..., None, None]
        state = decay * state + (inputs[1][:, t, :, None] * inputs[0][:, t])[..., None] * B[:, t, :, None]
        total = total + (torch.einsum("bhpn,bhn->bhp", state, C[:, t]) * weights[t]).sum()
    total.backward()
    for one, grad in zip(inputs, mine, strict=True):
        assert grad.isfinite().all()
        torch.testing.assert_close(grad, one.grad, rtol=1e-9, atol=1e-9)


def test_documents_and_a_state_before_them_are_refused_together():
    inputs, state = drawn(0, 3, 1)
    with pytest.raises(ValueError, match="not both"):
        scan(*inputs, 2, torch.zeros(2, 3, dtype=torch.int64), state)


def test_the_convolution_is_torchs_inside_each_document():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 9, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(6, 1, 4, generator=generator, dtype=torch.float64)
    bias = torch.randn(6, generator=generator, dtype=torch.float64)
    runs = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 2]])
    found = causal_convolution(x, weight, bias, runs)
    for part in (slice(0, 2), slice(2, 8), slice(8, 9)):
        alone = torch.nn.functional.conv1d(x[:, part].transpose(1, 2), weight, bias, padding=3, groups=6)
        length = part.stop - part.start
        torch.testing.assert_close(found[:, part], alone[..., :length].transpose(1, 2), rtol=1e-10, atol=1e-10)
