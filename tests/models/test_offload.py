"""Inputs of recomputed blocks in another memory: the same bits come back, and what is away is not here."""

from __future__ import annotations

import copy
import gc
import os
import weakref

import pytest
import torch

from resilin.keys import Keys
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings, MoESettings
from resilin.models.offload import DiskStore, Offload, store_for

CPU = torch.device("cpu")
GPU = pytest.param("host", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])
SMALL = {"vocab_size": 40, "hidden_size": 32, "layers": 4, "heads": 2, "recompute": "block", "dropout": 0.1}


def gradients(kind: str, device: str = "cpu", **changes) -> list[torch.Tensor]:
    model = Decoder(DecoderSettings(**SMALL, **changes, offload=kind), seed=1).to(device)
    text = (torch.arange(140).view(2, 70) % 40).to(device)
    out = model(text, keys=Keys(0, 0, torch.arange(2)))
    (out.hidden_BTD.square().sum() + sum(router.square().sum() for router in out.router_logits)).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("changes", [{}, {"moe": MoESettings(experts=4, expert_size=16)}, {"mlp_tiles": 3}])
@pytest.mark.parametrize("kind", ["disk", "host"])
def test_gradients_are_the_same_bits(kind, changes):
    for _ in range(2):  # the second pass takes the places of the first
        for a, b in zip(gradients(kind, **changes), gradients("none", **changes), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", [GPU, pytest.param("disk", marks=GPU.marks)])
def test_gradients_on_a_gpu_are_the_same_bits(kind):
    for a, b in zip(gradients(kind, "cuda"), gradients("none", "cuda"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_holds_less_while_they_are_away():
    peaks = {}
    for kind in ("none", "host"):
        settings = DecoderSettings(vocab_size=40, hidden_size=512, layers=16, heads=8, recompute="block", offload=kind)
        model, text = Decoder(settings, seed=1).cuda(), torch.zeros(1, 8192, dtype=torch.int64, device="cuda")
        model(text).hidden_BTD.sum().backward()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        model(text).hidden_BTD.sum().backward()
        peaks[kind] = torch.cuda.max_memory_allocated()
    saved = 8192 * 512 * 4 * (16 - 5)
    assert peaks["host"] < peaks["none"] - saved


def test_what_is_away_is_not_in_memory(monkeypatch):
    left, gone = [], []
    put = DiskStore.put

    def watched(self, tensor):
        left.append(tensor.nbytes)
        weakref.finalize(tensor.untyped_storage(), gone.append, tensor.nbytes)
        return put(self, tensor)

    monkeypatch.setattr(DiskStore, "put", watched)
    settings = DecoderSettings(vocab_size=40, hidden_size=64, layers=6, heads=2, recompute="block", offload="disk")
    out = Decoder(settings, seed=1)(torch.zeros(1, 500, dtype=torch.int64)).hidden_BTD
    store = store_for("disk", CPU)
    while store._under_way:  # a copy under way still holds its tensor
        store._under_way.popleft().result()
    gc.collect()
    assert left == [500 * 64 * 4] * 5  # all blocks' inputs but the last's
    assert gone == left
    out.sum().backward()


def test_places_in_the_file_are_used_again_and_survive_a_second_backward_pass():
    store = DiskStore()
    away = Offload(store)
    x, y = torch.randn(500, requires_grad=True), torch.randn(500, requires_grad=True)
    for _ in range(3):
        with away.keeping_away(x):
            out = (x * y).sum()
        out.backward(retain_graph=True)
        first = y.grad.clone()
        y.grad = None
        out.backward()
        assert torch.equal(first, y.grad)
        assert torch.equal(first, x)
        y.grad = None
        del out
    assert store._end == 2000


def test_bfloat16_and_empty_files():
    store = DiskStore()
    x = torch.randn(700).bfloat16().view(7, 100)
    place = store.put(x)
    assert torch.equal(store.get(place), x)
    os.ftruncate(store._file.fileno(), 0)
    with pytest.raises(RuntimeError, match="ends before what was written"):
        store.get(place)


def test_a_full_disk_is_said_by_name(monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    store = DiskStore()
    place = store.put(torch.randn(500))
    with pytest.raises(RuntimeError, match="set TMPDIR to a folder on a disk with room"):
        store.get(place)


def test_a_cpu_has_no_other_memory_than_the_disk():
    assert store_for("host", CPU) is None
    assert store_for("none", CPU) is None
    assert store_for("disk", CPU) is store_for("disk", CPU)


def test_a_model_that_was_used_can_be_copied():
    model = Decoder(DecoderSettings(**SMALL, offload="disk"), seed=1)
    model(torch.zeros(1, 40, dtype=torch.int64)).hidden_BTD.sum().backward()
    assert torch.equal(copy.deepcopy(model).embed.weight, model.embed.weight)


def test_offload_without_recomputed_blocks_is_refused():
    with pytest.raises(ValueError, match="set recompute = 'block'"):
        DecoderSettings(vocab_size=5, offload="disk")
