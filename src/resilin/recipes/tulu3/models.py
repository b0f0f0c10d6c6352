"""The models of the first two stages over sums, as stages with few settings: what a recipe's arms start from."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field
from torch import nn

from resilin.models.settings import ModelContext, ModelSettings
from resilin.posttrain.pair_terms import PairLoss
from resilin.recipes.stage import Stage

Positive = Annotated[int, Field(gt=0)]


def _run(steps: int, batch_size: int, device: str, lr: float, warmup: float, decay: float) -> dict[str, Any]:
    schedule = {"use": "resilin.optim.schedule:Linear", "warmup": warmup}
    return {
        "train": {"steps": steps, "batch_size": batch_size, "device": device},
        "optimizer": {"lr": lr, "weight_decay": decay, "schedule": schedule},
        "precision": {"compute": "fp32"},
        "checkpoint": {"every": 0},
        "evaluation": {"every": 0},
    }


class Tuned(ModelSettings):
    """A decoder after supervised fine-tuning on right answers, from nothing."""

    hidden_size: Positive = 96
    layers: Positive = 2
    heads: Positive = 4
    steps: Positive = 700
    batch_size: Positive = 64
    lr: float = Field(default=3e-3, gt=0)
    device: Literal["cpu", "cuda"] = "cpu"

    def stage(self) -> Stage:
        """The run whose model this is."""
        shape = {"hidden_size": self.hidden_size, "layers": self.layers, "heads": self.heads}
        tree = {
            **_run(self.steps, self.batch_size, self.device, self.lr, 0.05, 0.1),
            "source": {"use": "resilin.recipes.tulu3.sums:SumsChat"},
            "model": {**shape, "tie_embeddings": True, "max_positions": 64},
        }
        return Stage(run=tree)

    def build(self, context: ModelContext) -> nn.Module:
        """The model; trains it where that has not been done."""
        return self.stage().build(context)


def _paired(tuned: Tuned, steps: int, batch_size: int, lr: float, more: dict[str, Any]) -> Stage:
    """A run over pairs of a tuned model's answers."""
    start = _start(tuned)
    source = {"use": "resilin.recipes.tulu3.sums:SumsPairs", "model": start}
    return Stage(run={**_run(steps, batch_size, tuned.device, lr, 0.1, 0.0), "source": source, "model": start, **more})


def _start(tuned: Tuned) -> dict[str, Any]:
    return {"use": "resilin.recipes.stage:Stage", **tuned.stage().model_dump(mode="json")}


class Preferred(ModelSettings):
    """The same after learning from pairs of its own answers."""

    tuned: Tuned = Tuned()
    """Where it starts, and whose answers the pairs are."""
    loss: PairLoss = "dpo_norm"
    beta: float | None = None
    steps: Positive = 60
    batch_size: Positive = 32
    lr: float = Field(default=2e-4, gt=0)

    def stage(self) -> Stage:
        """The run whose model this is."""
        objective = {"use": "resilin.posttrain.preference_loss:Preference", "loss": self.loss, "beta": self.beta}
        given = {key: value for key, value in objective.items() if value is not None}
        return _paired(self.tuned, self.steps, self.batch_size, self.lr, {"objective": given})

    def build(self, context: ModelContext) -> nn.Module:
        """The model; trains it, and what it starts from, where that has not been done."""
        return self.stage().build(context)


class Scoring(ModelSettings):
    """A reward model that starts as the fine-tuned one and learns from the same pairs; where a value model begins."""

    tuned: Tuned = Tuned()
    """Where it starts, and whose answers the pairs are."""
    steps: Positive = 60
    batch_size: Positive = 32
    lr: float = Field(default=1e-3, gt=0)

    def stage(self) -> Stage:
        """The run whose model this is."""
        model = {"use": "resilin.posttrain.reward_model:Reward", "model": _start(self.tuned)}
        objective = {"use": "resilin.posttrain.reward_loss:PairwiseReward"}
        return _paired(self.tuned, self.steps, self.batch_size, self.lr, {"model": model, "objective": objective})

    def build(self, context: ModelContext) -> nn.Module:
        """The model; trains it, and what it starts from, where that has not been done."""
        return self.stage().build(context)
