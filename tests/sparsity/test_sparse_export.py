"""Sparse models on disk and on sparse tensor cores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from resilin.models.huggingface import load_pretrained
from resilin.models.plain import make_plain
from resilin.sparsity.export import export_sparse, read_masks, zeroed
from resilin.sparsity.kernels import fits, semi_structured, why_not
from resilin.sparsity.masks import sparse_layers
from resilin.sparsity.settings import SparsityError

TOKENS = torch.arange(24).view(2, 12) * 5 % 32


def hidden(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).hidden_BTD


def test_the_folder_is_the_trained_model_with_exact_zeros_and_its_masks(sparse_model: Any, tmp_path: Path) -> None:
    model = sparse_model(n=1, m=4)
    with torch.no_grad():  # not what the weights would ask for now: nothing may be chosen anew
        for _, layer in sparse_layers(model):
            layer.mask.copy_(layer.mask.roll(1, 0))
    export_sparse(model, tmp_path / "out")
    again, masks = load_pretrained(tmp_path / "out"), read_masks(tmp_path / "out")
    assert torch.equal(hidden(again), hidden(model))
    assert len(masks) == 14
    q = again.blocks[1].attention.q.weight
    assert torch.equal(q != 0, masks["model.layers.1.self_attn.q_proj.weight"])
    assert ((q != 0).view(16, 4, 4).sum(-1) == 1).all()
    about = json.loads((tmp_path / "out" / "sparsity" / "sparsity.json").read_text())
    assert about == {"pattern": "1:4", "density": 0.25, "metric": "magnitude", "layers": 14}
    assert isinstance(next(sparse_layers(model))[1].mask, torch.Tensor)  # the model itself is as it was


@pytest.mark.parametrize("train_pooling", [False, True])
def test_the_correction_is_an_adapter_that_peft_opens(
    sparse_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train_pooling: bool
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = sparse_model(slorb={"k": 8, "train_pooling": train_pooling})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("pooling"):
                parameter.add_(0.1)
    export_sparse(model, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        bare = theirs(TOKENS).logits
        torch.testing.assert_close(bare, zeroed(model).logits(hidden(zeroed(model))), rtol=1e-4, atol=1e-4)
        whole = PeftModel.from_pretrained(theirs, tmp_path / "out" / "slorb").eval()(TOKENS).logits
        torch.testing.assert_close(whole, model.logits(hidden(model)), rtol=1e-4, atol=1e-4)
    assert (whole - bare).abs().max() > 0.1


def test_models_without_masks_and_folders_without_files_are_refused(sparse_model: Any, tmp_path: Path) -> None:
    with pytest.raises(SparsityError, match="has no masks"):
        export_sparse(make_plain(sparse_model()), tmp_path / "out")
    with pytest.raises(SparsityError, match="no such file"):
        read_masks(tmp_path)
    (tmp_path / "sparsity").mkdir()
    (tmp_path / "sparsity" / "masks.safetensors").write_bytes(b"x")
    with pytest.raises(SparsityError, match="not a whole safetensors file"):
        read_masks(tmp_path)


def test_other_machines_are_told_why_there_are_no_kernels(sparse_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SparsityError, match="need an NVIDIA GPU; the device is cpu"):
        semi_structured(sparse_model(), device="cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "an old GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert "an old GPU has no sparse tensor cores" in str(why_not("cuda", torch.float16))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert "float16 or bfloat16, not in float32" in str(why_not("cuda", torch.float32))
    assert why_not("cuda", torch.bfloat16) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_exported_weights_survive_the_packing_that_the_kernels_read(
    sparse_model: Any, tmp_path: Path, dtype: torch.dtype
) -> None:
    """torch packs 2:4 weights (half the numbers, two bits of place each) on any machine; only the product needs one."""
    model = sparse_model(dense={"hidden_size": 64, "mlp_size": 128, "heads": 4, "layers": 1})
    export_sparse(model, tmp_path / "out", dtype=dtype)
    again = load_pretrained(tmp_path / "out").to(dtype)
    for name, layer in sparse_layers(model):
        assert fits(layer) is None
        weight = again.get_submodule(name).weight.detach()
        packed, places = sparse_semi_structured_from_dense_cutlass(weight)
        assert packed.shape == (layer.out_features, layer.in_features // 2)
        assert torch.equal(sparse_semi_structured_to_dense_cutlass(packed, places), weight)
    dense = torch.randn(64, 64).to(dtype)  # what is not 2:4 comes back changed: the test can fail
    assert not torch.equal(
        sparse_semi_structured_to_dense_cutlass(*sparse_semi_structured_from_dense_cutlass(dense)), dense
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_semi_structured_kernels_compute_the_same(sparse_model: Any) -> None:
    reason = why_not("cuda", torch.float16)
    if reason is not None:
        pytest.skip(reason)
    shape = {"hidden_size": 128, "mlp_size": 256, "heads": 4, "layers": 2}
    for slorb in (None, {"k": 16}):
        model = sparse_model(dense=shape, slorb=slorb).cuda().half().eval()
        fast = semi_structured(model)
        tokens = torch.arange(256, device="cuda").view(4, 64) % 32
        with torch.no_grad():
            torch.testing.assert_close(fast(tokens).hidden_BTD, model(tokens).hidden_BTD, rtol=2e-2, atol=2e-2)
    with pytest.raises(SparsityError, match="the kernels know 2:4 only"):
        semi_structured(sparse_model(n=1, dense=shape))
    with pytest.raises(SparsityError, match="outputs must be a multiple of 32"):
        semi_structured(sparse_model())
