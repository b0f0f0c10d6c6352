"""What a DeepSpeed checkpoint holds beside masters and moments: rounded copies, frozen parameters, buffers, values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.foreign.buffers import Gathered, equal
from resilin.checkpoint.foreign.deepspeed_files import DeepSpeedFiles
from resilin.checkpoint.foreign.deepspeed_parameters import TIED, Parameters
from resilin.checkpoint.foreign.pickles import leaves, plain
from resilin.checkpoint.foreign.stored import OTHER, LeftOut, dtype_name, weight

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
    "ds_autoep_layers",
}
KEPT_OF_OPTIMIZER = ("loss_scaler", "dynamic_loss_scale", "overflow", "clip_grad")
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
            elif tensor.numel() == 0 and files.optimizers and files.partitioned:
                unread[weight(name)] = (
                    f"{where} keeps no values under this name, and does not say which parameter it is tied to: "
                    f"name it with --tie {name}=OTHER"
                )
            else:
                _keep_model(files, parameters, gathered, name, mp, where, tensor)
        if not files.optimizers and (content.get("optimizer") or files.by_position):
            keeper = files.by_position[0] if files.by_position else where
            unread["optimizer"] = (
                f"{keeper} keeps optimizer states by position, without the parameters' names (ZeRO stage 0); save it "
                "with ZeRO stage 1 to convert them"
            )
    for where, content in files.experts.values():
        for name, tensor in content.items():
            if name in parameters.all_shapes(0):
                _keep_rounded(parameters, rounded, name, 0, where, tensor)
            else:
                gathered.whole(weight(name), where, name, tensor)
    _layers(files, parameters, rounded, unread)
    return ties, unread


def frozen_names(files: DeepSpeedFiles, parameters: Parameters) -> frozenset[str] | None:
    """Parameters that are not trained: what of the modules is neither trained, nor tied, nor a buffer."""
    found: set[str] = set()
    for mp in range(files.pipeline * files.tensor):
        _, content = files.model(mp)
        if content.get("buffer_names") is None:
            return None
        known = {*content["buffer_names"], *(content.get("shared_params") or ()), *parameters.all_shapes(mp)}
        found |= set(content.get("module") or ()) - known
    found |= {name for _, content in files.experts.values() for name in content} - set(parameters.all_shapes(0))
    return frozenset(found)


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


def _layers(files: DeepSpeedFiles, parameters: Parameters, rounded: Gathered, unread: dict[str, str]) -> None:
    """The files that a pipeline keeps its layers in: copies of trained parameters, and what else is in them."""
    stages: dict[str, tuple[int, tuple[int, ...]]] = {}
    for stage in reversed(range(files.pipeline)):
        shapes = parameters.all_shapes(stage * files.tensor)
        stages.update({name: (stage, shape) for name, shape in shapes.items()})
    for (layer, tp), (where, content) in files.layers.items():
        for path, value in leaves(content):
            inner = ".".join(path)
            if value is None:
                continue
            name: str | None = f"{layer}.{inner}"
            if name not in stages and isinstance(value, Tensor):
                name = _tied_name({n: shape for n, (_, shape) in stages.items()}, inner, value)
            if name in stages and isinstance(value, Tensor):
                mp = stages[name][0] * files.tensor + tp
                _keep_rounded(parameters, rounded, name, mp, f"{where}: {inner}", value)
            else:
                unread[f"model/{where}/{inner}"] = (
                    "it is no trained parameter's copy, and its name in the whole is not known"
                )


def _tied_name(trained: Mapping[str, tuple[int, ...]], inner: str, value: Tensor) -> str | None:
    """The tied parameter that a layer's file keeps a copy of, if there is only one it can be; the copy is compared."""
    found = [
        one
        for one, shape in trained.items()
        if one.startswith(TIED) and one.endswith("." + inner) and shape == tuple(value.shape)
    ]
    return found[0] if len(found) == 1 else None


def _keep_rounded(parameters: Parameters, rounded: Gathered, name: str, mp: int, where: str, tensor: Tensor) -> None:
    found = parameters.here(name, mp)
    if found is None or found[1].average or tuple(tensor.shape) != found[2].shape:
        return  # ZeRO-3 leaves an empty placeholder
    _, union, slice_ = found
    rounded.builder.tensor(weight(name), union.shape, dtype_name(tensor, where), copies=None)
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
    if not files.partitioned:
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


def other_values(
    files: DeepSpeedFiles, gathered: Gathered, unread: dict[str, str]
) -> tuple[dict[str, Any], tuple[LeftOut, ...]]:
    """Everything that is no tensor of the model or optimizer: the user's own state, schedules, counters, scalers.

    What model ranks have different values of is added to `unread`.
    """
    tables = [files.model(mp) for mp in range(files.pipeline * files.tensor)]
    chosen = {}
    for key, value in tables[0][1].items():
        if key in STRUCTURE:
            continue
        values = [plain(content.get(key), key) for _, content in tables]
        if any(not equal(values[0], other) for other in values[1:]):
            unread[OTHER + key] = "the ranks have different values of it, which mean nothing on other ranks"
        else:
            chosen[key] = plain(value, key)
    for where, content in tables[1:]:
        more = sorted(set(content) - set(tables[0][1]) - STRUCTURE)
        unread.update({OTHER + key: f"only {where} has it, not {tables[0][0]}" for key in more})
    own = chosen.pop("deepspeed", {})
    if not isinstance(own, dict):
        raise CheckpointError(f"{tables[0][0]}: 'deepspeed' is a name that is needed for DeepSpeed's own values")
    own.update({key: chosen.pop(key) for key in DEEPSPEED_VALUES if chosen.get(key) is not None})
    for key in DEEPSPEED_VALUES:
        chosen.pop(key, None)
    if files.optimizers:
        state = files.optimizers[0, 0][1]["optimizer_state_dict"]
        own.update({key: plain(state[key], key) for key in KEPT_OF_OPTIMIZER if key in state})
        if (dtype := _computed_in(files)) is not None:
            own["dtype"] = dtype
    left_out: tuple[LeftOut, ...] = ()
    if files.model(0)[1].get("ds_config"):
        left_out = (LeftOut("ds_config", "settings of the run that wrote it"),)
    return gathered.marked({**chosen, "deepspeed": own}, files.model(0)[0]), left_out


def _computed_in(files: DeepSpeedFiles) -> str | None:
    """The dtype of the module's copies of trained parameters (in stage 3 they are empty, and have one all the same)."""
    _, content = files.model(0)
    module = content.get("module") or {}
    names = [name for group in content.get("param_shapes") or () for name in group if name in module]
    return str(module[names[0]].dtype).removeprefix("torch.") if names else None
