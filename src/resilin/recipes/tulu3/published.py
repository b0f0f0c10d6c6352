"""The first stages at the published size, 8 billion parameters, as stages that start from one another.

Batch sizes, learning rates, schedules and lengths are those of the paper's tables; steps are its counts of rows over
the batch size: 939,344 conversations twice, 425,145 pairs once.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from torch import nn

from resilin.models.settings import ModelContext, ModelSettings
from resilin.recipes.stage import Stage

Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0)]
CONVERSATIONS, PAIRS = 939_344, 425_145


class _Published(ModelSettings):
    """What the stages have in common."""

    data: Path
    """The stage's rows."""
    base: Path = Path("models/Llama-3.1-8B")
    """The pretrained model."""
    micro_batch_size: Positive = 1
    """Rows at once; changes memory only."""

    @abstractmethod
    def stage(self) -> Stage:
        """The run whose model this is."""

    def build(self, context: ModelContext) -> nn.Module:
        """The model; trains it, and what it starts from, where that has not been done."""
        return self.stage().build(context)

    def run(self, steps: int, batch_size: int, lr: float, warmup: float) -> dict[str, Any]:
        """What a run of so many steps has beside source, model and objective."""
        size = {"batch_size": batch_size, "micro_batch_size": self.micro_batch_size}
        schedule = {"use": "resilin.optim.schedule:Linear", "warmup": warmup}
        return {
            "train": {"steps": steps, "device": "cuda", **size},
            "optimizer": {"lr": lr, "weight_decay": 0.0, "betas": [0.9, 0.999], "schedule": schedule},
            "precision": {"compute": "bf16"},
            "evaluation": {"every": 0},
        }


class FineTuned(_Published):
    """After supervised fine-tuning on the mixture."""

    data: Path = Path("data/tulu3/sft.jsonl")
    lr: Rate = 5e-6
    batch_size: Positive = 128
    epochs: Positive = 2
    warmup: float = 0.03

    def stage(self) -> Stage:
        """The run whose model this is."""
        source = {
            "use": "resilin.data.chat_source:ChatSource",
            "paths": [str(self.data)],
            "tokenizer": {"path": str(self.base)},
            "chat_template": "tulu",
            "sequence_length": 4096,
            "packing": "pad",
            "epochs": self.epochs,
        }
        pretrained = {"use": "resilin.models.pretrained:Pretrained", "path": str(self.base), "recompute": "block"}
        steps = self.epochs * CONVERSATIONS // self.batch_size
        run = self.run(steps, self.batch_size, self.lr, self.warmup)
        return Stage(run={**run, "source": source, "model": pretrained})


class _OfPairs(_Published):
    """A stage that starts from the fine-tuned model and reads pairs once."""

    data: Path = Path("data/tulu3/preferences.jsonl")
    tuned: FineTuned = FineTuned()
    """Where it starts."""
    warmup: float = 0.1

    def of_pairs(self, batch_size: int, lr: float) -> tuple[dict[str, Any], dict[str, Any]]:
        """A run without its model, and the model to start from."""
        source = {
            "use": "resilin.data.preference_source:PreferenceSource",
            "paths": [str(self.data)],
            "tokenizer": str(self.base),
            "chat_template": "tulu",
            "sequence_length": 2048,
            "epochs": 1,
        }
        start = {"use": "resilin.recipes.stage:Stage", **self.tuned.stage().model_dump(mode="json")}
        return {**self.run(PAIRS // batch_size, batch_size, lr, self.warmup), "source": source}, start


class Preferred(_OfPairs):
    """After length-normalised DPO."""

    lr: Rate = 5e-7
    batch_size: Positive = 128
    beta: Rate = 5.0

    def stage(self) -> Stage:
        """The run whose model this is."""
        run, start = self.of_pairs(self.batch_size, self.lr)
        objective = {"use": "resilin.posttrain.preference_loss:Preference", "loss": "dpo_norm", "beta": self.beta}
        return Stage(run={**run, "model": start, "objective": objective})


class Scoring(_OfPairs):
    """The reward model that the value model starts as."""

    lr: Rate = 3e-6
    batch_size: Positive = 256
    warmup: float = 0.03

    def stage(self) -> Stage:
        """The run whose model this is."""
        run, start = self.of_pairs(self.batch_size, self.lr)
        model = {"use": "resilin.posttrain.reward_model:Reward", "model": start}
        return Stage(run={**run, "model": model, "objective": {"use": "resilin.posttrain.reward_loss:PairwiseReward"}})
