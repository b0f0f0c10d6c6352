"""What DeepSpeed's folders have in common when they are written: the groups, and the file of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.foreign.deepspeed_experts import is_expert
from resilin.checkpoint.foreign.deepspeed_rest import DEEPSPEED_VALUES, STRUCTURE
from resilin.checkpoint.foreign.stored import MODEL, OPTIMIZER, Stored, weight
from resilin.checkpoint.tree import put_together

# What the loaders of DeepSpeed ask for: the version whose folders these are like.
VERSION = "0.19.8"


@dataclass(frozen=True)
class Trained:
    """What the optimizer trains.

    Attributes:
        groups: the names of each group's parameters.
        moments: parameter -> state -> the tensor's name.
    """

    groups: list[list[str]]
    moments: Mapping[str, Mapping[str, str]]

    @property
    def names(self) -> list[str]:
        """Every parameter, in the groups' order."""
        return [name for group in self.groups for name in group]


def trained_of(stored: Stored, folder: str) -> Trained:
    """The groups of a checkpoint with the states of their parameters.

    Args:
        stored: the checkpoint.
        folder: what is to be written, for messages: "a universal folder".

    Raises:
        CheckpointError: it has no groups, or they, the model and the states do not name the same parameters.
    """
    groups = [list(group["parameters"]) for group in stored.groups]
    names = [name for group in groups for name in group]
    moments: dict[str, dict[str, str]] = {}
    for name in stored.under(OPTIMIZER):
        state, _, parameter = name.removeprefix(OPTIMIZER).partition("/")
        if state == "fp32":
            raise CheckpointError(f"{name!r}: {folder} has another meaning for a state called fp32")
        moments.setdefault(parameter, {})[state] = name
    if not names:
        raise CheckpointError(
            f"{folder} holds a run's optimizer, and this {stored.title} has no parameter groups; "
            + (
                "say with --groups FILE how the parameters are trained"
                if moments
                else "write another format for weights alone, or begin a new optimizer with --groups FILE --zero-states"
            )
        )
    experts = [name for name in names if is_expert(name)]
    if experts:
        raise CheckpointError(
            f"{experts[0]!r} is of an expert of DeepSpeed's MoE layers, whose ranks have files of their own: they are "
            "read, and not written; write another format"
        )
    lost = sorted(set(moments) - set(names))
    if lost:
        raise CheckpointError(f"no parameter group has {lost[0]!r}, though the optimizer keeps states of it")
    absent = sorted(name for name in names if weight(name) not in stored.names)
    if absent:
        raise CheckpointError(f"a parameter group names {absent[0]!r}, and the model has no such tensor")
    return Trained(groups, moments)


def hyper_parameters(group: Mapping[str, Any], params: list[int]) -> dict[str, Any]:
    """A group as an optimizer's state dict has it."""
    made = {key: value for key, value in group.items() if key != "parameters"}
    if isinstance(made.get("betas"), list):
        made["betas"] = tuple(made["betas"])
    return {**made, "params": params}


def own_tensor(tensor: Tensor) -> Tensor:
    """A tensor whose storage is its own: `torch.save` writes the whole storage of a view."""
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


def float32(tensor: Tensor, name: str) -> Tensor:
    """A tensor in the precision of DeepSpeed's masters.

    Raises:
        CheckpointError: that does not hold its values.
    """
    if tensor.dtype == torch.float64 or not tensor.is_floating_point():
        raise CheckpointError(f"{name!r} is {tensor.dtype}: DeepSpeed's are float32, which does not hold its values")
    return tensor.float()


def model_states(
    stored: Stored,
    module: Mapping[str, Tensor],
    shapes: list[dict[str, tuple[int, ...]]],
    ranks: int,
    frozen: Mapping[str, Tensor] | None,
    apart: tuple[str, ...] = (),
) -> dict[str, Any]:
    """The content of a model file.

    Args:
        stored: the checkpoint, whose other values go in as the user's (client) state.
        module: by name, the tensors of the module's state dict.
        shapes: of the trained parameters, by group or sub-group.
        ranks: data-parallel ones.
        frozen: what this rank has of each parameter that is not trained; None: `module` has them.
        apart: values of DeepSpeed's own that other files have.

    Raises:
        CheckpointError: a value of the user has the name of one that DeepSpeed keeps itself.
    """
    state = put_together(stored.other, stored.tensor)
    own = state.pop("deepspeed", {})
    taken = sorted(set(state) & ({*STRUCTURE, *DEEPSPEED_VALUES} - {"global_steps"}))
    if taken:
        raise CheckpointError(
            f"'other/{taken[0]}' has the name of something that DeepSpeed keeps itself; leave it out with --leave-out"
        )
    # What has no place in DeepSpeed's own tables is kept beside the user's values, for other readers.
    rest_of_own = {key: value for key, value in own.items() if key not in (*DEEPSPEED_VALUES, *apart)}
    trained = {name for group in shapes for name in group}
    kept = {n.removeprefix(MODEL) for n in stored.under(MODEL)} - trained - set(stored.frozen or ())
    held = {} if frozen is None else {name: torch.Size(stored.holdings(weight(name)).shape) for name in frozen}
    return {
        **state,
        **({"deepspeed": rest_of_own} if rest_of_own else {}),
        "module": dict(module),
        "buffer_names": sorted(kept),
        "optimizer": None,
        "param_shapes": [{name: torch.Size(shape) for name, shape in group.items()} for group in shapes],
        "frozen_param_shapes": None if frozen is None else held,
        "frozen_param_fragments": None if frozen is None else dict(frozen),
        "shared_params": {a.removeprefix(MODEL): n.removeprefix(MODEL) for a, n in stored.tied(MODEL).items()},
        "lr_scheduler": own.get("lr_scheduler"),
        "data_sampler": own.get("data_sampler"),
        "random_ltd": own.get("random_ltd"),
        "skipped_steps": own.get("skipped_steps", 0),
        "global_steps": stored.step or 0,
        **({"global_samples": own["global_samples"]} if "global_samples" in own else {}),
        "dp_world_size": ranks,
        "mp_world_size": 1,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
        "ds_config": {},
        "ds_version": VERSION,
    }
