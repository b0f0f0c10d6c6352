"""What a DeepSpeed checkpoint holds beside masters and moments: rounded copies, frozen parameters, buffers, values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from resilin.checkpoint.foreign.buffers import Gathered, same_everywhere
from resilin.checkpoint.foreign.deepspeed_files import DeepSpeedFiles
from resilin.checkpoint.foreign.pickles import leaves, plain
from resilin.checkpoint.foreign.stored import LeftOut, dtype_name, weight

if TYPE_CHECKING:
    from resilin.checkpoint.foreign.deepspeed import Parameters

STRUCTURE = {
    "module",
    "buffer_names",
    "optimizer",
    "param_shapes",
    "frozen_param_shapes",
    "frozen_param_fragments",
    "shared_params",
    "dp_world_size",
    "mp_world_size",
    "checkpoint_parallel_dimensions",
    "universal_checkpoint_info",
    "ds_version",
    "ds_config",
    "global_steps",
    "num_experts",
}
_KEPT_OF_OPTIMIZER = ("loss_scaler", "dynamic_loss_scale", "overflow", "clip_grad")
DEEPSPEED_VALUES = ("lr_scheduler", "data_sampler", "random_ltd", "skipped_steps", "global_samples")


def model_rest(
    files: DeepSpeedFiles, parameters: Parameters, gathered: Gathered, rounded: Gathered
) -> tuple[dict[str, str], dict[str, str]]:
    """Add the tensors of the model files to the layouts.

    Returns:
        Ties (name -> name it is stored under), and what could not be read (name -> why).
    """
    ties: dict[str, str] = {}
    unread: dict[str, str] = {}
    for mp in range(files.pipeline * files.tensor):
        where, content = files.model(mp)
        shared = content.get("shared_params") or {}
        ties.update({weight(alias): weight(name) for alias, name in shared.items()})
        buffers = set(content.get("buffer_names") or ())
        frozen = _frozen(files, parameters, gathered, mp)
        trained = parameters.all_shapes(mp)
        for name, tensor in _module(files, mp, unread):
            if name in shared or name in frozen:
                continue
            if name in trained:
                _keep_rounded(parameters, rounded, name, mp, where, tensor)
            elif name in buffers:
                gathered.whole(weight(name), where, name, tensor, copies=None)
            elif tensor.numel() == 0 and files.optimizers and 0 in tensor.shape and len(files.models) > 1:
                unread[weight(name)] = (
                    f"{where} keeps no values under this name, and does not say which parameter it is tied to: "
                    f"name it with --tie {name}=OTHER"
                )
            else:
                _keep_model(files, parameters, gathered, name, mp, where, tensor)
        for name, key, value in _layers(files, mp):
            if name in trained and isinstance(value, Tensor):
                _keep_rounded(parameters, rounded, name, mp, where, value)
            else:
                unread[weight(key)] = "it lies in a pipeline layer's file, and is no trained parameter's copy"
        if not files.optimizers and content.get("optimizer"):
            unread["optimizer"] = (
                f"{where} keeps optimizer states by position, without the parameters' names (ZeRO stage 0); save it "
                "with ZeRO stage 1 to convert them"
            )
    return ties, unread


def _module(files: DeepSpeedFiles, mp: int, unread: dict[str, str]) -> list[tuple[str, Tensor]]:
    _, content = files.model(mp)
    module = content.get("module")
    if module is not None:
        found = []
        for name, value in module.items():
            if isinstance(value, Tensor):
                found.append((name, value))
            elif value is not None:
                unread[weight(name)] = f"it is a {type(value).__name__}, not a tensor"
        return found
    return []


def _layers(files: DeepSpeedFiles, mp: int) -> list[tuple[str, str, Any]]:
    """Everything in the files that a pipeline keeps its layers in, with its names in the module and in the file."""
    found = []
    for (layer, tp), (where, content) in files.layers.items():
        if tp == mp % files.tensor:
            for path, value in leaves(content):
                key = ".".join(path)
                if value is not None:
                    found.append((f"{layer}.{key}", f"{where}/{key}", value))
    return found


def _keep_rounded(parameters: Parameters, rounded: Gathered, name: str, mp: int, where: str, tensor: Tensor) -> None:
    found = parameters.here(name, mp)
    if found is None or found[1].average or tuple(tensor.shape) != found[2].shape:
        return  # ZeRO-3 leaves an empty placeholder
    _, union, slice_ = found
    rounded.builder.tensor(weight(name), union.shape, dtype_name(tensor, where), union.copies)
    rounded.keep(weight(name), where, name, tensor, slice_)


def _keep_model(
    files: DeepSpeedFiles, parameters: Parameters, gathered: Gathered, name: str, mp: int, where: str, tensor: Tensor
) -> None:
    stage, tp = divmod(mp, files.tensor)
    shapes = []
    for rank in range(files.tensor):
        module = files.model(stage * files.tensor + rank)[1].get("module") or {}
        shapes.append(tuple(module[name].shape) if name in module else tuple(tensor.shape))
    union = parameters.union(name, shapes)
    part = parameters.declare(gathered, weight(name), union, tp, dtype_name(tensor, where))
    gathered.keep(part, where, name, tensor, union.slices[tp])


def _frozen(files: DeepSpeedFiles, parameters: Parameters, gathered: Gathered, mp: int) -> set[str]:
    """Frozen parameters of ZeRO-3, cut over the data ranks like the trained ones; whole ones are in the module too."""
    _, content = files.model(mp)
    shapes = content.get("frozen_param_shapes") or {}
    if len(files.models) == files.pipeline * files.tensor:
        return set()
    ranks = 1 + max(dp for dp, _ in files.models)
    stage, tp = divmod(mp, files.tensor)
    for name, shape in shapes.items():
        locals_ = [
            tuple(files.model(stage * files.tensor + rank)[1]["frozen_param_shapes"][name])
            for rank in range(files.tensor)
        ]
        union = parameters.union(name, locals_)
        count = shape.numel()
        slot = -(-count // ranks)
        for dp in range(ranks):
            where, held = files.models[dp, mp]
            row = held["frozen_param_fragments"][name].reshape(-1)
            part = parameters.declare(gathered, weight(name), union, tp, dtype_name(row, where))
            first = min(dp * slot, count)
            gathered.keep_flat(part, where, name, row, 0, union.slices[tp], (first, min(first + slot, count)))
    return set(shapes)


def other_values(files: DeepSpeedFiles, gathered: Gathered) -> tuple[dict[str, Any], tuple[LeftOut, ...]]:
    """Everything that is no tensor of the model or optimizer: the user's own state, schedules, counters, scalers."""
    tables = []
    for mp in range(files.pipeline * files.tensor):
        where, content = files.model(mp)
        tables.append((where, {k: plain(v, k) for k, v in content.items() if k not in STRUCTURE}))
    chosen = same_everywhere(tables, "the values beside the model")
    assert isinstance(chosen, dict)
    own = {key: chosen.pop(key) for key in DEEPSPEED_VALUES if chosen.get(key) is not None}
    for key in DEEPSPEED_VALUES:
        chosen.pop(key, None)
    if files.optimizers:
        state = files.optimizers[0, 0][1]["optimizer_state_dict"]
        own.update({key: plain(state[key], key) for key in _KEPT_OF_OPTIMIZER if key in state})
    left_out: tuple[LeftOut, ...] = ()
    if files.model(0)[1].get("ds_config"):
        left_out = (LeftOut("ds_config", "settings of the run that wrote it"),)
    return gathered.marked({**chosen, "deepspeed": own}, files.model(0)[0]), left_out
