"""What training an adapter costs, told without training: of the frozen base only what the adapter needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from resilin.adapt.adapted import Adapted
from resilin.adapt.attach import attach
from resilin.adapt.peft_folder import save_adapter
from resilin.adapt.settings import AdapterSettings
from resilin.config import parse_settings
from resilin.models.flops import train_flops_per_token
from resilin.models.huggingface import save_pretrained
from resilin.models.settings import ModelContext
from resilin.models.step_flops import step_flops_per_token
from resilin.run.forecast import forecast
from resilin.run.settings import RunSettings


def of_product(_: Any, left: Any, right: Any, **more: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def counted(model: Any, rows: int = 64) -> float:
    in_place = {torch.ops.aten.addmm_: of_product}  # torch counts only the one that is not in place
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        model.logits(model(torch.zeros(rows, 1, dtype=torch.int64)).hidden_BTD).sum().backward()
    return counter.get_total_flops() / rows


@pytest.mark.parametrize("method", ["miss", "lora"])
@pytest.mark.parametrize("where", [{}, {"layers": (1,)}, {"targets": ("v", "down")}], ids=str)
def test_an_adapted_step_costs_what_torch_counts_for_it(decoder, method, where) -> None:
    """Up to the pull of an adapter whose input needs none (of the first trained layer)."""
    model = decoder({"a": AdapterSettings(method=method, rank=2, **where)}, layers=3, attention_backend="eager")
    assert step_flops_per_token(model, 1) == pytest.approx(counted(model), rel=0.02)
    whole = train_flops_per_token(model.settings, 1)
    assert 0.4 * whole < step_flops_per_token(model, 1) < 0.9 * whole


@pytest.mark.parametrize(
    "adapter",
    [{"method": "miss", "rank": 5}, {"method": "bat", "rank": 8}, {"method": "dora", "rank": 2}],
    ids=lambda a: a["method"],
)
def test_the_outline_has_the_parameters_of_the_model_and_no_memory(decoder, tmp_path: Path, adapter) -> None:
    save_pretrained(decoder(), tmp_path / "base")
    source = decoder()
    attach(source, {"x": AdapterSettings(rank=4, targets=("q",))})
    save_adapter(source, tmp_path / "peft", "x")
    tree = {
        "model": {"use": "resilin.models.pretrained:Pretrained", "path": str(tmp_path / "base")},
        "load": {"old": str(tmp_path / "peft")},
        "frozen": ["old"],
        "adapters": {"new": {**adapter, "modules_to_save": ["norm"]}},
        "base_dtype": "bfloat16",
    }
    settings = Adapted.model_validate(tree)
    built, outlined = settings.build(ModelContext(0)), settings.outline(ModelContext(0))

    def facts(model: Any) -> dict[str, Any]:
        return {n: (tuple(p.shape), p.dtype, p.requires_grad) for n, p in model.named_parameters()}

    assert facts(outlined) == facts(built)
    assert all(p.is_meta for p in outlined.parameters())


def test_the_forecast_of_an_adapted_run_counts_the_base_as_frozen(decoder, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some text that is long enough to hold a few rows of it\n" * 40)
    save_pretrained(decoder(vocab_size=300), tmp_path / "base")
    tree = {
        "source": {
            "paths": [str(text)],
            "sequence_length": 16,
            "tokenizer": {"kind": "bytes"},
            "epochs": 1,
            "held_out": {"by": "tail"},
        },
        "model": {
            "use": "resilin.adapt.adapted:Adapted",
            "model": {"use": "resilin.models.pretrained:Pretrained", "path": str(tmp_path / "base")},
            "adapters": {"a": {"method": "miss", "rank": 4}},
        },
        "train": {"steps": 0, "batch_size": 4},
        "precision": {"compute": "fp32"},
    }
    tree["source"]["cache"] = str(tmp_path / "cache")
    groups = forecast(parse_settings(RunSettings, tree, "test")).groups
    told = {**dict(groups["model"]), **dict(groups["memory (estimate)"]), **dict(groups["work"]), **dict(groups["run"])}
    model = parse_settings(RunSettings, tree, "test").model.build(ModelContext(0, 300))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    assert told["parameters"] == f"{total:,}"
    assert told["trained"] == f"{trained:,} ({trained / total:.2%})"
    assert told["moments"] == f"{8 * trained / 2**20:.1f} MiB"
    assert told["weights"] == f"{4 * total / 2**20:.1f} MiB"
    assert "with which the source ends" in told["steps"]
    assert told["per token"].startswith(f"{step_flops_per_token(model, 16) / 1e3:.3g} k")
