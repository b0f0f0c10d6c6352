"""A frozen base stored in bfloat16 under float32 adapters: half the bytes, and the bits of what is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from resilin.adapt.adapted import Adapted
from resilin.adapt.attach import adapted_maps, attach
from resilin.adapt.linear import AdaptedLinear
from resilin.adapt.merge import merge, unmerge
from resilin.adapt.settings import AdapterSettings
from resilin.adapt.stored import store_frozen
from resilin.adapt.targets import AdapterError
from resilin.config import parse_settings
from resilin.inference.generate import StopRule, generate
from resilin.models.decoder import Decoder
from resilin.models.settings import ModelContext
from resilin.nouns import Batch
from resilin.objective.next_token import NextToken
from resilin.run.open_model import open_model
from resilin.run.settings import RunSettings
from resilin.run.start import start_run

METHODS = ("miss", "mini", "bat_col", "bat_row", "bat_ab", "lora", "rslora", "dora")
every_method = pytest.mark.parametrize("method", METHODS)
TOKENS = torch.randint(0, 40, (3, 10), generator=torch.Generator().manual_seed(2))
COMPUTE = {"fp32": False, "bf16": True}


def in_format(compute: str) -> Any:
    return torch.autocast("cpu", torch.bfloat16, enabled=COMPUTE[compute])


def rounded(model: nn.Module) -> nn.Module:
    """Every number of the model such that bfloat16 holds it."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model


@every_method
@pytest.mark.parametrize("compute", COMPUTE)
def test_at_first_the_output_is_that_of_the_frozen_layer_as_stored_to_the_bit(one, method, compute) -> None:
    model = one(method, dtype=torch.float32)
    store_frozen(model, torch.bfloat16, ["a"])
    weight, bias = model.map.weight, model.map.bias
    assert (weight.dtype, bias.dtype) == (torch.bfloat16, torch.float32)
    assert all(p.dtype is torch.float32 for p in model.map.adapters.parameters())
    x = torch.randn(7, 12)
    with in_format(compute):
        assert torch.equal(model(x), linear(x, weight.float(), bias))
        with torch.no_grad():
            for rows in (1, 7):
                assert torch.equal(model(x[:rows]), linear(x[:rows], weight.float(), bias))
    narrow = x.bfloat16()
    assert torch.equal(model(narrow), linear(narrow, weight, bias.bfloat16()))


def trained(model: Decoder, compute: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    batch = Batch(torch.arange(3), {"tokens": TOKENS[:, :-1], "labels": TOKENS[:, 1:]})
    with in_format(compute):
        loss = NextToken().build()(model, batch, None)
    loss.sum.backward()
    return loss.sum.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@every_method
@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("shape", [{"qkv_bias": True}, {"tie_embeddings": True, "gated": False}], ids=str)
def test_storage_changes_no_bit_of_loss_or_gradient(decoder, settings, move, method, compute, shape) -> None:
    """Where bfloat16 holds the base's numbers; `q` alone adapted in the first layer, so that plain maps train too."""
    results = []
    for stored in (False, True):
        model = rounded(decoder(**shape))
        one_map = settings("miss", targets=("q",), layers=(0,))
        attach(model, {"a": settings(method, targets=("k", "v", "down")), "b": one_map}, seed=5)
        if stored:
            store_frozen(model, torch.bfloat16, ["a", "b"])
        move(model, 0.1)
        results.append(trained(model, compute))
    (loss, gradients), (other_loss, other_gradients) = results
    assert torch.equal(loss, other_loss)
    assert set(gradients) == set(other_gradients)
    assert all(torch.equal(gradient, other_gradients[name]) for name, gradient in gradients.items())


def test_experts_are_stored_too(decoder, move) -> None:
    moe = {"experts": 3, "experts_per_token": 2, "expert_size": 8, "shared_size": 8}
    results = []
    for stored in (False, True):
        model = rounded(decoder({"a": AdapterSettings(rank=4)}, moe=moe))
        if stored:
            store_frozen(model, torch.bfloat16)
            assert model.blocks[0].moe.experts.up.dtype is torch.bfloat16
        move(model, 0.1)
        results.append(trained(model, "fp32"))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(gradient, results[1][1][name]) for name, gradient in results[0][1].items())


def test_the_frozen_matrices_take_half_the_bytes_and_nothing_else_changes(decoder) -> None:
    adapters = {"a": AdapterSettings(rank=4, targets=("q", "up"), modules_to_save=("lm_head",), bias="only")}
    model = decoder(adapters, qkv_bias=True)
    frozen = {n: p for n, p in model.named_parameters() if p.ndim > 1 and not p.requires_grad}
    before = sum(p.nbytes for p in frozen.values())
    assert store_frozen(model, torch.bfloat16) == before / 2
    for name, parameter in model.named_parameters():
        assert parameter.dtype is (torch.bfloat16 if name in frozen else torch.float32), name
    assert model.stream_dtype is torch.float32
    assert model(TOKENS).hidden_BTD.dtype is torch.float32


@every_method
def test_no_widened_copy_of_a_weight_is_kept_for_the_backward_pass(decoder, settings, method) -> None:
    model = decoder(vocab_size=7)
    attach(model, {"a": settings(method, targets=("v", "o"), layers=(0,))})
    store_frozen(model, torch.bfloat16, ["a"])
    shapes = {tuple(m.weight.shape) for m in model.modules() if isinstance(m, nn.Linear)}
    wide: list[tuple[int, ...]] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tuple(tensor.shape) in shapes and tensor.dtype is torch.float32:
            wide.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        model(TOKENS % 7)
    # An adapter's own matrices may have such a shape; no layer but the two adapted ones may keep one.
    assert len(wide) <= 2


def test_adapters_in_a_row_see_the_weight_unrounded(decoder, settings, move) -> None:
    wide, stored = (rounded(decoder()) for _ in range(2))
    for model in (wide, stored):
        attach(model, {"a": settings("miss"), "b": settings("bat_col"), "c": settings("lora")})
    store_frozen(stored, torch.bfloat16)
    for model in (wide, stored):
        move(model, 0.1)
    assert torch.equal(wide(TOKENS).hidden_BTD, stored(TOKENS).hidden_BTD)


@every_method
def test_merging_is_done_in_float32_and_rounded_once_and_taken_out_to_the_bit(one, move, method) -> None:
    model = one(method, dtype=torch.float32)
    store_frozen(model, torch.bfloat16, ["a"])
    move(model, 0.2)
    weight = model.map.weight.detach().clone()
    exact = model.map.adapters["a"].changed(weight.float(), 1.0)
    merge(model)
    assert torch.equal(model.map.weight, exact.bfloat16())
    unmerge(model)
    assert torch.equal(model.map.weight, weight)


def test_what_cannot_be_stored_is_refused() -> None:
    class Packed(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 8, bias=False)
            self.weight = nn.Parameter(self.weight.to(torch.int8), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return linear(x, self.weight.float())

    model = nn.Sequential(Packed())
    attach(model, {"a": AdapterSettings(rank=4)})
    with pytest.raises(AdapterError, match=r"0 has a quantised weight \(torch.int8\).*leave base_dtype out"):
        store_frozen(model, torch.bfloat16)
    full = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    attach(full, {"a": AdapterSettings(rank=4)})
    full[0].weight.requires_grad_(True)
    with pytest.raises(AdapterError, match="no frozen matrix of this Sequential"):
        store_frozen(full, torch.bfloat16)
    with pytest.raises(ValueError, match="base_dtype"):
        Adapted.model_validate({"base_dtype": "int8"})


@pytest.fixture
def run_settings(tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {n} of a text that counts to {n * n}\n" for n in range(400)))

    def make(compute: str = "fp32", **model: Any) -> RunSettings:
        source = {"paths": [str(text)], "sequence_length": 16, "tokenizer": {"kind": "bytes"}}
        tree = {
            "source": {**source, "cache": str(tmp_path / "cache"), "held_out": {"fraction": 0.0}},
            "model": {
                "use": "resilin.adapt.adapted:Adapted",
                "model": {"hidden_size": 16, "layers": 2, "heads": 2, "mlp_size": 24},
                "adapters": {"a": {"method": "dora", "rank": 4}, "b": {"method": "miss", "rank": 4}},
                "base_dtype": "bfloat16",
                **model,
            },
            "optimizer": {"lr": 1e-2, "weight_decay": 0.0},
            "train": {"steps": 6, "batch_size": 4, "device": "cpu", "threads": 1},
            "precision": {"compute": compute},
            "evaluation": {"every": 0},
            "checkpoint": {"every": 3, "keep_last": 5},
            "log": {"tensorboard": False, "live": False},
        }
        return parse_settings(RunSettings, tree, "test")

    return make


@pytest.mark.parametrize("compute", COMPUTE)
def test_a_run_resumes_to_the_bit_and_opens_with_what_is_merged_unrounded(
    run_settings, tmp_path: Path, compute: str
) -> None:
    import shutil

    whole, _ = start_run(run_settings(compute), tmp_path / "whole")
    moments = [t for part in whole.optimizer.parts for m in part.members() for t in m.moments.values()]
    assert moments
    assert all(moment.dtype is torch.float32 for moment in moments)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-00000006")
    again, outcome = start_run(run_settings(compute), tmp_path / "again", resume=True)
    assert outcome.step == 6
    state, other = whole.model.state_dict(), again.model.state_dict()
    assert all(state[n].dtype is other[n].dtype and torch.equal(state[n], other[n]) for n in state)
    assert sum(t.dtype is torch.bfloat16 for t in state.values()) == 2 * 7 + 2  # with embedding and head
    opened = open_model(tmp_path / "whole").model
    as_trained = open_model(tmp_path / "whole", plain=False).model
    for path, linear_ in adapted_maps(whole.model).items():
        weight = linear_.weight.detach().float()
        for name, strength in linear_.chain():
            weight = linear_.adapter(name).changed(weight, strength).detach()
        merged = opened.get_submodule(path).weight
        assert torch.equal(merged, weight), path
        assert not torch.equal(merged.bfloat16().float(), merged), path
    tokens = TOKENS % whole.source.vocab_size
    with torch.no_grad():
        torch.testing.assert_close(opened(tokens).hidden_BTD, as_trained(tokens).hidden_BTD, atol=2e-5, rtol=2e-5)
    assert (
        generate(opened, [[1, 2, 3]], StopRule(4))[0].tokens
        == generate(whole.model, [[1, 2, 3]], StopRule(4))[0].tokens
    )


def test_the_base_in_a_checkpoint_takes_half_the_bytes(run_settings, tmp_path: Path) -> None:
    sizes = []
    for dtype in ("float32", "bfloat16"):
        run, _ = start_run(run_settings(base_dtype=dtype), tmp_path / dtype)
        sizes.append(sum(p.nbytes for p in run.model.parameters() if not p.requires_grad and p.ndim > 1))
        assert (tmp_path / dtype / "checkpoints" / "step-00000006" / "frozen.safetensors").is_file()
    assert sizes[1] * 2 == sizes[0]


def test_a_dora_starts_from_the_weights_as_stored(run_settings) -> None:
    model = run_settings().model.build(ModelContext(0, 40))
    for linear_ in adapted_maps(model).values():
        assert isinstance(linear_, AdaptedLinear)
        norm = torch.linalg.vector_norm(linear_.weight.float(), dim=1)
        torch.testing.assert_close(linear_.adapter("a").magnitude.detach(), norm, atol=1e-6, rtol=1e-6)
