"""What autograd keeps of a forward pass."""

from __future__ import annotations

import torch


def kept_bytes(model, tokens):
    """Bytes of distinct memory that autograd keeps, parameters and the loss's part aside."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    stores = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            stores[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(tokens).hidden_BTD
    del out
    return sum(stores.values())
