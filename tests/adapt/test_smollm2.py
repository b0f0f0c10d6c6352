"""A real model, SmolLM2-135M-Instruct, where its package is installed: PEFT folders both ways, and the commands of
docs/fine-tune-smollm2.md, from a chat file to `peft` and `transformers`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from resilin.adapt import AdapterSettings, attach, load_adapter, merge, save_adapter, unmerge, without_adapters
from resilin.cli.main import app
from resilin.models.decoder import Decoder
from resilin.models.huggingface import load_pretrained
from resilin.run.open_model import open_model

pytestmark = pytest.mark.slow

TOKENS = torch.tensor([[504, 3575, 282, 4649, 314, 7042, 30]])


EXAMPLES = Path(__file__).parents[2] / "examples"
SHORT = ["train.steps=2", "train.batch_size=2", "train.threads=1", "precision.compute=fp32", "evaluation.every=0"]
SHORT += ["evaluation.at_start=false", "log.live=false", "log.tensorboard=false"]
KINDS = {
    "lora": {"method": "lora", "rank": 8},
    "rslora": {"method": "rslora", "rank": 8},
    "dora": {"method": "dora", "rank": 8},
    "miss": {"method": "miss", "rank": 16},
    "bat": {"method": "bat", "rank": 64},
    "mini": {"method": "mini", "rank": 16, "mini_rank": 32},
}


def call(*arguments: str) -> str:
    result = CliRunner().invoke(app, [*arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        if isinstance(model, Decoder):
            return model.logits(model(TOKENS).hidden_BTD)
        return model.eval()(TOKENS).logits


@pytest.fixture(scope="module")
def base(tmp_path_factory, smollm2_gguf: Path) -> Path:
    folder = tmp_path_factory.mktemp("walk") / "smollm2"
    call("export", str(smollm2_gguf), str(folder))
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


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", KINDS)
def test_from_a_chat_file_to_peft_and_transformers_by_commands_alone(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(EXAMPLES)
    (tmp_path / "smollm2").symlink_to(base)
    # Two steps of 1e-2 make Bat's blocks as large as the identity beside them, and rounding large with them.
    rate = "optimizer.lr=1e-3" if kind == "bat" else "optimizer.lr=1e-2"
    table = ", ".join(f'{key} = "{v}"' if isinstance(v, str) else f"{key} = {v}" for key, v in KINDS[kind].items())
    call("sft", "examples/smollm2/sft.toml", *SHORT, rate, f"model.adapters.default={{{table}}}")
    run = "bikes-sft"
    if kind == "miss":
        call("dpo", "examples/smollm2/dpo.toml", *SHORT, rate)
        run = "bikes-dpo"
    assert "in use" in call("adapter", "show", f"runs/{run}")
    call("adapter", "save", f"runs/{run}", "adapter")
    call("adapter", "merge", "smollm2", "adapter", "merged")
    answer = call("generate", f"runs/{run}", "--chat", "-p", "My chain squeaks.", "-n", "3", "--temperature", "0")
    assert answer.strip()

    ours = logits(open_model(f"runs/{run}", device="cpu", plain=False).model)
    assert (ours - logits(load_pretrained("smollm2"))).abs().max() > 0.1
    close = {"rtol": 1e-5, "atol": 1e-5 * float(ours.abs().max())}
    for folder in ("merged", f"runs/{run}/model"):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        torch.testing.assert_close(logits(theirs), ours, **close)
    for folder in ("adapter", f"runs/{run}/adapter"):
        theirs = peft.AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        torch.testing.assert_close(logits(theirs), ours, **close)
