"""The gradient of every sample of a batch: one pass for all, or a loop as the reference and for everything else.

One pass: the samples' losses are summed, and only the gradients of the *outputs* of the modules that trainable
parameters are used through are asked for; a sample's gradient of such a module's parameters follows from its own input
and output gradient (Goodfellow, "Efficient per-example gradient computations", 2015): an outer product summed over
tokens for a linear map, a scatter for an embedding, a product for a norm, and `torch.func.vmap` of the module's own
pull-back for whatever else, such as a linear map with adapters, whose parameters lie in modules that are never called
themselves. So the decoder runs through its ordinary kernels, which `vmap(grad(...))` of the whole model cannot
(measured on 2 CPU cores: it is slower than the loop from width 128 on).

Shapes: B samples, T tokens, I and O inputs and outputs of a linear map, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resilin.models.linear import Linear
from resilin.models.norm import LayerNorm, RMSNorm
from resilin.nouns import Batch, Objective
from resilin.objective.next_token import IGNORE, valid_labels
from resilin.objective.vocabulary import whole_head
from resilin.steer.evaluating import evaluating
from resilin.steer.token_losses import call, hidden_states, innermost, predicts_tokens

Gradients = dict[str, Tensor]
"""(B, *shape of the parameter) by name."""
Reduce = Literal["mean", "sum"]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name (a shared one once)."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def sample_gradients(
    model: nn.Module,
    objective: Objective,
    batch: Batch,
    *,
    reduce: Reduce = "mean",
    way: Literal["auto", "batched", "loop"] = "auto",
) -> Gradients:
    """The gradient of each sample's loss with respect to the trainable parameters.

    Args:
        model: evaluated without dropout; its mode and its `.grad` are left as they were.
        objective: a sample's loss is its mean (or summed) next-token cross-entropy; of any other objective it is the
            loss per unit (or sum) of that sample alone.
        batch: on the model's device.
        reduce: over the units of a sample.
        way: auto takes one pass where model and objective allow it.

    Raises:
        ValueError: `way` is "batched" and a parameter is used in a way this cannot follow; the text names it.
    """
    with evaluating(model), torch.enable_grad():
        if way == "loop" or (way == "auto" and not predicts_tokens(objective)):
            return _loop(model, objective, batch, reduce)
        found = _batched(model, batch, reduce)
        if isinstance(found, str):
            if way == "batched":
                raise ValueError(f"per-sample gradients in one pass: {found}; use way='loop'")
            return _loop(model, objective, batch, reduce)
    return found


# -- one by one -----------------------------------------------------------------------------------------------------


def _losses(model: Any, batch: Batch, reduce: Reduce, logits_BTV: Tensor) -> Tensor:
    labels_BT = batch["labels"].masked_fill(~valid_labels(batch), IGNORE)
    logits_BTV = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))
    losses_BT = F.cross_entropy(logits_BTV.transpose(1, 2), labels_BT, ignore_index=IGNORE, reduction="none")
    sums_B = losses_BT.sum(1)
    return sums_B if reduce == "sum" else sums_B / (labels_BT != IGNORE).sum(1).clamp(min=1)


def _logits(model: Any, output: Any) -> Tensor:
    hidden = hidden_states(output)
    return output if hidden is None else model.logits(hidden)  # type: ignore[no-any-return]


def _loop(model: nn.Module, objective: Objective, batch: Batch, reduce: Reduce) -> Gradients:
    parameters = trainable(model)
    rows: list[tuple[Tensor | None, ...]] = []
    for row in range(len(batch)):
        one = batch.rows(row, row + 1)
        if predicts_tokens(objective):
            total = _losses(model, one, reduce, _logits(model, call(model, one)))[0]
        else:
            loss = innermost(objective)(model, one, None)
            total = loss.sum if reduce == "sum" else loss.sum / loss.units.clamp(min=1e-12)
        rows.append(torch.autograd.grad(total, list(parameters.values()), allow_unused=True))
    found = {}
    for column, (name, parameter) in enumerate(parameters.items()):
        own = [row[column] for row in rows]
        found[name] = torch.stack([torch.zeros_like(parameter) if g is None else g.detach() for g in own])
    return found


# -- all at once ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Call:
    """One call of a module that trainable parameters are used through."""

    module: nn.Module
    inputs: tuple[Any, ...]
    named: dict[str, Any]
    output: Tensor


@dataclass(slots=True)
class _Recorder:
    """Keeps the calls of the modules it is hooked to, and of which of them they cannot be followed, and why."""

    samples: int
    tokens: int
    calls: dict[nn.Module, list[_Call]] = field(default_factory=dict)
    troubles: dict[nn.Module, str] = field(default_factory=dict)

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        first = inputs[0] if inputs else None
        wanted = (self.samples, self.tokens)
        mine = self.calls.setdefault(module, [])
        if not (isinstance(first, Tensor) and first.shape[:2] == wanted):
            self.troubles[module] = f"{type(module).__name__} does not see samples and tokens in its first dimensions"
        elif not (isinstance(output, Tensor) and output.shape[:2] == wanted and output.requires_grad):
            self.troubles[module] = f"{type(module).__name__} gives no tensor with a graph for each sample"
        else:
            mine.append(_Call(module, inputs, named, output))


def _own(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters(recurse=False) if p.requires_grad}


def _recorded(model: Any, batch: Batch) -> tuple[Any, _Recorder]:
    """The model's output, and the calls of all modules below it that hold trainable parameters, in any depth."""
    recorder = _Recorder(*batch["labels"].shape)
    parts = [module for module in model.modules() if module is not model and trainable(module)]
    handles = [module.register_forward_hook(recorder, with_kwargs=True) for module in parts]
    try:
        return call(model, batch), recorder
    finally:
        for handle in handles:
            handle.remove()


def _calls(model: nn.Module, recorder: _Recorder, apart: set[int]) -> list[tuple[_Call, dict[str, nn.Parameter]]] | str:
    """The calls that the trainable parameters, but those `apart`, are used through, each with its parameters.

    A parameter is used through the module that holds it; where that is never called, through the next one around it.
    Where a parameter's use cannot be followed, the answer says why.
    """
    around = {child: module for module in model.modules() for child in module.children()}
    used: dict[nn.Module, set[int]] = {}
    for holder in model.modules():
        own = {id(p) for p in _own(holder).values()} - apart
        unit: nn.Module | None = holder
        while own and unit is not None and unit not in recorder.calls:
            unit = around.get(unit)
        if own and unit is None:
            name = next(name for name, p in trainable(model).items() if id(p) in own)
            return f"parameter {name!r} is not used through a module"
        if own and unit is not None:
            if unit in recorder.troubles:
                return recorder.troubles[unit]
            used.setdefault(unit, set()).update(own)
    return [
        (made, {name: p for name, p in unit.named_parameters() if id(p) in mine})
        for unit, mine in used.items()
        for made in recorder.calls[unit]
    ]


def _batched(model: Any, batch: Batch, reduce: Reduce) -> Gradients | str:
    """The gradients, or why they cannot be had this way."""
    names = {id(parameter): name for name, parameter in trainable(model).items()}
    output, recorder = _recorded(model, batch)
    hidden_BTD, head = hidden_states(output), None
    if hidden_BTD is None:
        logits_BTV = raw_BTV = output
    else:
        head = whole_head(model, "the gradient of each sample")
        raw_BTV = F.linear(hidden_BTD, head)
        cap = getattr(getattr(model, "settings", None), "logit_softcap", None)
        logits_BTV = raw_BTV if cap is None else cap * torch.tanh(raw_BTV / cap)
    if head is not None and head.requires_grad and id(head) not in names:
        return "the output matrix is computed from parameters"
    tied = head is not None and any(p is head for module in recorder.calls for p in _own(module).values())
    calls = _calls(model, recorder, set() if head is None or tied else {id(head)})
    if isinstance(calls, str):
        return calls
    total = _losses(model, batch, reduce, logits_BTV).sum()
    targets = [made.output for made, _ in calls] + ([raw_BTV] if head is not None else [])
    pulls = torch.autograd.grad(total, targets, allow_unused=True)
    found: Gradients = {}
    with torch.no_grad():
        for (made, mine), pull in zip(calls, pulls, strict=False):
            if pull is not None:
                for own, gradient in _of_call(made, mine, pull):
                    _add(found, names[id(own)], gradient)
        if head is not None and id(head) in names:
            assert hidden_BTD is not None
            _add(found, names[id(head)], torch.bmm(pulls[-1].transpose(1, 2), hidden_BTD.detach().to(pulls[-1].dtype)))
    for name, parameter in trainable(model).items():
        if name not in found:
            found[name] = torch.zeros(len(batch), *parameter.shape, dtype=parameter.dtype, device=parameter.device)
    return {name: found[name] for name in names.values()}


def _add(found: Gradients, name: str, gradient: Tensor) -> None:
    found[name] = found[name] + gradient if name in found else gradient


def _of_call(made: _Call, own: dict[str, nn.Parameter], pull_BTO: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Each of some parameters of a module with the samples' gradients that one call gives it."""
    module = made.module
    x = made.inputs[0].detach()
    plain = type(module).forward in (nn.Linear.forward, Linear.forward, nn.Embedding.forward)
    if plain and isinstance(module, nn.Linear):
        x_BTI, pull = x.flatten(1, -2), pull_BTO.flatten(1, -2)
        if module.weight.requires_grad:
            yield module.weight, torch.bmm(pull.transpose(1, 2), x_BTI.to(pull.dtype))
        if module.bias is not None and module.bias.requires_grad:
            yield module.bias, pull.sum(1)
    elif plain and isinstance(module, nn.Embedding) and module.padding_idx is None:
        B, rows = len(x), module.num_embeddings
        flat = torch.zeros(B * rows, pull_BTO.shape[-1], dtype=pull_BTO.dtype, device=pull_BTO.device)
        place_N = (x.flatten(1) + rows * torch.arange(B, device=x.device)[:, None]).flatten()
        yield module.weight, flat.index_add_(0, place_N, pull_BTO.flatten(0, -2)).view(B, rows, -1)
    elif isinstance(module, RMSNorm | LayerNorm):
        shape = module.weight.shape
        if isinstance(module, RMSNorm):
            normed = F.rms_norm(x, shape, None, module.eps)
        else:
            normed = F.layer_norm(x, shape, None, None, module.eps)
        yield module.weight, (pull_BTO * normed).flatten(1, -2).sum(1)
    else:
        yield from zip(own.values(), _pulled_back(made, own, pull_BTO), strict=True)


def _pulled_back(made: _Call, own: dict[str, nn.Parameter], pull_BTO: Tensor) -> tuple[Tensor, ...]:
    """By the module's own pull-back, vectorised over samples."""
    from torch.func import functional_call, vjp, vmap  # imports all of torch.compile: seconds

    inputs = [x.detach() if isinstance(x, Tensor) else x for x in made.inputs]
    tensors = [i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.shape[:1] == pull_BTO.shape[:1]]

    def one(pull_TO: Tensor, *samples: Tensor) -> tuple[Tensor, ...]:
        arguments = list(inputs)
        for place, x in zip(tensors, samples, strict=True):
            arguments[place] = x[None]

        def run(*values: Tensor) -> Tensor:
            states = dict(zip(own, values, strict=True))
            found: Tensor = functional_call(made.module, states, tuple(arguments), made.named)
            return found

        pull: Callable[[Tensor], tuple[Tensor, ...]] = vjp(run, *(p.detach() for p in own.values()))[1]
        return pull(pull_TO[None])

    found: tuple[Tensor, ...] = vmap(one)(pull_BTO, *(inputs[i] for i in tensors))
    return found
