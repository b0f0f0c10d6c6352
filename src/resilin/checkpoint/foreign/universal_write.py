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

from resilin.checkpoint.atomic import write_file
from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.foreign.deepspeed_objects import several_in_one
from resilin.checkpoint.foreign.deepspeed_states import (
    VERSION,
    Trained,
    float32,
    hyper_parameters,
    model_states,
    own_tensor,
    trained_of,
)
from resilin.checkpoint.foreign.pickle_write import save_pickle
from resilin.checkpoint.foreign.rules import Rules
from resilin.checkpoint.foreign.stored import MODEL, Stored, weight
from resilin.checkpoint.foreign.universal import GLOBAL, PARAM, POINTER


def write_universal(stored: Stored, target: Path, table: Mapping[str, Any] | None = None) -> int:
    """Write a universal folder: `TARGET/global_stepN_universal/` and the pointer to it, which comes last.

    Args:
        stored: what to write.
        target: an empty folder.
        table: how tensor-parallel ranks will cut the parameters; see `rules.py`. Every pattern must match one.

    Raises:
        CheckpointError: the source has no optimizer, its groups do not name the parameters, or the rules do not fit.
    """
    trained = trained_of(stored, "a universal folder")
    names = trained.names
    rules = Rules(table or {}, "the rules for the universal folder")
    marks = {name: _marks(rules, name, stored.holdings(weight(name)).shape) for name in names}
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
        states = {"fp32": weight(name), **trained.moments.get(name, {})}
        for state, tensor_name in states.items():
            tensor = own_tensor(stored.tensor(tensor_name))
            content: Any = tensor if state == "step" else {**marks[name], PARAM: float32(tensor, tensor_name)}
            written += save_pickle(folder / f"{state}.pt", content)
        if "step" not in states and stored.step is not None:
            written += save_pickle(folder / "step.pt", torch.tensor(float(stored.step)))
    rest = {n.removeprefix(MODEL): n for n in stored.under(MODEL) if n.removeprefix(MODEL) not in names}
    for name, tensor_name in rest.items():
        folder = zero / name
        folder.mkdir(parents=True)
        written += save_pickle(folder / "fp32.pt", {PARAM: own_tensor(stored.tensor(tensor_name)).float()})
    written += save_pickle(zero / GLOBAL, _common(stored, trained))
    module = {name: own_tensor(stored.tensor(tensor)) for name, tensor in rest.items()}
    shapes = [{name: stored.holdings(weight(name)).shape for name in group} for group in trained.groups]
    model = model_states(stored, module, shapes, 1, None, apart=("clip_grad",))
    for file in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        written += save_pickle(target / tag / file, model)
    write_file(target / POINTER, tag)
    return written


def _marks(rules: Rules, name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """What an atom says of how it is cut; several parameters in one as the object that DeepSpeed makes of them."""
    found = rules.marks(name, shape)
    several = found.get("sub_param_shape")
    return found if several is None else {**found, "sub_param_shape": several_in_one(several)}


def _common(stored: Stored, trained: Trained) -> dict[str, Any]:
    groups = [hyper_parameters(group, [number]) for number, group in enumerate(stored.groups)]
    counted = [states["step"] for states in trained.moments.values() if "step" in states]
    step: Any = stored.tensor(counted[0]).clone() if counted else torch.tensor(float(stored.step or 0))
    own = stored.other.get("deepspeed", {})
    return {
        "param_groups": groups,
        "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": groups},
        "ds_version": VERSION,
        **({"clip_grad": own["clip_grad"]} if "clip_grad" in own else {}),
    }
