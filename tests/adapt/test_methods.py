"""The exact properties of each method, on one linear map."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import linear

from resilin.adapt import tiles
from resilin.adapt.attach import trainable_count
from resilin.adapt.merge import merge, unmerge

METHODS = ("miss", "mini", "bat_col", "bat_row", "bat_ab", "lora", "rslora", "dora")
every_method = pytest.mark.parametrize("method", METHODS)


def input_rows(count: int, width: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(11), dtype=torch.float64).to(dtype)


def by_hand(method: str, parameters: dict[str, torch.Tensor], weight: torch.Tensor, r: int) -> torch.Tensor:
    """The changed weight, element by element from the definitions."""
    outputs, inputs = weight.shape
    changed = weight.clone()
    for a in range(outputs // r if method.startswith("bat") else 0):
        for c in range(inputs // r):
            rows, columns = slice(a * r, (a + 1) * r), slice(c * r, (c + 1) * r)
            block = parameters["block"][a if method == "bat_col" else c]
            offset = parameters.get("offset", parameters["block"])[a if method == "bat_col" else c]
            changed[rows, columns] += weight[rows, columns] @ block + offset
    if method in ("miss", "mini"):
        for row in range(outputs):
            for k in range(inputs):
                changed[row, k] += parameters["block"][k % r, row % parameters["block"].shape[1]]
    if method in ("lora", "rslora", "dora"):
        scale = 1.0 if method != "rslora" else r**0.5
        changed = weight + scale * parameters["up"] @ parameters["down"]
    if method == "dora":
        changed = parameters["magnitude"][:, None] * changed / changed.norm(dim=1, keepdim=True)
    return changed


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_first_every_method_gives_the_bits_of_the_frozen_layer(one, method, dtype) -> None:
    model = one(method, dtype=dtype)
    x = input_rows(7, 12, dtype)
    assert torch.equal(model(x), linear(x, model.map.weight, model.map.bias))
    with torch.no_grad():
        for rows in (1, 7):  # few rows take a way of their own
            assert torch.equal(model(x[:rows]), linear(x[:rows], model.map.weight, model.map.bias))


@every_method
def test_the_output_is_the_product_with_the_weight_by_its_definition(one, method) -> None:
    model = one(method, moved=0.2)
    parameters = {name: p.detach() for name, p in model.map.adapters["a"].named_parameters()}
    weight = by_hand(method, parameters, model.map.weight.detach(), 4)
    x = input_rows(9, 12)
    expected = linear(x, weight, model.map.bias)
    torch.testing.assert_close(model(x), expected, atol=1e-12, rtol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(model(x[:3]), expected[:3], atol=1e-12, rtol=1e-12)


CASES = [(m, 12, 8) for m in METHODS] + [("miss", 13, 8), ("mini", 13, 8), ("miss", 3, 8), ("lora", 13, 7)]


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize(("method", "inputs", "outputs"), CASES)
def test_merged_and_unmerged_agree(one, method, inputs, outputs, dtype, within) -> None:
    model = one(method, inputs, outputs, dtype=dtype, moved=0.1)
    x = input_rows(6, inputs, dtype)
    before = model(x)
    merge(model)
    merged = model(x)
    assert torch.equal(merged, linear(x, model.map.weight, model.map.bias))
    assert (merged - before).abs().max() <= within * before.abs().max()
    unmerge(model)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("method", ["miss", "mini", "bat_col", "bat_row", "bat_ab", "lora", "rslora"])
def test_the_weight_is_computed_back_without_a_copy(one, method) -> None:
    model = one(method, moved=0.1)
    assert all(torch.linalg.matrix_norm(p, 2).max() < 1 for p in model.map.adapters.parameters())
    weight = model.map.weight.detach().clone()
    merge(model, keep=False)
    assert (model.map.weight - weight).abs().max() > 0.01
    unmerge(model)
    torch.testing.assert_close(model.map.weight.detach(), weight, atol=1e-10, rtol=0)


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_a_copy_the_weight_comes_back_to_the_bit(one, method, dtype) -> None:
    model = one(method, dtype=dtype, moved=0.3)
    weight = model.map.weight.detach().clone()
    merge(model)
    assert not torch.equal(model.map.weight, weight)
    unmerge(model)
    assert torch.equal(model.map.weight, weight)


@pytest.mark.parametrize("method", ["bat_col", "bat_row", "bat_ab"])
@pytest.mark.parametrize("nearly", [0.0, 1e-9])
def test_a_singular_block_is_an_error_and_gives_no_infinity(one, method, nearly) -> None:
    model = one(method, dtype=torch.float32)
    with torch.no_grad():
        model.map.adapters["a"].block[0].fill_diagonal_(-1.0 + nearly)
    merge(model, keep=False)
    merged = model.map.weight.detach().clone()
    with pytest.raises(ValueError, match=r"map, adapter 'a': I \+ B is singular.*keep=True"):
        unmerge(model)
    assert torch.equal(model.map.weight, merged)
    again = one(method, dtype=torch.float32)
    weight = again.map.weight.detach().clone()
    with torch.no_grad():
        again.map.adapters["a"].block[0].fill_diagonal_(-1.0)
    merge(again)
    unmerge(again)
    assert torch.equal(again.map.weight, weight)


def test_miss_is_of_rank_r_and_bat_is_not(one) -> None:
    delta = {}
    for method in ("miss", "bat_col"):
        model = one(method, inputs=24, outputs=16, rank=4, moved=0.5)
        weight = model.map.weight.detach()
        delta[method] = model.map.adapters["a"].changed(weight, 1.0).detach() - weight
    assert torch.linalg.matrix_rank(delta["miss"]) == 4
    assert torch.linalg.matrix_rank(delta["bat_col"]) == 16


def test_miss_of_rank_one_adds_the_sum_of_the_input(one) -> None:
    model = one("miss", rank=1, moved=0.5)
    x = input_rows(5, 12)
    block_1O = model.map.adapters["a"].block.detach()
    expected = linear(x, model.map.weight, model.map.bias) + x.sum(1, keepdim=True) * block_1O
    torch.testing.assert_close(model(x), expected, atol=1e-12, rtol=1e-12)


def test_bat_of_a_zero_weight_tiles_its_blocks() -> None:
    blocks = torch.randn(2, 3, 3)
    assert torch.equal(tiles.bat_col(torch.zeros(6, 9), blocks), blocks.reshape(6, 3).repeat(1, 3))


def test_bat_with_as_many_outputs_as_rank_is_one_shared_product() -> None:
    weight, block = torch.randn(4, 12, dtype=torch.float64), torch.randn(1, 4, 4, dtype=torch.float64)
    expected = [tile @ (torch.eye(4) + block[0]) + block[0] for tile in weight.split(4, 1)]
    torch.testing.assert_close(tiles.bat_col(weight, block), torch.cat(expected, 1), atol=1e-12, rtol=1e-12)


def test_the_block_of_bat_belongs_to_a_row_of_tiles_and_multiplies_from_the_right() -> None:
    weight, blocks = torch.randn(4, 4), torch.zeros(2, 2, 2)
    blocks[0, 0, 1] = 1.0  # column 1 of every tile in the first row of tiles gains its column 0, and 1 in its row 0
    expected = weight.clone()
    for c in (0, 2):
        expected[0:2, c + 1] += weight[0:2, c]
        expected[0, c + 1] += 1.0
    assert torch.equal(tiles.bat_col(weight, blocks), expected)
    expected = weight.clone()  # down a column of tiles instead
    for a in (0, 2):
        expected[a : a + 2, 1] += weight[a : a + 2, 0]
        expected[a, 1] += 1.0
    assert torch.equal(tiles.bat_ab(weight, blocks, blocks), expected)


def test_mini_as_wide_as_the_output_is_miss_to_the_bit_and_its_gradient_sums_the_repeats(one) -> None:
    x = input_rows(5, 12)
    target = input_rows(5, 8)
    mini, miss = one("mini", mini_rank=8, moved=0.2), one("miss", moved=0.2)
    assert torch.equal(mini(x), miss(x))
    narrow, whole = one("mini", mini_rank=2, moved=0.2), one("miss")
    with torch.no_grad():
        whole.map.adapters["a"].block.copy_(narrow.map.adapters["a"].block.repeat(1, 4))
    for model in (narrow, whole):
        ((model(x) - target) ** 2).sum().backward()
    summed = whole.map.adapters["a"].block.grad.unflatten(1, (4, 2)).sum(1)
    torch.testing.assert_close(narrow.map.adapters["a"].block.grad, summed, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("method", "inputs", "outputs"), [c for c in CASES if c[0] != "dora"])
def test_gradients_agree_with_finite_differences_and_so_do_theirs(one, method, inputs, outputs) -> None:
    model = one(method, inputs, outputs, moved=0.1)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    at = [model.get_parameter(name).detach().clone().requires_grad_() for name in names]

    def output(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (x,))

    x = input_rows(3, inputs).requires_grad_()
    assert torch.autograd.gradcheck(output, (x, *at))
    assert torch.autograd.gradgradcheck(output, (x, *at))


def test_dora_has_the_gradient_with_its_norm_held_still(one) -> None:
    model = one("dora", moved=0.2)
    adapter, weight = model.map.adapters["a"], model.map.weight.detach()
    x = input_rows(6, 12)
    (model(x) ** 3).sum().backward()
    leaves = [p.detach().clone().requires_grad_() for p in (adapter.down, adapter.up, adapter.magnitude)]
    down, up, magnitude = leaves
    norm = (weight + up @ down).norm(dim=1, keepdim=True).detach()
    expected = linear(x, magnitude[:, None] * (weight + up @ down) / norm, model.map.bias)
    (expected**3).sum().backward()
    for got, leaf in zip((adapter.down, adapter.up, adapter.magnitude), leaves, strict=True):
        torch.testing.assert_close(got.grad, leaf.grad, atol=1e-9, rtol=1e-9)


def test_at_the_first_step_no_block_gradient_is_zero_while_one_of_loras_is(one) -> None:
    x = input_rows(5, 12)
    for method in ("miss", "bat_col", "bat_row", "lora"):
        model = one(method)
        (model(x) ** 2).sum().backward()
        zero = [bool((p.grad == 0).all()) for p in model.map.adapters["a"].parameters()]
        assert zero == ([True, False] if method == "lora" else [False])


def test_trainable_counts(one) -> None:
    inputs, outputs, r = 12, 8, 4
    expected = {
        "bat_col": outputs * r,
        "bat_row": inputs * r,
        "bat_ab": 2 * inputs * r,
        "miss": r * outputs,
        "mini": r * 2,
        "lora": r * (inputs + outputs),
        "rslora": r * (inputs + outputs),
        "dora": r * (inputs + outputs) + outputs,
    }
    counts = {m: trainable_count(one(m, **({"mini_rank": 2} if m == "mini" else {}))) for m in METHODS}
    assert counts == expected


@given(inputs=st.integers(1, 40), r=st.integers(1, 50))
def test_unfold_is_the_transpose_of_fold(inputs: int, r: int) -> None:
    x, s = torch.randn(3, inputs, dtype=torch.float64), torch.randn(3, r, dtype=torch.float64)
    folded = tiles.fold(x, r)
    for t in range(r):
        torch.testing.assert_close(folded[:, t], x[:, t::r].sum(1))
    torch.testing.assert_close((folded * s).sum(), (x * tiles.unfold(s, inputs)).sum())
    torch.testing.assert_close(tiles.add_unfolded(x.clone(), s), x + tiles.unfold(s, inputs))


@every_method
def test_the_gradient_of_each_sample_by_itself_as_torch_func_computes_it(one, method) -> None:
    model = one(method, moved=0.1)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    x = input_rows(4, 12)

    def loss(parameters: dict[str, torch.Tensor], row: torch.Tensor) -> torch.Tensor:
        return (torch.func.functional_call(model, parameters, (row[None],)) ** 2).sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))({n: p.detach() for n, p in trained.items()}, x)
    for row in range(4):
        model.zero_grad()
        (model(x[row : row + 1]) ** 2).sum().backward()
        for name, parameter in trained.items():
            torch.testing.assert_close(each[name][row], parameter.grad, atol=1e-10, rtol=1e-10)


@every_method
def test_autocast_trains_in_its_own_format(one, method) -> None:
    model = one(method, dtype=torch.float32, moved=0.1)
    x = input_rows(6, 12, torch.float32).requires_grad_()
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.float(), exact, atol=0.05, rtol=0.05)
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in model.map.adapters.parameters())


def test_bat_keeps_no_second_weight_for_the_backward_pass(one) -> None:
    kept: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    model = one("bat_col", inputs=64, outputs=64, moved=0.1)
    x = input_rows(2, 64).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        model(x)
    own = {p.data_ptr() for p in model.parameters()} | {x.data_ptr()}
    assert kept
    assert set(kept) <= own


def test_miss_keeps_the_folded_input_only(one) -> None:
    kept: list[tuple[int, ...]] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    model = one("miss", inputs=64, outputs=8, rank=4, moved=0.1)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        model(input_rows(10, 64).requires_grad_() * 1.0)
    assert (10, 64) not in kept
    assert (10, 4) in kept
