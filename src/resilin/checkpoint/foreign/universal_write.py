"""Writing DeepSpeed universal folders: an engine of any ZeRO stage opens one under `checkpoint: load_universal: true`.

An atom says how tensor-parallel ranks cut it, by the rules that are given; without them along dimension 0, which is
right for engines without tensor parallelism, or that know themselves how they cut (AutoTP). DeepSpeed itself restores
from such a folder only what its optimizer trains: frozen parameters and buffers are kept in the model file, from which
Resilin reads them back.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resilin.checkpoint.atomic import write_file
from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.foreign.deepspeed_rest import DEEPSPEED_VALUES, STRUCTURE
from resilin.checkpoint.foreign.rules import Rules
from resilin.checkpoint.foreign.stored import MODEL, OPTIMIZER, Stored, weight
from resilin.checkpoint.foreign.universal import GLOBAL, PARAM, POINTER
from resilin.checkpoint.tree import put_together

# What the loaders of DeepSpeed ask for; the version only has to be later than 0.3.17.
_VERSION = "0.19.8"


def write_universal(stored: Stored, target: Path, table: Mapping[str, Any] | None = None) -> int:
    """Write a universal folder: `TARGET/global_stepN_universal/` and the pointer to it, which comes last.

    Args:
        stored: what to write.
        target: an empty folder.
        table: how tensor-parallel ranks will cut the parameters; see `rules.py`. Every pattern must match one.

    Raises:
        CheckpointError: the source has no optimizer, its groups do not name the parameters, or the rules do not fit.
    """
    names = [name for group in stored.groups for name in group["parameters"]]
    moments = _moments(stored)
    if not names:
        raise CheckpointError(
            f"a universal folder holds a run's optimizer, and this {stored.title} has no parameter groups; write "
            "another format for weights alone"
        )
    lost = sorted(set(moments) - set(names))
    if lost:
        raise CheckpointError(f"no parameter group has {lost[0]!r}, though the optimizer keeps states of it")
    absent = sorted(name for name in names if weight(name) not in stored.names)
    if absent:
        raise CheckpointError(f"a parameter group names {absent[0]!r}, and the model has no such tensor")
    rules = Rules(table or {}, "the rules for the universal folder")
    marks = {name: rules.marks(name) for name in names}
    if rules.unused():
        raise CheckpointError(f"{rules.where}: {rules.unused()[0]!r} matches no trained parameter; was one renamed?")
    tag = f"global_step{stored.step or 0}_universal"
    zero = target / tag / "zero"
    zero.mkdir(parents=True)
    written = 0
    for name in names:
        folder = zero / name
        if not folder.resolve().is_relative_to(zero.resolve()):
            raise CheckpointError(f"parameter {name!r} would be written outside {zero}")
        folder.mkdir(parents=True)
        states = {"fp32": weight(name), **moments.get(name, {})}
        for state, tensor_name in states.items():
            tensor = _own(stored.tensor(tensor_name))
            content: Any = tensor if state == "step" else {**marks[name], PARAM: _float32(tensor, tensor_name)}
            written += _save(folder / f"{state}.pt", content)
        if "step" not in states and stored.step is not None:
            written += _save(folder / "step.pt", torch.tensor(float(stored.step)))
    trained = set(names)
    rest = {n.removeprefix(MODEL): n for n in stored.under(MODEL) if n.removeprefix(MODEL) not in trained}
    for name, tensor_name in rest.items():
        folder = zero / name
        folder.mkdir(parents=True)
        written += _save(folder / "fp32.pt", {PARAM: _own(stored.tensor(tensor_name)).float()})
    written += _save(zero / GLOBAL, _common(stored, moments, names))
    model = _model_states(stored, rest)
    for file in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        written += _save(target / tag / file, model)
    write_file(target / POINTER, tag)
    return written


def _moments(stored: Stored) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for name in stored.under(OPTIMIZER):
        state, _, parameter = name.removeprefix(OPTIMIZER).partition("/")
        if state == "fp32":
            raise CheckpointError(f"{name!r}: a universal folder has another meaning for a state called fp32")
        found.setdefault(parameter, {})[state] = name
    return found


def _own(tensor: Tensor) -> Tensor:
    """A tensor whose storage is its own: `torch.save` writes the whole storage of a view."""
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


def _float32(tensor: Tensor, name: str) -> Tensor:
    if tensor.dtype == torch.float64 or not tensor.is_floating_point():
        raise CheckpointError(f"{name!r} is {tensor.dtype}: atoms are float32, which does not hold its values")
    return tensor.float()


def _common(stored: Stored, moments: Mapping[str, Mapping[str, str]], names: list[str]) -> dict[str, Any]:
    groups = []
    for number, group in enumerate(stored.groups):
        made = {key: value for key, value in group.items() if key != "parameters"}
        if isinstance(made.get("betas"), list):
            made["betas"] = tuple(made["betas"])
        groups.append({**made, "params": [number]})
    counted = [moments[name]["step"] for name in names if "step" in moments.get(name, {})]
    step: Any = stored.tensor(counted[0]).clone() if counted else torch.tensor(float(stored.step or 0))
    own = stored.other.get("deepspeed", {})
    return {
        "param_groups": groups,
        "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": groups},
        "ds_version": _VERSION,
        **({"clip_grad": own["clip_grad"]} if "clip_grad" in own else {}),
    }


def _model_states(stored: Stored, rest: Mapping[str, str]) -> dict[str, Any]:
    own = dict(stored.other.get("deepspeed", {}))
    state = put_together({key: value for key, value in stored.other.items() if key != "deepspeed"}, stored.tensor)
    taken = sorted(set(state) & ({*STRUCTURE, *DEEPSPEED_VALUES, "deepspeed"} - {"global_steps"}))
    if taken:
        raise CheckpointError(
            f"'other/{taken[0]}' has the name of something that DeepSpeed keeps itself; leave it out with --leave-out"
        )
    # What DeepSpeed's own classes would hold (the loss scaler) is kept beside the user's values, for other readers.
    rest_of_own = {key: value for key, value in own.items() if key not in (*DEEPSPEED_VALUES, "clip_grad")}
    return {
        **state,
        **({"deepspeed": rest_of_own} if rest_of_own else {}),
        "module": {name: _own(stored.tensor(tensor)) for name, tensor in rest.items()},
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [
            {name: torch.Size(stored.holdings(weight(name)).shape) for name in group["parameters"]}
            for group in stored.groups
        ],
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "shared_params": {a.removeprefix(MODEL): n.removeprefix(MODEL) for a, n in stored.tied(MODEL).items()},
        "lr_scheduler": own.get("lr_scheduler"),
        "data_sampler": own.get("data_sampler"),
        "random_ltd": own.get("random_ltd"),
        "skipped_steps": own.get("skipped_steps", 0),
        "global_steps": stored.step or 0,
        "global_samples": own.get("global_samples", 0),
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_config": {},
        "ds_version": _VERSION,
    }


def _save(path: Path, content: Any) -> int:
    with path.open("xb") as handle:
        torch.save(content, handle)
        handle.flush()
        return handle.tell()
