"""Whether a saved state is that of a model, found before anything of the model is changed."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from resilin.checkpoint.errors import CheckpointError


def check_fits(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Refuse a state whose names, or shapes of parameters, are not those of the model.

    Args:
        model: that is to take it. A buffer of another shape is for its module to judge.
        saved: what is to be loaded into it.

    Raises:
        CheckpointError: naming a tensor that is missing, unknown, or of another shape, and how many more there are.
    """
    live, parameters = model.state_dict(), dict(model.named_parameters(remove_duplicate=False))
    missing = [name for name in live if name not in saved]
    unknown = [name for name in saved if name not in live]
    shaped = [name for name in live if name in saved and name in parameters and saved[name].shape != live[name].shape]
    if shaped:
        name = shaped[0]
        raise CheckpointError(
            f"tensor {name!r} was saved with shape {list(saved[name].shape)}, and the model's has "
            f"{list(live[name].shape)}{_more(shaped)}: is this the checkpoint of a model of another size?"
        )
    if missing or unknown:
        parts = [f"the model has {missing[0]!r}, which was not saved{_more(missing)}"] if missing else []
        parts += [f"{unknown[0]!r} was saved, which the model does not have{_more(unknown)}"] if unknown else []
        raise CheckpointError(f"{'; '.join(parts)}: is this the checkpoint of another model?")


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
