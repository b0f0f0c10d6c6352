"""The objects of DeepSpeed's classes that its folders hold, as records: none of its code is needed to write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from resilin.checkpoint.foreign.pickle_write import record
from resilin.checkpoint.foreign.pickles import Record

_SCALERS = "deepspeed.runtime.fp16.loss_scaler."


def fragment_address(start: int, numel: int) -> Record:
    """Where a rank's row has its part of a parameter."""
    return record("deepspeed.utils.tensor_fragment.fragment_address", numel=numel, start=start)


def several_in_one(fields: Mapping[str, Any]) -> Record:
    """How a parameter that is several in one is cut: patterns, shape with sizes of the several, dimension."""
    return record("deepspeed.checkpoint.universal_checkpoint.SubparamShape", **fields)


def no_scaling() -> Record:
    """What scales the loss of an engine that need not: by one."""
    return record(_SCALERS + "LossScaler", cur_scale=1.0, dynamic=False)


def loss_scaler(own: Mapping[str, Any]) -> Record | None:
    """The object that scales the loss, with the fields that were read of it; None: none were.

    Args:
        own: DeepSpeed's own values of a checkpoint (`other/deepspeed`).
    """
    fields = own.get("loss_scaler")
    if fields is None:
        return None
    name = "DynamicLossScaler" if fields.get("dynamic") else "LossScaler"
    made = {**fields, "dtype": getattr(torch, fields["dtype"].removeprefix("torch."))} if "dtype" in fields else fields
    return record(_SCALERS + name, **made)
