"""Experts divided among ranks, against one process that has them all and all tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forked import run_ranks

from resilin.models.decoder import Decoder
from resilin.models.decoder_plan import decoder_plan
from resilin.models.decoder_settings import DecoderSettings, MoESettings
from resilin.models.initial import fill_parameters
from resilin.models.moe import MoE
from resilin.nouns import Batch
from resilin.objective.next_token import NextToken
from resilin.parallel.degrees import Degrees
from resilin.parallel.errors import ParallelError
from resilin.parallel.exchange import add_up
from resilin.parallel.expert import Dispatch, ExpertTable, FlatExchange, TwoLevelExchange, parallelise_experts
from resilin.parallel.group import Group, make_groups
from resilin.parallel.local_model import LocalModel
from resilin.parallel.tensor import parallelise
from resilin.parallel.world import World


def layer(moe: MoESettings, gated: bool = True) -> MoE:
    settings = DecoderSettings(hidden_size=16, heads=2, gated=gated, moe=moe, init="fan_in")
    module = MoE(settings, moe)
    fill_parameters(module, settings, 3)
    return module


CASES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "even": ({"experts": 4}, (5, 5, 5, 5)),
    "experts that do not divide, one rank without": ({"experts": 5}, (3, 7, 1, 4)),
    "a rank without tokens": ({"experts": 6, "experts_per_token": 3}, (4, 0, 6, 2)),
    "no tokens but one": ({"experts": 4}, (0, 0, 1, 0)),
    "one expert per token": ({"experts": 8, "experts_per_token": 1, "normalise_weights": False}, (9, 2, 3, 3)),
    "shared expert": ({"experts": 4, "shared_size": 6, "shared_gate": True}, (3, 3, 2, 4)),
    "logits first": ({"experts": 4, "routing": "topk_softmax"}, (3, 3, 2, 4)),
    "all want one expert": ({"experts": 6, "experts_per_token": 1, "normalise_weights": False}, (4, 4, 4, 4)),
}


def one_case(rank: int, name: str, exchange: Any, dtype: torch.dtype) -> dict[str, float]:
    """The largest differences from the single process, relative to the largest value."""
    options, tokens = CASES[name]
    moe = MoESettings(expert_size=10, **options)
    whole = layer(moe, gated=name != "even").to(dtype)
    if name == "all want one expert":
        with torch.no_grad():
            whole.router.weight.zero_()
            whole.router.weight[5] = 1.0
    generator = torch.Generator().manual_seed(7)
    x = torch.rand(1, sum(tokens), 16, generator=generator).to(dtype).requires_grad_()
    pull = torch.randn(1, sum(tokens), 16, generator=generator).to(dtype)
    begin = sum(tokens[:rank])
    mine = slice(begin, begin + tokens[rank])
    part = copy.deepcopy(whole)
    local = parallelise_experts(part, exchange.group, exchange)
    my_x = x.detach()[:, mine].clone().requires_grad_()
    out, router = part(my_x)
    (out * pull[:, mine]).sum().backward()
    want, want_router = whole(x)
    (want * pull).sum().backward()
    assert x.grad is not None
    pairs = {"out": (out, want[:, mine]), "router": (router, want_router[:, mine]), "x": (my_x.grad, x.grad[:, mine])}
    for key, parameter in part.named_parameters():
        full = dict(whole.named_parameters())[key].grad
        grad = parameter.grad
        assert full is not None
        if key.startswith("experts."):
            pairs[key] = (grad, local.part(key, full))
        else:
            grad = torch.zeros_like(parameter) if grad is None else grad
            dist.all_reduce(grad)
            pairs[key] = (grad, full)
    found = {}
    for key, (got, expected) in pairs.items():
        assert got is not None
        got, expected = got.detach(), expected.detach()
        assert got.shape == expected.shape, key
        scale = float(expected.abs().max()) if expected.numel() else 1.0
        found[f"{name}: {key}"] = float((got - expected).abs().max()) / (scale or 1.0) if got.numel() else 0.0
    return found


def all_cases(rank: int, two_level: bool) -> dict[str, float]:
    group = Group.of()
    exchange: Any = FlatExchange(group)
    if two_level:
        node, peers = make_groups([[0, 1], [2, 3]], rank, "node"), make_groups([[0, 2], [1, 3]], rank, "peers")
        exchange = TwoLevelExchange(group, node, peers)
    found: dict[str, float] = {}
    for name in CASES:
        found |= one_case(rank, name, exchange, torch.float32)
    return found


@pytest.mark.parametrize("two_level", [False, True])
def test_outputs_and_gradients_are_those_of_one_process(two_level):
    for found in run_ranks(4, all_cases, two_level):
        assert len(found) > 7 * len(CASES) - 10
        assert {key: off for key, off in found.items() if off > 1e-5} == {}


def held(rank: int) -> dict[str, tuple[int, ...]]:
    part = layer(MoESettings(experts=5, expert_size=10))
    parallelise_experts(part, Group.of())
    return {name: tuple(p.shape) for name, p in part.named_parameters()}


def test_a_rank_holds_its_own_experts_only():
    shapes = run_ranks(3, held)
    assert [shape["experts.up"] for shape in shapes] == [(2, 10, 16), (2, 10, 16), (1, 10, 16)]
    assert [shape["experts.down"][0] for shape in shapes] == [2, 2, 1]
    assert all(shape["router.weight"] == (5, 16) for shape in shapes)


def decoder(recompute: str = "none") -> Decoder:
    moe = MoESettings(experts=5, experts_per_token=2, expert_size=12, shared_size=8, dense_layers=(1,))
    return Decoder(
        DecoderSettings(vocab_size=32, hidden_size=16, heads=2, layers=3, moe=moe, recompute=recompute, init="fan_in")
    )


def step(model: Decoder, rows: slice) -> torch.Tensor:
    tokens = torch.randint(32, (8, 13), generator=torch.Generator().manual_seed(1))
    labels = torch.where(torch.rand(8, 12, generator=torch.Generator().manual_seed(2)) < 0.3, -100, tokens[:, 1:])
    slots = torch.arange(8)
    batch = Batch(slots[rows], {"tokens": tokens[rows, :-1], "labels": labels[rows]})
    objective = NextToken(load_balance=0.1, router_z_loss=0.01).build()
    loss = objective(model, batch, None)
    loss.sum.backward()
    return loss.sum.detach()


def decoder_case(rank: int, degrees: Degrees, recompute: str, sequence: bool) -> dict[str, float]:
    world = World(degrees, rank)
    whole = decoder()
    want = step(whole, slice(0, 8))
    model = decoder(recompute)
    local = parallelise_experts(model, world.group("ep"))
    local = parallelise(local, decoder_plan(model.settings), world.group("tp"), sequence=sequence)
    rows, data = 8 // degrees.data, world.coordinate("dp")
    loss = step(model, slice(rows * data, rows * (data + 1)))
    add_up(loss, world.group("dp"))
    local.sum_gradients()
    found = {"loss": float(abs(loss - want) / want)}
    wholes = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        known = local.parameters[name]
        experts = any(cut.axis == "ep" for cut in known.spec.cuts)
        assert experts == (".experts." in name)
        grad = parameter.grad
        assert grad is not None
        add_up(grad, world.group("edp") if experts else world.group("dp"))
        full = wholes[name].grad
        assert full is not None
        full = local.part(name, full)
        found[name] = float((grad - full).norm()) / (float(full.norm()) or 1.0)
    return found


@pytest.mark.parametrize(
    ("degrees", "recompute", "sequence"),
    [
        (Degrees(data=4, expert=4), "none", False),
        (Degrees(data=4, expert=2), "block", False),
        (Degrees(data=4, expert=2), "selective", False),
        (Degrees(data=2, expert=2, tensor=2), "none", False),
        (Degrees(data=2, expert=2, tensor=2), "none", True),
    ],
    ids=str,
)
def test_a_decoder_with_router_losses_has_the_loss_and_gradients_of_one_process(degrees, recompute, sequence):
    for found in run_ranks(4, decoder_case, degrees, recompute, sequence):
        assert {name: off for name, off in found.items() if not off < 1e-5} == {}


def twice(rank: int) -> bool:
    part = layer(MoESettings(experts=3, expert_size=10))
    parallelise_experts(part, Group.of())
    x = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(rank))
    results = []
    for _ in range(2):
        part.zero_grad()
        out, _ = part(x)
        out.square().sum().backward()
        results.append([out, *(p.grad for p in part.parameters())])
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradients_are_the_same_bits_every_time():
    assert run_ranks(3, twice) == [True] * 3


def test_one_rank_changes_nothing():
    model = layer(MoESettings(experts=3, expert_size=10))
    local = LocalModel.of(model)
    assert parallelise_experts(local, Group.alone()) is local
    assert model.experts.dispatch is None


def refused(rank: int) -> list[str]:
    said = []
    for module in (torch.nn.Linear(2, 2), layer(MoESettings(experts=1, experts_per_token=1))):
        try:
            parallelise_experts(module, Group.of())
        except ParallelError as error:
            said.append(str(error))
    return said


def test_models_that_cannot_be_divided_are_refused():
    for said in run_ranks(2, refused):
        assert "the model has none" in said[0]
        assert "1 experts cannot be divided among 2 ranks" in said[1]


def test_a_table_for_other_ranks_is_refused():
    with pytest.raises(ParallelError, match="is given 1 ranks"):
        Dispatch(ExpertTable.runs((2, 2)), FlatExchange(Group.alone()))
