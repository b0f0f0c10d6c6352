"""One chain more: the old model stays inside, to the bit, whatever is trained behind it."""

from __future__ import annotations

import pytest
import torch
from chain_cases import chain_decoder, chain_settings
from hypothesis import given, settings
from hypothesis import strategies as st
from split_steps import batch_of, keys_at

from resilin.adapt.adapted import Adapted
from resilin.adapt.attach import adapter_parameters, attach
from resilin.adapt.merge import merge
from resilin.adapt.settings import AdapterSettings
from resilin.adapt.targets import AdapterError
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.huggingface import save_pretrained
from resilin.models.settings import ModelContext
from resilin.nested import Budget, BudgetError, budget, extract
from resilin.nested.chain_expand import expand
from resilin.nested.chain_models import Expanded
from resilin.objective.next_token import NextToken
from resilin.optim.adamw import AdamW

TOKENS = torch.tensor([[1, 5, 9, 2, 30, 4, 11], [3, 3, 36, 7, 0, 12, 8]])


def plain(dtype=torch.float32, **more) -> Decoder:
    tree = {
        "vocab_size": 37, "hidden_size": 32, "layers": 2, "heads": 8, "kv_heads": 4, "mlp_size": 48, "init_std": 0.2,
    }  # fmt: skip
    return Decoder(DecoderSettings(**(tree | more)), seed=3).to(dtype)


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model.logits(model(tokens).hidden_BTD)


def randomise(model, chain: int) -> None:
    """Any values for a chain, but for its columns of the output matrix."""
    for name, parameter in model.named_parameters():
        if f".chains.{chain}." in name and not name.startswith("head."):
            torch.nn.init.normal_(parameter.data)


def train(model, steps=3, **more) -> None:
    optimizer = AdamW(lr=0.05, weight_decay=0.5).build(model, steps)
    for step in range(steps):
        optimizer.zero_grad()
        NextToken().build()(model, batch_of(range(4), step), keys_at(step)).sum.backward()
        optimizer.step(step)


BASES = st.builds(
    plain,
    tie_embeddings=st.booleans(),
    qkv_bias=st.booleans(),
    mlp_bias=st.booleans(),
    qk_norm=st.sampled_from(["none", "rms"]),
    norm=st.sampled_from(["rms", "layer"]),
    gated=st.booleans(),
    head_size=st.sampled_from([None, 8]),
)


@settings(max_examples=20, deadline=None)
@given(BASES, st.sampled_from([(2, False), (4, False), (4, True), (8, True)]))
def test_an_expanded_model_computes_the_old_logits(base, chosen):
    """Exactly, whatever the new chain holds; and the first chain is the old model."""
    heads, share_keys = chosen
    wide = expand(base, heads, share_keys=share_keys)
    randomise(wide, 1)
    old = logits(base)
    assert torch.equal(logits(wide), old)
    with budget(wide, Budget(chains=1)):
        assert torch.equal(logits(wide), old)
    back = extract(wide, Budget(chains=1))
    assert torch.equal(logits(back), old)
    assert wide.settings.hidden_size == 32 + 4 * heads
    assert wide.settings.mlp_size == 48 + 6 * heads
    assert wide.settings.key_heads == (4 if share_keys else 4 + heads // 2)


@pytest.mark.parametrize("share_keys", [False, True])
def test_training_the_new_chain_leaves_the_old_model(share_keys):
    base = plain()
    old, wide = logits(base), expand(base, 4, share_keys=share_keys)
    train(wide)
    with budget(wide, Budget(chains=1)):
        assert torch.equal(logits(wide), old)
    assert not torch.allclose(logits(wide), old, atol=1e-2)


def test_the_first_step_reaches_the_new_columns_of_the_head_alone():
    wide, reached = expand(plain(), 4), []
    optimizer = AdamW(lr=0.05).build(wide, 2)
    for step in range(2):
        optimizer.zero_grad()
        NextToken().build()(wide, batch_of(range(4), step), keys_at(step)).sum.backward()
        reached.append({name for name, p in wide.named_parameters() if p.grad is not None and p.grad.any()})
        optimizer.step(step)
    assert reached[0] == {"head.chains.1.weight"}
    assert reached[1] == {name for name, _ in wide.named_parameters() if ".chains.1." in name}


def test_new_matrices_are_drawn_as_told():
    wide = expand(plain(hidden_size=256, mlp_size=512, head_size=32), 8, init_std=0.05, seed=4)
    parts = dict(wide.named_parameters())
    assert float(parts["blocks.0.attention.q.chains.1.weight"].detach().std()) == pytest.approx(0.05, rel=0.05)
    assert float(parts["blocks.0.mlp.down.chains.1.weight"].detach().std()) == pytest.approx(0.025, rel=0.05)
    assert not parts["head.chains.1.weight"].any()
    assert torch.equal(parts["blocks.0.mlp_norm.chains.1.weight"], torch.ones(256))
    again, other = (
        expand(plain(hidden_size=256, mlp_size=512, head_size=32), 8, init_std=0.05, seed=s) for s in (4, 5)
    )
    assert torch.equal(again.embed.weight, wide.embed.weight)
    assert not torch.equal(other.embed.weight, wide.embed.weight)


def test_chain_after_chain():
    first = plain(torch.float64)
    second = expand(first, 4)
    train(second)
    third = expand(second, 2)
    train(third)
    assert third.settings.chains.sizes == (8, 4, 2)
    assert third.settings.chains.frozen == 2
    for chains, old in ((1, first), (2, second)):
        with budget(third, Budget(chains=chains)):
            torch.testing.assert_close(logits(third), logits(old), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("base", "heads", "more", "said"),
    [
        ({}, 1, {}, "use a multiple of 2"),
        ({"heads": 8, "mlp_size": 50}, 2, {}, "or say how many neurons"),
        ({}, 2, {"share_keys": True}, "use a multiple of 4"),
        ({"moe": {"expert_size": 8}}, 4, {}, "a router reads all chains"),
        ({}, 0, {}, "at least one"),
    ],
)
def test_what_cannot_be_expanded_is_refused(base, heads, more, said):
    with pytest.raises(BudgetError, match=said):
        expand(plain(**base), heads, **more)


def test_chains_that_share_keys_go_on_sharing():
    wide = expand(plain(kv_heads=2), 2, share_keys=True)
    assert expand(wide, 2).settings.shares_keys
    with pytest.raises(BudgetError, match="a further chain cannot change"):
        expand(wide, 2, share_keys=False)


def test_neurons_can_be_told():
    wide = expand(plain(mlp_size=50), 2, neurons=7)
    assert wide.settings.chains.mlp_sizes == (50, 7)
    assert torch.equal(logits(wide), logits(plain(mlp_size=50)))


def test_settings_expand_whatever_model_they_hold(tmp_path):
    base = plain()
    save_pretrained(base, tmp_path)
    inner = {"use": "resilin.models.pretrained:Pretrained", "path": str(tmp_path)}
    wide = Expanded(model=inner, heads=4).build(ModelContext(1, 37))
    assert torch.equal(logits(wide), logits(base))
    outline = Expanded(model=inner, heads=4).outline(ModelContext(1, 37))
    told = {name: (p.shape, p.requires_grad) for name, p in outline.named_parameters()}
    assert told == {name: (p.shape, p.requires_grad) for name, p in wide.named_parameters()}
    assert not wide.embed.chains[0].weight.requires_grad
    free = Expanded(model=inner, heads=4, frozen=0).build(ModelContext(1, 37))
    assert all(p.requires_grad for p in free.parameters())


# -- adapters on later chains -----------------------------------------------------------------------------------------


def adapted(**more) -> Decoder:
    chosen = chain_settings(chains={"sizes": (2, 2, 4), "frozen": 1})
    model = chain_decoder(chosen, torch.float32)
    attach(model, {"lora": AdapterSettings(method="lora", rank=2, **more)})
    return model


@pytest.mark.parametrize("targets", ["all-linear", ("q", "down_proj")])
def test_adapters_go_to_chains_that_are_not_frozen(targets):
    model = adapted(targets=targets)
    with torch.no_grad(), budget(model, Budget(chains=1)):
        old = model(TOKENS).hidden_BTD.clone()
    names = {name for name, _ in adapter_parameters(model)}
    assert names
    assert not any(".chains.0." in name or name.startswith("head.") for name in names)
    assert {int(name.partition(".chains.")[2][0]) for name in names} == {1, 2}
    train(model)
    assert all(p.requires_grad == (".adapters." in name) for name, p in model.named_parameters())
    with torch.no_grad(), budget(model, Budget(chains=1)):
        assert torch.equal(model(TOKENS).hidden_BTD, old)
    whole = logits(model)
    merge(model)
    torch.testing.assert_close(logits(model), whole, rtol=1e-4, atol=1e-4)


def test_an_adapter_for_frozen_chains_alone_is_refused():
    with pytest.raises(AdapterError, match="matches no linear map"):
        adapted(targets=r".*\.chains\.0")


def test_adapted_settings_know_frozen_chains():
    tree = chain_settings(chains={"sizes": (2, 2, 4), "frozen": 2}).model_dump()
    model = Adapted(model=tree).build(ModelContext(0, 37))
    assert all(".chains.2." in name for name, _ in adapter_parameters(model))
