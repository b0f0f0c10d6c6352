"""Rewards of generated text in [0, 1], for selection by policy gradients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from resilin.config import Settings, component
from resilin.steer.embed import EmbeddingError, SentenceEncoder


class Reward(Settings, ABC):
    """Judges responses; `reward = { use = "module:Class" }` names a subclass."""

    @abstractmethod
    def score(self, responses: Sequence[list[int]], references: Sequence[list[int]], tokenizer: Any) -> list[float]:
        """A reward in [0, 1] for each response.

        Args:
            responses: token ids that the model wrote after a prompt.
            references: what follows the same prompt in the target data.
            tokenizer: of the source, or None.
        """


class Overlap(Reward):
    """F1 of the tokens that response and reference share, each as often as it occurs in both."""

    def score(self, responses: Sequence[list[int]], references: Sequence[list[int]], tokenizer: Any) -> list[float]:
        """2 * shared / (length of the response + length of the reference)."""
        found = []
        for response, reference in zip(responses, references, strict=True):
            shared = sum((Counter(response) & Counter(reference)).values())
            found.append(2 * shared / max(1, len(response) + len(reference)))
        return found


class Similarity(Reward):
    """Cosine of the sentence embeddings of response and reference, cut off below 0."""

    encoder: Annotated[SentenceEncoder, component("resilin.steer.embed:SentenceEncoder")] = Field(
        default_factory=dict, validate_default=True
    )
    """The encoder."""

    def score(self, responses: Sequence[list[int]], references: Sequence[list[int]], tokenizer: Any) -> list[float]:
        """Of the decoded texts.

        Raises:
            EmbeddingError: there is no tokenizer to decode with.
        """
        if tokenizer is None:
            raise EmbeddingError("a reward by sentence similarity reads text, and the source has no tokenizer")
        texts = [tokenizer.decode(list(ids)) for ids in (*responses, *references)]
        vectors = self.encoder.encode(texts)
        cosines = (vectors[: len(responses)] * vectors[len(responses) :]).sum(1)
        return [float(value) for value in cosines.clamp(0, 1)]
