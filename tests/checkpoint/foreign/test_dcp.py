"""torch.distributed.checkpoint folders, written and opened by the real library on several ranks."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import MetadataIndex

from resilin.checkpoint.errors import CheckpointError, DamagedError
from resilin.checkpoint.foreign.convert import Options, convert, open_stored


@pytest.fixture(scope="module")
def sharded(run_on_ranks, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dcp") / "sharded"
    run_on_ranks("dcp_run.py", "save", out, ranks=3)
    return out


def test_shards_of_three_ranks_are_put_together(sharded):
    stored = open_stored(sharded)
    told = load_file(sharded.with_suffix(".safetensors"))
    assert set(stored.names) == set(told)
    for name, tensor in told.items():
        assert torch.equal(stored.tensor(name), tensor), name
    assert [group["weight_decay"] for group in stored.groups] == [0.1, 0.0]
    assert [group["parameters"] for group in stored.groups] == [
        ["0.weight", "2.weight"],
        ["0.bias", "1.weight", "1.bias"],
    ]
    assert stored.step == 3
    assert stored.other == {"data": {"seen": 12, "order": [1, 2]}}


def test_what_is_written_loads_into_a_model_on_two_ranks(sharded, run_on_ranks, canonical_bytes, tmp_path):
    convert(sharded, tmp_path / "resilin")
    convert(tmp_path / "resilin", tmp_path / "dcp", Options(target_format="dcp"))
    assert canonical_bytes(tmp_path / "dcp") == canonical_bytes(sharded)
    run_on_ranks("dcp_run.py", "load", tmp_path / "dcp", tmp_path / "loaded.safetensors", ranks=2)
    told, found = load_file(sharded.with_suffix(".safetensors")), load_file(tmp_path / "loaded.safetensors")
    assert told.keys() == found.keys()
    assert all(torch.equal(found[name], told[name]) for name in told)


DTYPES = [torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.int16, torch.bool, torch.complex64]


def _mixed() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    made = {str(dtype): torch.randn(3, 4).mul(4).to(dtype) for dtype in DTYPES}
    return {**made, "scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "turned": torch.randn(3, 5).t()}


def test_every_dtype_views_scalars_and_empty_tensors_come_through(tmp_path):
    state = _mixed()
    dcp.save(state, checkpoint_id=tmp_path / "flat")
    convert(tmp_path / "flat", tmp_path / "resilin")
    convert(tmp_path / "resilin", tmp_path / "again", Options(target_format="dcp"))
    stored = open_stored(tmp_path / "again")
    for name, tensor in state.items():
        assert torch.equal(stored.tensor(f"model/{name}"), tensor), name
    empty = {"model": {name: torch.zeros_like(tensor) for name, tensor in state.items()}}
    dcp.load(empty, checkpoint_id=tmp_path / "again")
    assert all(torch.equal(empty["model"][name], tensor) for name, tensor in state.items())


def _saved(folder: Path) -> Path:
    dcp.save({"model": {"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5)}, "step": 7}, checkpoint_id=folder)
    return folder


def _with_metadata(folder: Path, change) -> None:
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def test_a_file_that_is_missing_or_cut_is_named_with_its_tensor(tmp_path):
    folder = _saved(tmp_path / "cut")
    path = next(folder.glob("*.distcp"))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DamagedError, match=r"distcp: has \d+ bytes, but .* should be at .*the file was cut"):
        open_stored(folder)
    path.unlink()
    with pytest.raises(DamagedError, match=r"distcp: the file is missing; it holds"):
        open_stored(folder)


def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path):
    folder = _saved(tmp_path / "out")

    def lead_out(metadata):
        metadata.storage_data[MetadataIndex("model.b", [0])].relative_path = "../secret"

    _with_metadata(folder, lead_out)
    with pytest.raises(DamagedError, match=r"names the file '../secret', which leads out of"):
        open_stored(folder)


def test_a_box_that_is_missing_or_there_twice_is_found(tmp_path):
    folder = _saved(tmp_path / "gap")
    _with_metadata(folder, lambda m: m.state_dict_metadata["model.a"].chunks.clear())
    with pytest.raises(CheckpointError, match=r"tensor 'model/a' \[3, 4\]: no place holds \[0:3, 0:4\]"):
        open_stored(folder)
    folder = _saved(tmp_path / "twice")
    chunks = "model.a"
    _with_metadata(
        folder, lambda m: m.state_dict_metadata[chunks].chunks.append(m.state_dict_metadata[chunks].chunks[0])
    )
    with pytest.raises(CheckpointError, match=r"'model/a' .*fragments are missing or doubled"):
        open_stored(folder)


class _Runs:
    def __reduce__(self):
        return print, ("this ran",)


def test_an_index_that_would_run_code_is_refused_by_name(tmp_path, capsys):
    folder = _saved(tmp_path / "code")
    (folder / ".metadata").write_bytes(pickle.dumps(_Runs()))
    with pytest.raises(CheckpointError, match=r"names builtins.print, which the index .* has no need of"):
        open_stored(folder)
    assert "this ran" not in capsys.readouterr().out


def test_an_object_among_the_values_is_refused_by_name(tmp_path):
    dcp.save({"model": {"a": torch.ones(2)}, "extra": Path("x")}, checkpoint_id=tmp_path / "object")
    with pytest.raises(CheckpointError, match=r"extra: holds a pathlib"):
        open_stored(tmp_path / "object")


def test_other_values_come_back_as_they_were(tmp_path):
    from resilin.checkpoint.folder import CheckpointFolder

    other = {
        "numbers": {"0": 1, "1": [2.5, None]},
        "nothing": {},
        "lists": [[], {"a": True, "b": {}}, torch.arange(3), [1, [2]]],
        "text": "x.y",
    }
    CheckpointFolder(tmp_path / "run").save(2, {"model": {"a.b": torch.ones(2)}, "mine": other, "empty": {}})
    convert(tmp_path / "run", tmp_path / "dcp", Options(target_format="dcp"))
    convert(tmp_path / "dcp", tmp_path / "back")
    back = CheckpointFolder(tmp_path / "back").load(2)
    assert torch.equal(back["mine"]["lists"].pop(2), other["lists"].pop(2))
    assert back["mine"] == other
    assert back["empty"] == {}
