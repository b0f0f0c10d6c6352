"""What of a trained model matters most, by Nemotron Elastic (2025, section 3.1), and putting it first.

Sums run over the tokens of some calibration texts:

    channel i of the stream   sum |LN(x)_i|, over all norms of layers: one order for the whole model
    neuron i                  sum |x W1_i| before the activation; of a gated feed-forward, |act(gate) * up|
    attention head            sum |x W_q|, over its rows: heads inside their group, and groups by the sum of theirs
    Mamba-2                   s = x W_x: channels by ||s|| over heads and tokens, one order for all heads; heads inside
                              their group by ||s|| over the better half of channels
    layer j                   sum (logits - logits without j)^2 / sum logits^2; the least important one is removed, and
                              those that are left are measured again

Shapes: N tokens, D hidden size, F neurons, H heads, P channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn

from resilin.inference.scoring import evaluating
from resilin.keys import Keys
from resilin.models.attention import Attention
from resilin.models.decoder import Decoder
from resilin.models.mamba import Mamba2
from resilin.models.mlp import MLP
from resilin.nested.budgets import Budget
from resilin.nested.importance import ImportanceError, importance, parts_of
from resilin.nested.in_place import budget, full
from resilin.nested.regions import regions
from resilin.nouns import Batch
from resilin.objective.next_token import IGNORE

By = Literal["activation", "weight", "random", "none"]
_NORMS = ("attention_norm", "mlp_norm", "norm")


class _Sum:
    """The sum of |x| (or of x^2) of what a module gives, or takes, by column, over all tokens that pass."""

    def __init__(self, module: nn.Module, *, input_: bool = False, squared: bool = False) -> None:
        self.total: Tensor | None = None
        self.squared = squared
        self.remove: Callable[[], None]
        if input_:
            self.remove = module.register_forward_pre_hook(lambda _, args: self._see(args[0])).remove
        else:
            self.remove = module.register_forward_hook(lambda _, __, output: self._see(output)).remove

    def _see(self, x: Tensor) -> None:
        x_NI = x.detach().reshape(-1, x.shape[-1]).double()
        mine = (x_NI.square() if self.squared else x_NI.abs()).sum(0)
        self.total = mine if self.total is None else self.total + mine

    @property
    def found(self) -> Tensor:
        assert self.total is not None
        return self.total.sqrt() if self.squared else self.total


def _run(model: Decoder, batches: Sequence[Batch]) -> None:
    device = model.embed.weight.device
    with evaluating(model), full(model):
        for batch in batches:
            batch = batch.to(device)
            model(batch["tokens"], batch.get("positions"), batch.get("documents"))


def _listen(name: str, part: nn.Module) -> tuple[str, _Sum] | None:
    if isinstance(part, MLP):
        return name, _Sum(part.up) if part.gate is None else _Sum(part.down, input_=True)
    if isinstance(part, Attention):
        return name, _Sum(part.q)
    if isinstance(part, Mamba2):
        return name, _Sum(part.x, squared=True)
    return None


@torch.no_grad()
def activation_scores(model: Decoder, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Scores as `resilin.nested.importance.put_in_order` takes them, and `hidden` (D,); float64.

    Experts go by their weights.

    Args:
        model: whole and plain.
        batches: of calibration tokens.

    Raises:
        ImportanceError: there is no batch, or the model is looped.
    """
    if not batches:
        raise ImportanceError("no batch was given to measure on: give some text, or go by the weights alone")
    if model.settings.loop is not None:
        raise ImportanceError("the blocks of a looped decoder are run several times: there is no order of its stream")
    with ExitStack() as hooks:
        parts = dict(found for name, part in parts_of(model) if (found := _listen(name, part)) is not None)
        norms = [
            _Sum(norm) for block in model.blocks for name in _NORMS if (norm := getattr(block, name, None)) is not None
        ]
        for one in (*parts.values(), *norms):
            hooks.callback(one.remove)
        _run(model, batches)
    scores = {name: one.found for name, one in parts.items()}
    by_weight = importance(model)
    scores |= {name: one for name, one in by_weight.items() if name not in scores}
    return scores | {"hidden": torch.stack([one.found for one in norms]).sum(0)}


@torch.no_grad()
def weight_scores(model: Decoder) -> dict[str, Tensor]:
    """The same by the weights alone; of the stream, the norm of what the embedding gives."""
    return importance(model) | {"hidden": torch.linalg.vector_norm(model.embed.weight.double(), dim=0)}


def random_scores(model: Decoder, seed: int) -> dict[str, Tensor]:
    """Scores that say nothing, a function of the seed and the part's name: what a ranking is compared with."""
    keys, device = Keys.of_step(seed, 0).fold("ranking"), model.embed.weight.device
    return {
        name: keys.fold(name).uniform(tuple(one.shape)).view(one.shape).double().to(device)
        for name, one in weight_scores(model).items()
    }


@torch.no_grad()
def order_stream(model: Decoder, scores_D: Tensor) -> None:
    """Sort the channels of the residual stream by falling score, in place; the whole model computes the same.

    Args:
        model: whole and plain; not looped.
        scores_D: of the channels.
    """
    order_D = scores_D.argsort(descending=True, stable=True)
    width = model.settings.hidden_size
    if width == 1:
        return
    used = regions(model.settings, Budget(hidden=width - 1))
    for name, parameter in model.named_parameters():
        (box,) = used[name]
        for dim, (size, kept) in enumerate(zip(parameter.shape, box.sizes, strict=True)):
            if kept != size:
                parameter.copy_(parameter.index_select(dim, order_D))


def _logits(model: Decoder, batch: Batch) -> Tensor:
    """(N, V) of the tokens whose label counts, or of all."""
    hidden_BTD = model(batch["tokens"], batch.get("positions"), batch.get("documents")).hidden_BTD
    labels_BT = batch.get("labels")
    return model.logits(hidden_BTD.flatten(0, 1) if labels_BT is None else hidden_BTD[labels_BT != IGNORE])


@torch.no_grad()
def ablation_errors(model: Decoder, batches: Sequence[Batch], removed: tuple[int, ...] = ()) -> dict[int, float]:
    """For each layer that is left, the squared change of the logits without it, as a share of the squared logits.

    Args:
        model: whole.
        batches: of calibration tokens.
        removed: layers that are gone already; changes are measured from the whole model all the same.
    """
    layers = [layer for layer in range(model.settings.layers) if layer not in removed]
    errors, size = dict.fromkeys(layers, 0.0), 0.0
    device = model.embed.weight.device
    with evaluating(model):
        for batch in (one.to(device) for one in batches):
            with full(model):
                whole_NV = _logits(model, batch).double()
            size += float(whole_NV.square().sum())
            for layer in layers:
                with budget(model, Budget(skip=(*removed, layer))):
                    errors[layer] += float((whole_NV - _logits(model, batch).double()).square().sum())
    return {layer: error / size for layer, error in errors.items()}


def depth_order(model: Decoder, batches: Sequence[Batch], *, iterative: bool = True) -> tuple[int, ...]:
    """All layers, the most important first.

    Args:
        model: whole.
        batches: of calibration tokens.
        iterative: measure anew after each removal, which takes half the square of the number of layers as many
            passes; else all are measured once.
    """
    if not iterative:
        errors = ablation_errors(model, batches) if model.settings.layers > 1 else {0: 0.0}
        return tuple(sorted(errors, key=lambda layer: -errors[layer]))
    removed: list[int] = []
    while len(removed) < model.settings.layers - 1:
        errors = ablation_errors(model, batches, tuple(removed))
        removed.append(min(errors, key=lambda layer: (errors[layer], layer)))
    (last,) = set(range(model.settings.layers)) - set(removed)
    return (last, *reversed(removed))


def scores_by(by: By, model: Decoder, batches: Sequence[Batch], seed: int) -> dict[str, Tensor] | None:
    """The scores that are asked for; None: nothing is to be put in order."""
    makers: dict[str, Callable[[], Any]] = {
        "activation": lambda: activation_scores(model, batches),
        "weight": lambda: weight_scores(model),
        "random": lambda: random_scores(model, seed),
        "none": lambda: None,
    }
    found: dict[str, Tensor] | None = makers[by]()
    return found
