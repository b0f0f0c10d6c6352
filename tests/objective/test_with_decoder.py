from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings, MoESettings
from resilin.nouns import Batch
from resilin.objective.next_token import NextToken

VOCABULARY = 37


def decoder(**fields: Any) -> Decoder:
    return Decoder(DecoderSettings(vocab_size=VOCABULARY, hidden_size=16, layers=2, heads=2, **fields), seed=0)


def packed_batch() -> Batch:
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (3, 10), generator=g)
    labels = tokens.roll(-1, 1)
    labels[:, -1] = -100
    labels[1, 3:] = -100
    documents = torch.zeros(3, 10, dtype=torch.int32)
    documents[0, 5:] = 1
    documents[1, 4:] = -1
    return Batch(torch.arange(3), {"tokens": tokens, "labels": labels, "documents": documents})


@pytest.mark.parametrize(
    "fields",
    [{}, {"tie_embeddings": True}, {"logit_softcap": 2.0}, {"moe": MoESettings(experts=4, expert_size=8)}],
    ids=["untied", "tied", "softcap", "experts"],
)
def test_a_decoder_gets_the_gradient_of_plain_cross_entropy_on_its_logits(fields: dict[str, Any]) -> None:
    model, batch = decoder(**fields), packed_batch()
    NextToken(load_balance=0, router_z_loss=0).build()(model, batch, None).sum.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    logits = model.logits(model(batch["tokens"], None, batch["documents"]).hidden_BTD)
    F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum").backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_experts_feel_the_router_s_losses_and_dense_models_have_none() -> None:
    model, batch = decoder(moe=MoESettings(experts=4, expert_size=8)), packed_batch()
    loss = NextToken(load_balance=1.0).build()(model, batch, None)
    assert 1.0 <= loss.logs["load_balance"].value() <= 2.0  # balanced, to everything on two of the four experts
    plain = NextToken(load_balance=0.0).build()(model, batch, None)
    router = next(p for n, p in model.named_parameters() if "router" in n)
    with_loss, without = (torch.autograd.grad(x.sum, router)[0] for x in (loss, plain))
    assert not torch.allclose(with_loss, without)
    assert "load_balance" not in NextToken().build()(decoder(), batch, None).logs


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_in_bf16_the_loss_is_that_of_whole_logits() -> None:
    model, batch = decoder().cuda(), packed_batch().to("cuda")
    with torch.autocast("cuda", torch.bfloat16):
        chunked, whole = (NextToken(chunk=chunk).build()(model, batch, None) for chunk in (7, 0))
    torch.testing.assert_close(chunked.sum, whole.sum, rtol=1e-3, atol=0)
    chunked.sum.backward()
    assert model.embed.weight.grad is not None
    assert model.embed.weight.grad.dtype == torch.float32
