"""The products of a decoding step are those of F.linear, however many threads and rows there are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from resilin.models.linear import project


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 1, 8), (1, 8), (8,), (5, 1, 8), (2, 3, 8), (40, 8)])
@pytest.mark.parametrize("outputs", [6, 7, 96])
@pytest.mark.parametrize("with_bias", [False, True])
def test_without_gradients_any_number_of_rows_gives_the_same_product(
    threads: int, shape: tuple[int, ...], outputs: int, with_bias: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(shape, generator=generator), torch.randn(outputs, 8, generator=generator)
    bias = torch.randn(outputs, generator=generator) if with_bias else None
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            got = project(x, weight, bias)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(got, F.linear(x, weight, bias))
    assert got.is_contiguous()


def test_with_gradients_and_in_other_dtypes_it_is_linear() -> None:
    weight = torch.randn(96, 8, requires_grad=True)
    x = torch.randn(3, 8)
    project(x, weight).sum().backward()
    assert weight.grad is not None
    with torch.no_grad():
        assert project(x.to(torch.bfloat16), weight.to(torch.bfloat16)).dtype == torch.bfloat16
