"""ODM: domains as the arms of a bandit whose reward is the loss.

Source: Albalak et al., "Efficient online data mixing for language model pre-training", 2023, algorithm 1 (Exp3 with a
moving average of rewards); scale, floor and clipping as DataFlex adds them.
Shapes: k domains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import Field

from resilin.nouns import State
from resilin.steer.mixer import Mixer, MixLook, Seen


def exploration(t: int, k: int, floor: float) -> float:
    """eps_t = max(floor, min(1/k, sqrt(ln k / (k t)))), and never above 1/k, where all is exploration."""
    found = min(1 / k, math.sqrt(math.log(k) / (k * t))) if t and k > 1 else 1 / k
    return min(1 / k, max(floor, found))


class ODM(Mixer):
    """Draws more of the domains whose loss is high.

    After a step every domain that was in its batch is rewarded: R <- decay * R + (1 - decay) * scale * loss * share /
    p, where `share` is its part of the batch and p its probability. For a batch of one domain this is Exp3's loss / p;
    for a mixed batch its mean is the domain's loss too, whatever p is.
    """

    listens: ClassVar[bool] = True

    warmup_steps: Annotated[int, Field(ge=0)] = 2000
    """Steps of the run before rewards are collected and proportions change."""
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of the moving average of rewards."""
    scale: Annotated[float, Field(gt=0)] = 15.0
    """Of a reward; 1 in the paper."""
    floor: Annotated[float, Field(ge=0)] = 0.03
    """Least exploration; 0 in the paper."""
    clip: Annotated[float, Field(gt=0)] = 5.0
    """Exponents are kept above minus this; inf in the paper."""

    def mix(self, look: MixLook) -> Sequence[float]:
        """p_i = (1 - k eps_t) exp(eps_{t-1} R_i) / sum_j exp(eps_{t-1} R_j) + eps_t."""
        if look.view.step < self.warmup_steps or "rewards" not in look.memory:
            return look.current
        t = look.memory["t"] = look.memory.get("t", 0) + 1
        return self.proportions(look.memory["rewards"], t)

    def proportions(self, rewards: Sequence[float], t: int) -> list[float]:
        """The proportions at update t, from 1."""
        k, best = len(rewards), max(rewards)
        now, before = exploration(t, k, self.floor), exploration(t - 1, k, self.floor)
        powers = [math.exp(max(-self.clip, before * (reward - best))) for reward in rewards]
        raw = [(1 - k * now) * power / sum(powers) + now for power in powers]
        return [p / sum(raw) for p in raw]

    def observe(self, memory: State, seen: Seen) -> None:
        """Reward every domain of the step's batch."""
        if seen.step < self.warmup_steps:
            return
        rewards = memory.setdefault("rewards", [0.0] * len(seen.losses))
        for number, (loss, share, p) in enumerate(zip(seen.losses, seen.shares, seen.current, strict=True)):
            if loss is not None and share > 0 and p > 0:
                gained = self.scale * loss * share / p
                rewards[number] = self.decay * rewards[number] + (1 - self.decay) * gained
