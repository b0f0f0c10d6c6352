"""A language model that mixes tokens by running means instead of attention, with a plan for tensor parallelism.

Shapes: B batch, T tokens, D hidden size, W inner width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from resilin.keys import Keys, dropout
from resilin.layout import Shard, SpecRule
from resilin.models.linear import Embedding, Linear
from resilin.models.norm import RMSNorm
from resilin.models.settings import ModelContext, ModelSettings
from resilin.models.tensor_plan import TensorPlan


class RunningMean(ModelSettings):
    """Blocks of `x + out(silu(gate(norm(x))) * mean over the tokens so far of value(norm(x)))`."""

    hidden_size: int = Field(default=64, gt=0)
    """Width of the residual stream."""
    inner_size: int = Field(default=128, gt=0)
    """Width inside a block."""
    layers: int = Field(default=2, gt=0)
    """Number of blocks."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Of each block's output."""

    def build(self, context: ModelContext) -> nn.Module:
        """The model on the CPU."""
        if not context.vocab_size:
            raise ValueError("a RunningMean needs a source whose tokenizer says how large the vocabulary is")
        model = RunningMeanModel(self, context.vocab_size)
        keys = Keys.of_step(context.seed, 0).fold("initial weights")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:  # each parameter's values are a function of the seed and its name
                    parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=keys.fold(name).generator())
                else:
                    parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        return model


class Output(NamedTuple):
    """What the objective reads."""

    hidden_BTD: Tensor


class Mixer(nn.Module):
    """The inside of a block."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate = Linear(width, inner, bias=False)
        self.value = Linear(width, inner)
        self.out = Linear(inner, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        count_T1 = torch.arange(1, x_BTD.shape[1] + 1, device=x_BTD.device)[:, None]
        mean_BTW = self.value(x_BTD).cumsum(1) / count_T1
        out_BTD: Tensor = self.out(F.silu(self.gate(x_BTD)) * mean_BTW)
        return out_BTD


class RunningMeanModel(nn.Module):
    """Built by `RunningMean`."""

    def __init__(self, settings: RunningMean, vocabulary: int) -> None:
        super().__init__()
        self.settings = settings
        self.embed = Embedding(vocabulary, settings.hidden_size)
        self.norms = nn.ModuleList(RMSNorm(settings.hidden_size, 1e-5) for _ in range(settings.layers))
        self.mixers = nn.ModuleList(Mixer(settings.hidden_size, settings.inner_size) for _ in range(settings.layers))
        self.norm = RMSNorm(settings.hidden_size, 1e-5)
        self.head = Linear(settings.hidden_size, vocabulary, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """(V, D)."""
        return self.head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        return F.linear(hidden, self.head_weight).float()

    def forward(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        *,
        keys: Keys | None = None,
    ) -> Output:
        """Hidden states of every token; documents are not told apart."""
        x_BTD = self.embed(tokens_BT)
        for layer, (norm, mixer) in enumerate(zip(self.norms, self.mixers, strict=True)):
            x_BTD = x_BTD + dropout(mixer(norm(x_BTD)), self.settings.dropout, keys.fold(layer) if keys else None)
        return Output(self.norm(x_BTD))

    def tensor_plan(self) -> TensorPlan:
        """Each mixer's inner width is divided; so is the vocabulary."""
        return TensorPlan(
            rules=(
                SpecRule(r"(embed|head)\.weight", (Shard("tp", 0, rule="even"),)),
                SpecRule(r"mixers\.\d+\.(gate|value)\.(weight|bias)", (Shard("tp", 0, rule="even"),)),
                SpecRule(r"mixers\.\d+\.out\.weight", (Shard("tp", 1, rule="even"),)),
            ),
            regions=(r"mixers\.\d+",),
            copied=(r"mixers\.\d+\.out\.bias",),
            biases=(r"mixers\.\d+\.out",),
            embedding="embed",
            head=("head.weight",),
            last="norm",
            padding=(("tokens_BT", 0),),
        )
