"""Adapters in a run: trained by settings, saved once with the base, resumed to the bit, opened and exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from resilin.adapt.adapted import Adapted
from resilin.adapt.attach import adapted_maps, attach, trainable_count
from resilin.adapt.peft_folder import save_adapter
from resilin.adapt.settings import AdapterSettings
from resilin.adapt.targets import AdapterError
from resilin.config import parse_settings
from resilin.keys import Keys
from resilin.models.decoder import Decoder
from resilin.models.huggingface import load_pretrained, save_pretrained
from resilin.models.settings import ModelContext
from resilin.run.export import export_model
from resilin.run.open_model import open_model
from resilin.run.settings import RunSettings
from resilin.run.start import start_run

TOKENS = torch.randint(0, 40, (4, 9), generator=torch.Generator().manual_seed(2))


def same(one: dict, other: dict) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def tree(text: Path, **changes: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 16, "layers": 2, "heads": 2, "mlp_size": 24}
    return {
        "source": {
            "paths": [str(text)],
            "sequence_length": 16,
            "tokenizer": {"kind": "bytes"},
            "cache": str(text.parent / "cache"),
            "held_out": {"fraction": 0.0},
        },
        "model": {
            "use": "resilin.adapt.adapted:Adapted",
            "model": sizes,
            "adapters": {
                "first": {"method": "bat", "rank": 8, "modules_to_save": ["norm"]},
                "second": {"method": "lora", "rank": 2, "dropout": 0.1},
            },
            **changes.pop("model", {}),
        },
        "optimizer": {"lr": 1e-2, "weight_decay": 0.0},
        "train": {"steps": 6, "batch_size": 4, "device": "cpu", "threads": 1, **changes.pop("train", {})},
        "evaluation": {"every": 0},
        "checkpoint": {"every": 3, "keep_last": 5},
        "log": {"tensorboard": False, "live": False},
    }  # fmt: skip


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("".join(f"line {n} of a text that counts to {n * n}\n" for n in range(400)))
    return file


def run_settings(text: Path, **changes: Any) -> RunSettings:
    return parse_settings(RunSettings, tree(text, **changes), "test")


def test_a_run_resumes_to_the_bit_and_its_base_is_saved_once(text: Path, tmp_path: Path) -> None:
    whole, _ = start_run(run_settings(text), tmp_path / "whole")
    parts = [tmp_path / "whole" / "checkpoints" / f"step-{step:08d}" for step in (3, 6)]
    assert {"frozen.safetensors", "model.safetensors"} <= {file.name for file in parts[0].iterdir()}
    import shutil

    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-00000006")
    again, outcome = start_run(run_settings(text), tmp_path / "again", resume=True)
    assert outcome.step == 6
    assert same(whole.model.state_dict(), again.model.state_dict())
    fresh = run_settings(text).model.build(ModelContext(0, whole.source.vocab_size))
    moved = {n for n, p in fresh.named_parameters() if not torch.equal(p, whole.model.get_parameter(n))}
    assert moved == {n for n, p in fresh.named_parameters() if p.requires_grad}


def test_micro_batches_and_recomputation_change_no_dropout(decoder, move) -> None:
    settings = {
        "first": AdapterSettings(method="dora", rank=2, dropout=0.4),
        "second": AdapterSettings(method="lora", rank=2, dropout=0.4),
        "third": AdapterSettings(rank=4, dropout=0.4),
    }
    keys = Keys(1, 2, torch.arange(4))
    gradients, outputs = [], []
    for recompute in ("none", "block", "selective"):
        model = decoder(settings, recompute=recompute)
        move(model, 0.1)
        hidden = model(TOKENS, keys=keys).hidden_BTD
        other = model(TOKENS, keys=keys.fold("a second pass")).hidden_BTD  # before the first is walked back
        (hidden.square().sum() + other.square().sum()).backward()
        outputs.append(hidden.detach())
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        assert model.blocks[0].attention.q.attached.keys == []
    for output, gradient in zip(outputs[1:], gradients[1:], strict=True):
        assert torch.equal(output, outputs[0])
        assert all(torch.equal(a, b) for a, b in zip(gradient, gradients[0], strict=True))
    halves = [model(TOKENS[i : i + 2], keys=keys.rows(i, i + 2)).hidden_BTD for i in (0, 2)]
    torch.testing.assert_close(torch.cat(halves), outputs[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model(TOKENS).hidden_BTD, outputs[0], atol=1e-2)
    assert not torch.allclose(model(TOKENS, keys=keys.fold("other")).hidden_BTD, outputs[0], atol=1e-2)


def test_dropout_in_front_of_a_changed_weight_is_refused(decoder) -> None:
    model = decoder({"a": AdapterSettings(rank=4, dropout=0.1), "b": AdapterSettings(method="bat", rank=8)})
    with pytest.raises(ValueError, match="'a' has dropout, which an adapter applied after it cannot see: 'b'"):
        model(TOKENS, keys=Keys(0, 0, torch.arange(4)))


def test_experts_shared_and_flattened_rows_have_dropout_too(decoder, move) -> None:
    moe = {"experts": 2, "experts_per_token": 1, "expert_size": 8, "shared_size": 8}
    model = decoder({"a": AdapterSettings(rank=4, dropout=0.4)}, moe=moe)
    assert any("shared" in path for path in adapted_maps(model))
    assert not any("router" in path for path in adapted_maps(model))
    move(model, 0.1)
    keys = Keys(1, 2, torch.arange(4))
    whole = model(TOKENS, keys=keys).hidden_BTD
    halves = [model(TOKENS[i : i + 2], keys=keys.rows(i, i + 2)).hidden_BTD for i in (0, 2)]
    torch.testing.assert_close(torch.cat(halves), whole, atol=1e-5, rtol=1e-5)


def test_a_run_opens_as_its_plain_model_and_exports_as_one(text: Path, tmp_path: Path) -> None:
    run, _ = start_run(run_settings(text), tmp_path / "run")
    tokens = TOKENS % run.source.vocab_size
    with torch.no_grad():
        trained = run.model.logits(run.model(tokens).hidden_BTD)
    opened = open_model(tmp_path / "run")
    assert not adapted_maps(opened.model)
    assert not any("adapters" in name for name in opened.model.state_dict())
    as_trained = open_model(tmp_path / "run", plain=False).model
    assert set(as_trained.blocks[0].attention.q.adapters) == {"first", "second"}
    assert same(as_trained.state_dict(), run.model.state_dict())
    export_model(opened.model, opened.tokenizer, tmp_path / "exported")
    for model in (opened.model, as_trained, load_pretrained(tmp_path / "exported")):
        with torch.no_grad():
            torch.testing.assert_close(model.logits(model(tokens).hidden_BTD), trained, atol=2e-5, rtol=2e-5)


def test_a_run_may_start_from_a_peft_folder_and_freeze_it(decoder, move, tmp_path: Path) -> None:
    base = decoder()
    save_pretrained(base, tmp_path / "base")
    source = decoder({"x": AdapterSettings(rank=4, targets=("q",))})
    move(source, 0.1)
    save_adapter(source, tmp_path / "peft", "x")
    model = {"use": "resilin.models.pretrained:Pretrained", "path": tmp_path / "base"}
    more = {"adapters": {"new": {"method": "lora", "rank": 2}}, "load": {"old": tmp_path / "peft"}}
    built = Adapted.model_validate({"model": model, **more, "frozen": ["old"]}).build(ModelContext(0))
    assert isinstance(built, Decoder)
    with torch.no_grad():
        torch.testing.assert_close(built(TOKENS).hidden_BTD, source(TOKENS).hidden_BTD)
    trained = {name for name, p in built.named_parameters() if p.requires_grad}
    assert trained
    assert all(".adapters.new." in name for name in trained)
    alone = Adapted.model_validate({"model": model, "load": {"old": tmp_path / "peft"}}).build(ModelContext(0))
    assert trainable_count(alone) == trainable_count(source)
    with pytest.raises(AdapterError, match="no adapter is left to train"):
        Adapted.model_validate({"model": model, "load": {"old": tmp_path / "peft"}, "frozen": ["old"]}).build(
            ModelContext(0)
        )


def test_a_run_opens_without_the_weights_it_started_from(decoder, text: Path, tmp_path: Path) -> None:
    save_pretrained(decoder(vocab_size=300, tie_embeddings=True), tmp_path / "base")
    pretrained = {"use": "resilin.models.pretrained:Pretrained", "path": str(tmp_path / "base")}
    run, _ = start_run(run_settings(text, model={"model": pretrained, "base_dtype": "bfloat16"}), tmp_path / "run")
    (tmp_path / "base" / "model.safetensors").unlink()
    opened = open_model(str(tmp_path / "run")).model
    tokens = TOKENS % run.source.vocab_size
    with torch.no_grad():
        expected = run.model.logits(run.model(tokens).hidden_BTD)
        torch.testing.assert_close(opened.logits(opened(tokens).hidden_BTD), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"active": ["third"]}, r"active names an adapter 'third' that is not there; the adapters are: first, second"),
        ({"load": {"first": "x"}}, "first stands in both adapters and load"),
        ({"adapters": {"first": {"method": "loora"}}}, r"did you mean 'lora'"),
        ({"adapters": {"first": {"rnak": 4}}}, r"did you mean 'rank'"),
        (
            {"adapters": {"first": {"method": "bat", "rank": 3}}},
            r"model: adapter 'first': .*is 16 x 16 .*rank 3 should divide both sides: the nearest .*: 2 and 4",
        ),
        (
            {"adapters": {"first": {"method": "mini", "rank": 3, "mini_rank": 5}}},
            r"mini_rank 5 should divide the outputs: the nearest that fit all 14 maps: 4 and 8",
        ),
        (
            {"adapters": {"first": {"targets": ["q_prj"]}}},
            r"adapter 'first': \('q_prj',\) matches no linear map; did you mean q_proj",
        ),
    ],
)
def test_settings_that_do_not_fit_are_told_before_any_data_are_read(
    text: Path, changes: dict[str, Any], message: str
) -> None:
    text.unlink()
    with pytest.raises(ValueError, match=message):
        run_settings(text, model=changes)


def test_a_pretrained_base_is_looked_at_too_and_may_be_missing(decoder, text: Path, tmp_path: Path) -> None:
    pretrained = {"use": "resilin.models.pretrained:Pretrained", "path": str(tmp_path / "base")}
    wrong = {"model": pretrained, "adapters": {"first": {"method": "bat", "rank": 7}}}
    run_settings(text, model=wrong)  # which no one can tell before the folder is there
    save_pretrained(decoder(), tmp_path / "base")
    with pytest.raises(ValueError, match=r"rank 7 should divide both sides: the nearest .*: 4 and 8"):
        run_settings(text, model=wrong)


def test_composes_with_an_adapted_model_underneath(decoder) -> None:
    model = decoder({"a": AdapterSettings(rank=4)})
    attach(model, {"b": AdapterSettings(method="lora", rank=2, targets=("q",))})
    assert list(model.blocks[0].attention.q.adapters) == ["a", "b"]
    assert list(model.blocks[0].attention.q.attached.active) == ["a", "b"]
