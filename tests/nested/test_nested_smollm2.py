"""A real model made nested: SmolLM2-135M, where its package is installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from resilin.keys import Keys
from resilin.models.pretrained import Pretrained
from resilin.models.settings import ModelContext
from resilin.nested import Budget, budget, extract_folder
from resilin.nested.consistency import consistency
from resilin.nested.importance import importance, put_in_order
from resilin.nested.objective import Nested
from resilin.nested.speculative import speculate
from resilin.nested.text_batches import text_batches
from resilin.optim.adamw import AdamW
from resilin.run.export import export_model
from resilin.run.open_model import open_model

transformers = pytest.importorskip("transformers")

TEXT = Path(__file__).read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_smollm2_is_put_in_order_trained_a_little_and_cut(smollm2_gguf: Path, tmp_path: Path) -> None:
    opened = open_model(smollm2_gguf, device="cpu")
    words = opened.needed_tokenizer()
    model = Pretrained(path=smollm2_gguf).build(ModelContext(0, words.vocab_size))
    tokens = words.encode(TEXT)[:400]
    (batch,) = text_batches(tokens, 128)
    shown = torch.tensor([tokens[:32]])
    half = Budget(ffn=768)
    with torch.no_grad():
        before = model.logits(model(shown).hidden_BTD)
    unordered = consistency(model, [half], [batch])[0]
    put_in_order(model, importance(model, [batch]))
    with torch.no_grad():
        torch.testing.assert_close(model.logits(model(shown).hidden_BTD), before, rtol=1e-3, atol=1e-2)
    ordered = consistency(model, [half], [batch])[0]
    assert ordered.loss < unordered.loss  # half of the neurons, but the half that matters

    objective = Nested(granularities=(0.5, 1), mode="joint-mean").build()
    optimizer = AdamW(lr=1e-4).build(model, 6)
    for step in range(6):
        optimizer.zero_grad()
        loss = objective(model, batch, Keys(0, step, batch.slots_B))
        (loss.sum / loss.units).backward()
        optimizer.step(step)
    trained = consistency(model, [half], [batch])[0]
    assert trained.loss < ordered.loss

    export_model(model, words, tmp_path / "nested")
    export_model(extract_folder(tmp_path / "nested", half), words, tmp_path / "half")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32).eval()
    with torch.no_grad(), budget(model, half):
        torch.testing.assert_close(theirs(shown).logits, model.logits(model(shown).hidden_BTD), rtol=1e-3, atol=1e-2)
    drafts = speculate(model, tokens[:16], half, 12)
    assert len(list(drafts)) == 12
    assert drafts.drafts.rounds <= 12
