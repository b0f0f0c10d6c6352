"""Reading DeepSpeed universal folders, as `ds_to_universal` writes them for any stage, or `universal_write.py`.

They have `zero/NAME/STATE.pt`, one whole tensor a file, beside model files and the settings of the parameter groups.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from resilin.checkpoint.errors import DamagedError
from resilin.checkpoint.foreign.buffers import Gathered, as_tensor, equal, same_everywhere
from resilin.checkpoint.foreign.deepspeed_files import tag_folder
from resilin.checkpoint.foreign.deepspeed_rest import DEEPSPEED_VALUES, KEPT_OF_OPTIMIZER, STRUCTURE
from resilin.checkpoint.foreign.pickles import load_pickle, plain
from resilin.checkpoint.foreign.shards import Slice
from resilin.checkpoint.foreign.stored import OPTIMIZER, LeftOut, Stored, dtype_name, moment, weight

POINTER = "latest_universal"
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
GLOBAL = "optimizer_state.pt"
PARAM = "param"


def is_universal(folder: Path) -> bool:
    """Whether a folder holds a universal checkpoint."""
    return (tag_folder(folder, POINTER) / "zero").is_dir()


def read_universal(folder: Path, allow: Iterable[str] = ()) -> Stored:
    """Open a universal folder.

    Raises:
        CheckpointError: an atom is missing or damaged, or a value has no place elsewhere.
    """
    folder = tag_folder(folder, POINTER)
    allow = tuple(allow)
    models = {path.name: load_pickle(path, allow) for path in _model_files(folder)}
    shapes = [_shapes(content) for content in models.values()]
    trained: dict[str, tuple[int, ...]] = {name: shape for table in shapes for g in table for name, shape in g.items()}
    gathered = Gathered()
    ties: dict[str, str] = {}
    atoms = _atoms(folder / "zero")
    missing = sorted(name for name in trained if "fp32" not in atoms.get(name, {}))
    if missing:
        raise DamagedError(f"{folder / 'zero' / missing[0]}: has no fp32.pt, though the parameter is trained")
    lacking = _lacking(folder, atoms, shapes)
    modules, unread = _modules(models)
    shared = {n: o for content in models.values() for n, o in (content.get("shared_params") or {}).items()}
    for name, states in atoms.items():
        if name in shared:
            ties[weight(name)] = weight(shared[name])
            continue
        kept = modules.get(name)
        if name not in trained and kept is not None and kept[1].numel():
            continue  # a frozen parameter or buffer: the model file has it in its own precision
        for state, path in states.items():
            _keep(gathered, name, state, path, folder, trained.get(name), allow)
    for name, (file, tensor) in modules.items():
        if name not in trained and name not in shared and tensor.numel():
            gathered.whole(weight(name), file, name, tensor, copies=None)
    frozen = _keep_frozen(gathered, models, set(atoms) | {n for n, (_, t) in modules.items() if t.numel()})
    held = {*trained, *shared, *frozen, *atoms}
    unread |= lacking
    unread |= {
        weight(name): f"{file} keeps no values under this name, and no atom has it"
        for name, (file, tensor) in modules.items()
        if name not in held and not tensor.numel()
    }
    common = load_pickle(folder / "zero" / GLOBAL, allow)
    for table in shapes[:1]:
        for number, group in enumerate(table):
            _keep_step(gathered, common, number, [name for name in group if "step" not in atoms[name]])
    tables = [(f, {k: plain(v, k) for k, v in c.items() if k not in STRUCTURE}) for f, c in models.items()]
    chosen: Any = same_everywhere(tables, "the values beside the model") if tables else {}
    own = {key: chosen.pop(key) for key in DEEPSPEED_VALUES if chosen.get(key) is not None}
    own.update(chosen.pop("deepspeed", {}))
    other = {key: value for key, value in chosen.items() if key not in DEEPSPEED_VALUES}
    own.update({key: plain(common[key], key) for key in KEPT_OF_OPTIMIZER if key in common})
    first: Mapping[str, Any] = next(iter(models.values()))
    left = (LeftOut("ds_config", "settings of the run that wrote it"),) if first.get("ds_config") else ()
    marked = gathered.marked({**other, "deepspeed": own}, "model states")
    return Stored(
        "DeepSpeed universal folder",
        gathered.builder.layout(folder),
        gathered.read,
        int(first.get("global_steps") or 0),
        _groups(common, shapes),
        marked,
        ties,
        left_out=left,
        unread=unread,
        frozen=_frozen(models.values(), {*trained, *shared}),
    )


def _frozen(models: Iterable[Mapping[str, Any]], known: set[str]) -> frozenset[str] | None:
    """Parameters of the model files that are not trained: what is neither trained, tied nor a buffer."""
    found: set[str] = set()
    for content in models:
        if content.get("buffer_names") is None:
            return None
        found |= set(content.get("module") or ()) - set(content["buffer_names"]) - known
    return frozenset(found)


def _modules(models: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, tuple[str, Tensor]], dict[str, str]]:
    """What the model files hold, and what of it differs between them."""
    found: dict[str, tuple[str, Tensor]] = {}
    unread = {}
    for file, content in models.items():
        trained = {name for group in content.get("param_shapes") or [] for name in group}
        for name, tensor in (content.get("module") or {}).items():
            if not isinstance(tensor, Tensor):
                if tensor is not None:
                    unread[weight(name)] = f"it is a {type(tensor).__name__}, not a tensor"
                continue
            known = found.setdefault(name, (file, tensor))
            if name not in trained and not equal(known[1], tensor):
                unread[weight(name)] = f"{known[0]} and {file} have different values of it: they are parts, or copies"
    return {name: one for name, one in found.items() if weight(name) not in unread}, unread


def _keep_step(gathered: Gathered, common: Mapping[str, Any], number: int, names: list[str]) -> None:
    """The step of a sub-group of stage 3, for which `ds_to_universal` writes no atoms."""
    states = (common.get("optimizer_state_dict") or {}).get("state", {})
    step = states.get(number, {}).get("step")
    for name in names if step is not None else ():
        gathered.whole(moment("step", name), f"zero/{GLOBAL}", f"step of {number}", as_tensor(step), copies=None)


def _lacking(
    folder: Path, atoms: Mapping[str, Mapping[str, Path]], shapes: list[list[dict[str, tuple[int, ...]]]]
) -> dict[str, str]:
    """Trained parameters without any optimizer state, though others of their group have some.

    Raises:
        DamagedError: a parameter has some of the states of its group, not all.
    """
    found = {}
    for group in (group for table in shapes for group in table):
        usual = {state for name in group for state in atoms.get(name, {})} - {"fp32"}
        for name in group:
            states = set(atoms.get(name, {})) - {"fp32"}
            if states and states != usual:
                missing = min(usual - states)
                raise DamagedError(
                    f"{folder / 'zero' / name / missing}.pt: the file is missing; others of its group have it"
                )
            if usual and not states:
                found[f"{OPTIMIZER}*/{name}"] = "there is no optimizer state of it, though others of its group have one"
    return found


def _keep_frozen(gathered: Gathered, models: Mapping[str, Mapping[str, Any]], known: set[str]) -> set[str]:
    """Frozen parameters that stage 3 cut over its ranks' model files."""
    ranked = {int(match[1]): file for file in models if (match := _MODEL.fullmatch(file)) and match[1] is not None}
    shapes = {
        name: tuple(shape) for c in models.values() for name, shape in (c.get("frozen_param_shapes") or {}).items()
    }
    found = set()
    for name, shape in shapes.items():
        if name in known or sorted(ranked) != list(range(len(ranked))):
            continue
        count = math.prod(shape)
        slot = -(-count // len(ranked))
        for rank, file in ranked.items():
            row = models[file]["frozen_param_fragments"][name].reshape(-1)
            gathered.builder.tensor(weight(name), shape, dtype_name(row, file))
            first = min(rank * slot, count)
            gathered.keep_flat(weight(name), file, name, row, 0, Slice.whole(shape), (first, min(first + slot, count)))
        found.add(name)
    return found


def _model_files(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.iterdir() if _MODEL.fullmatch(path.name))
    if not found:
        raise DamagedError(f"{folder}: has no mp_rank_*_model_states.pt")
    return found


def _shapes(content: Mapping[str, Any]) -> list[dict[str, tuple[int, ...]]]:
    return [{name: tuple(shape) for name, shape in group.items()} for group in content.get("param_shapes") or []]


def _atoms(zero: Path) -> dict[str, dict[str, Path]]:
    """Name of parameter -> state -> file."""
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(zero.rglob("*.pt")):
        if path.parent != zero:
            found.setdefault(path.parent.relative_to(zero).as_posix(), {})[path.stem] = path
    return found


def _keep(
    gathered: Gathered,
    name: str,
    state: str,
    path: Path,
    folder: Path,
    shape: tuple[int, ...] | None,
    allow: tuple[str, ...],
) -> None:
    value = load_pickle(path, allow)
    where = path.relative_to(folder).as_posix()
    if isinstance(value, dict):
        shape = None  # it has its own: that of the whole, where the model file has a tensor-parallel shard's
        value = value.get(PARAM)
    if state == "step" or isinstance(value, (int, float)):
        gathered.whole(moment(state, name), where, state, as_tensor(value))
        return
    if not isinstance(value, Tensor):
        raise DamagedError(f"{path}: holds no tensor")
    tensor = weight(name) if state == "fp32" else moment(state, name)
    if value.dim() == 1 and shape is not None and tuple(value.shape) != shape:  # stage 3 writes them flat
        count = math.prod(shape)
        if value.numel() != count:
            raise DamagedError(f"{path}: has {value.numel()} elements, and {name!r} is {list(shape)}")
        gathered.builder.tensor(tensor, shape, dtype_name(value, path))
        gathered.keep_flat(tensor, where, state, value, 0, Slice.whole(shape), (0, count))
    else:
        gathered.whole(tensor, where, state, value)


def _groups(common: Mapping[str, Any], shapes: list[list[dict[str, tuple[int, ...]]]]) -> list[dict[str, Any]]:
    inner = common.get("optimizer_state_dict")
    groups = plain(common.get("param_groups") or (inner or {}).get("param_groups") or [], "param_groups")
    made = []
    for number, group in enumerate(groups):
        listed = group.get("params", []) if inner and "fp32_flat_groups" in common else [number]
        names: dict[str, None] = {}
        for table in shapes:
            for part in listed:
                if part < len(table):
                    names.update(dict.fromkeys(table[part]))
        made.append({**{k: v for k, v in group.items() if k != "params"}, "parameters": list(names)})
    return made
