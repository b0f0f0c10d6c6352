from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from resilin.optim.groups import Rule, make_groups


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.up = nn.Linear(4, 8)
        self.norm = nn.LayerNorm(8)
        self.down = nn.Linear(8, 4, bias=False)
        self.experts = nn.Parameter(torch.zeros(3, 4, 4))
        self.expert_bias = nn.Parameter(torch.zeros(3, 4))


def assigned(**kwargs: object) -> dict[str, tuple[float, float]]:
    groups = make_groups(Net(), 0.1, **kwargs)  # type: ignore[arg-type]
    return {name: (g.lr_scale, g.weight_decay) for g in groups for name, _ in g.parameters}


def test_norms_and_biases_do_not_decay_unless_asked_to() -> None:
    found = assigned()
    assert {name for name, (_, decay) in found.items() if decay == 0} == {
        "up.bias",
        "norm.weight",
        "norm.bias",
        "expert_bias",
    }
    assert all(decay == 0.1 for _, decay in assigned(decay_vectors=True).values())


def test_embeddings_decay_unless_told_not_to_even_where_the_head_shares_them() -> None:
    assert assigned()["embed.weight"] == (1.0, 0.1)
    assert assigned(decay_embeddings=False)["embed.weight"] == (1.0, 0.0)
    net = Net()
    net.head = nn.Linear(4, 5, bias=False)
    net.head.weight = net.embed.weight
    groups = make_groups(net, 0.1, decay_embeddings=False)
    assert sum(name == "embed.weight" for g in groups for name, _ in g.parameters) == 1


def test_the_first_matching_rule_wins_and_speaks_before_the_switches() -> None:
    rules = (Rule(match="up.*", lr_scale=0.5), Rule(match="*.bias", weight_decay=0.7, lr_scale=3.0), Rule(ndim=3))
    found = assigned(rules=rules)
    assert found["up.weight"] == (0.5, 0.1)
    assert found["up.bias"] == (0.5, 0.0)  # the first rule does not speak of decay: the switch does
    assert found["norm.bias"] == (3.0, 0.7)
    assert found["experts"] == (1.0, 0.1)


def test_a_rule_that_decides_nothing_is_named() -> None:
    with pytest.raises(ValueError, match=r"rules\[1\].*'match': 'head\.\*'.*embed\.weight"):
        assigned(rules=(Rule(match="up.*"), Rule(match="head.*")))
    with pytest.raises(ValueError, match=r"rules\[1\].*earlier rule"):
        assigned(rules=(Rule(match="*"), Rule(match="up.*")))


def test_scales_by_name_multiply_with_a_rule_s() -> None:
    found = assigned(rules=(Rule(match="up.*", lr_scale=0.5),), lr_scales={"up.weight": 4.0, "down.weight": 3.0})
    assert (found["up.weight"][0], found["down.weight"][0], found["embed.weight"][0]) == (2.0, 3.0, 1.0)


@settings(deadline=None, max_examples=30)
@given(
    frozen=st.sets(st.integers(1, 5)),
    patterns=st.sampled_from([(), ("*.weight",), ("e*",), ("*.weight", "e*")]),
)
def test_every_trainable_parameter_is_in_exactly_one_group(frozen: set[int], patterns: tuple[str, ...]) -> None:
    net = Net()
    for index, parameter in enumerate(net.parameters()):
        parameter.requires_grad_(index not in frozen)
    wanted = [name for name, p in net.named_parameters() if p.requires_grad]
    rules = tuple(Rule(match=pattern, lr_scale=2.0) for pattern in patterns)
    groups = make_groups(net, 0.1, rules=(*rules, Rule()))
    assert sorted(name for g in groups for name, _ in g.parameters) == sorted(wanted)


def test_a_model_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        make_groups(Net().requires_grad_(False), 0.1)
