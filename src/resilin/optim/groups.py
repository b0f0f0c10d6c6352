"""Parameter groups by rule: which learning rate and which weight decay each parameter gets."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from pydantic import Field
from torch import nn

from resilin.config import Settings


class Rule(Settings):
    """What parameters of a name and shape get instead of the optimizer's own values; the first match wins."""

    match: str = "*"
    """A shell pattern for the parameter's name: `*.attention.q.weight`, `embed.*`."""
    ndim: int | None = None
    """Only parameters with this number of dimensions."""
    lr_scale: float = Field(default=1.0, gt=0)
    """Multiplies the learning rate."""
    weight_decay: float | None = Field(default=None, ge=0)
    """Replaces the weight decay."""

    def matches(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether the rule is about this parameter."""
        return fnmatchcase(name, self.match) and self.ndim in (None, parameter.ndim)


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters that are updated alike."""

    parameters: tuple[tuple[str, nn.Parameter], ...]
    lr_scale: float
    weight_decay: float


def embedding_names(model: nn.Module) -> frozenset[str]:
    """Names of the parameters that `nn.Embedding` modules look up (also where the head shares them)."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return frozenset(name for name, p in model.named_parameters() if id(p) in embeddings)


def is_vector(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a norm's scale or a bias (also a stack of biases), not a matrix."""
    return parameter.ndim < 2 or name.endswith("bias")


def make_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    rules: Sequence[Rule] = (),
    decay_vectors: bool = False,
    decay_embeddings: bool = True,
    lr_scales: Mapping[str, float] | None = None,
    apart: Collection[str] = (),
) -> list[Group]:
    """All trainable parameters in groups, in the model's order.

    Args:
        model: whose `named_parameters` are grouped; frozen parameters are left out.
        weight_decay: of parameters that no rule and no switch exempts.
        rules: first match wins; a matching rule is asked before the switches below.
        decay_vectors: whether norms and biases (one dimension, or a name ending in `bias`) decay.
        decay_embeddings: whether embedding tables decay.
        lr_scales: further learning-rate factors by parameter name (muP), multiplied with a rule's.
        apart: names of parameters that are in no group.

    Raises:
        ValueError: naming a rule that no trainable parameter matches, or a model with nothing to train.
    """
    embeddings = embedding_names(model)
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad and name not in apart]
    if not trainable:
        raise ValueError("the model has no trainable parameter: every one has requires_grad=False")
    groups: dict[tuple[float, float], list[tuple[str, nn.Parameter]]] = {}
    used: set[int] = set()
    for name, parameter in trainable:
        exempt = (is_vector(name, parameter) and not decay_vectors) or (name in embeddings and not decay_embeddings)
        scale, decay = (lr_scales or {}).get(name, 1.0), 0.0 if exempt else weight_decay
        for index, rule in enumerate(rules):
            if rule.matches(name, parameter):
                used.add(index)
                scale *= rule.lr_scale
                decay = decay if rule.weight_decay is None else rule.weight_decay
                break
        groups.setdefault((scale, decay), []).append((name, parameter))
    for index, rule in enumerate(rules):
        if index not in used:
            raise ValueError(
                f"optimizer.rules[{index}] ({rule.model_dump(exclude_defaults=True)}) decides for no trainable "
                f"parameter: its pattern matches none, or an earlier rule takes them all; names look like "
                f"{', '.join(name for name, _ in trainable[:4])}"
            )
    return [Group(tuple(members), scale, decay) for (scale, decay), members in groups.items()]
