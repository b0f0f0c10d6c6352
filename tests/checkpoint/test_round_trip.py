"""What is loaded is what was saved, to the bit."""

from __future__ import annotations

import enum
import json
import math
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.folder import CheckpointFolder
from resilin.checkpoint.local_storage import LocalFolder
from resilin.checkpoint.tensor_read import TensorFile
from resilin.checkpoint.tensor_record import DTYPES, TensorRecord, shape_in_torch
from resilin.checkpoint.tree import put_together, take_apart
from resilin.layout import Region


@st.composite
def tensors(draw: Any) -> torch.Tensor:
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    fewest = 1 if dtype == torch.float4_e2m1fn_x2 else 0  # half a byte alone cannot be stored
    shape = draw(st.lists(st.integers(0, 4), min_size=fewest, max_size=4))
    count = math.prod(shape)
    data = bytearray(draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize)))
    if dtype == torch.bool:
        data = bytearray(byte & 1 for byte in data)
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).reshape(shape).clone()


# Surrogates too: any text that Python can hold may be a key.
texts = st.text(st.characters(exclude_categories=()), max_size=6) | st.sampled_from(
    ["", "/", "~", "~0", "a/b", "a.b", "$tensor", "$float", "$$", "__metadata__", "..", "model", "Model", "\ud800"]
)
leaves = (
    tensors()
    | st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=True)
    | texts
    | st.just(2**200)
    | st.just(-0.0)
)
trees = st.recursive(
    leaves, lambda node: st.lists(node, max_size=3) | st.dictionaries(texts, node, max_size=3), max_leaves=12
)


@given(st.dictionaries(texts, trees, max_size=4))
@settings(max_examples=80, deadline=None)
def test_any_tree_comes_back_to_the_bit(same_bits: Callable[[Any, Any], bool], tree: dict[str, Any]) -> None:
    with TemporaryDirectory() as at:
        folder = CheckpointFolder(Path(at))
        folder.save(1, tree)
        for mapped in (False, True):
            assert same_bits(folder.load(1, mapped=mapped), tree)
        folder.close()


@given(st.dictionaries(texts, trees, max_size=4))
@settings(max_examples=150, deadline=None)
def test_the_json_half_is_strict_json(tree: dict[str, Any]) -> None:
    apart = take_apart(tree)
    text = json.dumps(apart.json, allow_nan=False)
    again = put_together(json.loads(text), apart.tensors.__getitem__)
    assert list(again) == list(tree)
    text.encode("ascii")  # no surrogate is left for UTF-8 to refuse


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_bit_pattern_of_every_type_survives(
    same_bits: Callable[[Any, Any], bool], folder: CheckpointFolder, dtype: torch.dtype
) -> None:
    # All 16-bit patterns repeated: every NaN payload of the small types, many of the large ones.
    data = torch.arange(2**16, dtype=torch.int32).repeat_interleave(max(1, dtype.itemsize // 2))
    tensor = (data % 2 == 1) if dtype == torch.bool else data.to(torch.uint16).view(torch.uint8).view(dtype)
    folder.save(1, {"x": {"y": tensor}})
    assert same_bits(folder.load(1), {"x": {"y": tensor}})


def test_views_that_are_not_contiguous_are_saved_as_what_they_show(
    same_bits: Callable[[Any, Any], bool], folder: CheckpointFolder
) -> None:
    base = torch.arange(60.0).reshape(3, 4, 5)
    tree = {
        "t": base.transpose(0, 2),
        "slice": base[:, 1:3, ::2],
        "broadcast": torch.tensor([1.0, 2.0]).expand(3, 2),
        "conjugate": torch.view_as_complex(torch.randn(4, 2)).conj(),
        "negative": torch.view_as_complex(torch.randn(4, 2)).conj().imag,
        "scalar": torch.tensor(math.nan),
        "empty": torch.empty(0, 3, dtype=torch.float16),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    folder.save(1, tree)
    loaded = folder.load(1)
    assert same_bits(loaded, tree)
    assert not loaded["parameter"].requires_grad


def test_tied_tensors_are_stored_once_and_tied_again(folder: CheckpointFolder) -> None:
    weight = torch.randn(100, 100)
    tree = {
        "model": {"embed": weight, "head": weight, "alias": weight.view(100, 100)},
        "anchor": {"embed": weight.detach()},
    }
    saved = folder.save(1, tree)
    assert saved.bytes < 1.5 * weight.numel() * 4
    loaded = folder.load(1)
    embed = loaded["model"]["embed"]
    assert loaded["model"]["head"] is embed
    assert loaded["model"]["alias"] is embed
    assert loaded["anchor"]["embed"] is embed


def test_views_of_one_memory_that_differ_are_not_tied(
    same_bits: Callable[[Any, Any], bool], folder: CheckpointFolder
) -> None:
    base = torch.arange(16.0)
    tree = {"x": [base, base[:8], base.view(4, 4), base.view(torch.int32), base.view(4, 4).t(), base[8:]]}
    folder.save(1, tree)
    loaded = folder.load(1)
    assert same_bits(loaded, tree)
    assert len({tensor.data_ptr() for tensor in loaded["x"]}) == 6


def test_empty_tensors_are_not_taken_for_one_another(folder: CheckpointFolder) -> None:
    folder.save(1, {"x": [torch.empty(0), torch.empty(0)]})
    first, second = folder.load(1)["x"]
    assert first is not second


def test_loaded_memory_is_aligned_and_ones_own(folder: CheckpointFolder) -> None:
    folder.save(1, {"x": {"a": torch.ones(3), "b": torch.ones(1001), "c": torch.ones(7, dtype=torch.int8)}})
    for tensor in folder.load(1)["x"].values():
        assert tensor.data_ptr() % 64 == 0  # kernels then take the same path as before the save


def test_writing_into_a_mapped_tensor_leaves_the_file_alone(folder: CheckpointFolder) -> None:
    folder.save(1, {"x": torch.zeros(5000)})
    mapped = folder.load(1, mapped=True)["x"]
    mapped.fill_(7)
    assert mapped.sum() == 35_000
    assert folder.load(1)["x"].sum() == 0


def test_mapped_tensors_outlive_the_checkpoint(folder: CheckpointFolder) -> None:
    folder.keep_last = 1
    folder.save(1, {"x": torch.arange(5000)})
    mapped = folder.load(1, mapped=True)["x"]
    folder.save(2, {"x": torch.zeros(1)})
    assert folder.steps() == [2]
    assert mapped.sum() == 5000 * 4999 // 2


def test_the_same_state_gives_the_same_bytes(tmp_path: Path, state: Callable[[int], dict[str, Any]]) -> None:
    files = []
    for name in ("a", "b"):
        folder = CheckpointFolder(tmp_path / name)
        folder.save(5, state(5))
        files.append({path.name: path.read_bytes() for path in folder.step_path(5).iterdir()})
        folder.close()
    assert files[0] == files[1]


def test_tensors_may_change_as_soon_as_save_returns(folder: CheckpointFolder) -> None:
    x = torch.zeros(1_000_000)
    folder.save(1, {"x": x})
    x.fill_(1)
    assert folder.load(1)["x"].sum() == 0


def test_parts_are_loaded_without_opening_the_others(
    same_bits: Callable[[Any, Any], bool], folder: CheckpointFolder, state: Callable[[int], dict[str, Any]]
) -> None:
    folder.save(5, state(5))
    (folder.step_path(5) / "optimizer.safetensors").unlink()
    assert same_bits(folder.load(5, parts=["model"]), {"model": state(5)["model"]})
    with pytest.raises(CheckpointError, match=r"no part 'modle'; it holds: model, optimizer, run"):
        folder.load(5, parts=["modle"])


def test_each_part_is_a_safetensors_file_with_the_models_own_names(
    folder: CheckpointFolder, state: Callable[[int], dict[str, Any]]
) -> None:
    folder.save(5, state(5))
    at = folder.step_path(5)
    weights = load_file(at / "model.safetensors")
    assert set(weights) == {"embed.weight", "norm"}  # head.weight is embed.weight
    torch.testing.assert_close(weights["embed.weight"], state(5)["model"]["embed.weight"], rtol=0, atol=0)
    with safe_open(at / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@given(st.dictionaries(texts, tensors(), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_the_library_reads_what_is_written_here_under_any_name(
    same_bits: Callable[[Any, Any], bool], members: dict[str, torch.Tensor]
) -> None:
    with TemporaryDirectory() as at:
        folder = CheckpointFolder(Path(at))
        folder.save(1, {"model": members})
        (file,) = folder.step_path(1).glob("*.safetensors")
        read = load_file(file)
        folder.close()
    assert sorted(map(str, (t.dtype for t in read.values()))) == sorted(str(t.dtype) for t in members.values())
    plain = {key: value for key, value in members.items() if key in read and "~" not in key}
    assert all(same_bits(read[key], value) for key, value in plain.items())


def test_this_reader_reads_the_librarys_files(same_bits: Callable[[Any, Any], bool], tmp_path: Path) -> None:
    written = {
        "a": torch.randn(3, 4),
        "b": torch.arange(5, dtype=torch.int8),
        "c": torch.tensor(2.0, dtype=torch.bfloat16),
    }
    save_file(written, tmp_path / "x.safetensors", metadata={"format": "pt"})
    file = TensorFile(LocalFolder(tmp_path), "x.safetensors")
    for name, tensor in written.items():
        dtype = file.entries[name]["dtype"]
        record = TensorRecord.alone(dtype, shape_in_torch(dtype, file.entries[name]["shape"]), 0, name, -1, ())
        read = torch.empty_like(tensor)
        file.read(record, 0, Region.whole(record.shape), read, verify=False)
        assert same_bits(read, tensor)
    file.close()


class Sharded(torch.Tensor):
    """Stands for DTensor and its like, whose data_ptr is only a part of what they are."""


class Colour(str, enum.Enum):  # noqa: UP042  # the older kind, whose str() is not its value
    RED = "red"


def test_relatives_of_json_types_come_back_as_those_types(folder: CheckpointFolder) -> None:
    tree = {"o": OrderedDict(b=1, a=2), "f": np.float64(0.1), "e": Colour.RED, Colour.RED: 1}
    folder.save(1, tree)
    assert json.dumps(folder.load(1)) == '{"o": {"b": 1, "a": 2}, "f": 0.1, "e": "red", "red": 1}'


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({3: 1}, r"state 'run/bad': the key 3 is int, but keys must be text.*use '3', or a list"),
        ({None: 1}, r"the key None is NoneType"),
        ((1, 2), r"state 'run/bad': a builtins.tuple cannot be saved \(make it a list"),
        (torch.Size([1]), r"torch.Size cannot be saved \(make it a list"),
        ({1, 2}, r"sorted list"),
        (np.int64(3), r"numpy.int64 cannot be saved \(use .item\(\)\)"),
        (np.zeros(2), r"from_numpy"),
        (b"x", r"uint8 tensor"),
        (torch.float32, r"torch.dtype cannot be saved"),
        (lambda: 0, r"builtins.function cannot be saved"),
        (1 << 20_000, r"20001 bits is too long"),
        (torch.empty(2, device="meta"), r"tensor 'run/bad' cannot be saved: it is on the meta device"),
        (torch.eye(2).to_sparse(), r"layout is torch.sparse_coo"),
        (torch.zeros(2, dtype=torch.complex128), r"safetensors cannot hold torch.complex128"),
        (torch.ones(2).as_subclass(Sharded), r"it is a .*Sharded; save the plain tensors it is made of"),
    ],
    ids=lambda value: None if isinstance(value, str) else type(value).__name__,
)
def test_what_would_not_come_back_is_refused_by_name_before_anything_is_written(
    folder: CheckpointFolder, value: Any, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        folder.save(1, {"model": {"w": torch.ones(1)}, "run": {"bad": value}})
    assert not folder.path.exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_state_comes_back_to_the_gpu(same_bits: Callable[[Any, Any], bool], folder: CheckpointFolder) -> None:
    tree = {"model": {"w": torch.randn(1000, 33, device="cuda").t(), "b": torch.ones(3, device="cuda").bfloat16()}}
    folder.save(1, tree)
    loaded = folder.load(1, "cuda")
    assert loaded["model"]["w"].is_cuda
    host = {"model": {key: value.cpu() for key, value in loaded["model"].items()}}
    assert same_bits(host, {"model": {key: value.cpu() for key, value in tree["model"].items()}})
