"""What of a model does not change while it is trained goes into a part of the checkpoint of its own.

The store links a file that an earlier checkpoint holds already: a frozen base is on the disk once, however often the
run saves, and every checkpoint still holds the whole model.
"""

from __future__ import annotations

from torch import Tensor, nn

from resilin.nouns import State


def split_frozen(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The model's state: what is trained (and all buffers), and the parameters that are frozen now."""
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    state = model.state_dict()
    return (
        {name: tensor for name, tensor in state.items() if name not in frozen},
        {name: tensor for name, tensor in state.items() if name in frozen},
    )


def joined(state: State) -> dict[str, Tensor]:
    """The model's whole state out of a checkpoint's parts."""
    return {**state.get("frozen", {}), **state["model"]}
